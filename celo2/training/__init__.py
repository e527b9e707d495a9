"""What every kind of training needs, of a model or of a rule: configuration, schedule, metrics.jsonl."""
