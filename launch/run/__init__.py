"""A training run: setup, state, schedule, resuming, evaluation, and the summary at the end."""
