"""The code of a training run (run, checkpoint, distributed, optimizers, monitoring), and the command line tools."""
