"""The schema of a run and the YAML files that fill it in."""
