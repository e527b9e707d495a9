"""The schema of a training run's configuration, its checks, and the YAML files."""
