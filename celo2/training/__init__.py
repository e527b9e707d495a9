"""Shared by training runs of models and meta-training of rules: configuration, schedule, metrics.jsonl, search, lock."""
