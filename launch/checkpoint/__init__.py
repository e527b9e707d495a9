"""The checkpoint format: everything that writes or reads one is here."""
