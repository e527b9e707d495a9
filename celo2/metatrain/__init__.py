"""Meta-training of the rule by persistent evolution strategies (arXiv 2602.19142): `python -m celo2.metatrain CONFIG.yaml`."""
