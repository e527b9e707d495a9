"""Optimizers: the table of those with a short name, how one is built, and the adapter for those of other libraries."""
