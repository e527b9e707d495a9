"""A training run: its setup, state and schedule, resuming it, evaluation, and the summary at its end."""
