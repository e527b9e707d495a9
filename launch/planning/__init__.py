"""`train.py --plan`: what a training run would need."""
