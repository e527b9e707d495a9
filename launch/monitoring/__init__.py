"""What a training run logs and watches: metrics, step statistics, and the guard against bad steps."""
