"""Everything around a training run: its parts (run, checkpoint, distributed, optimizers, monitoring) and the tools beside it."""
