"""Optimizers by the name in the configuration."""
