"""How runs are started and watched: processes, optimizers by name, schedules, checkpoints, metrics, plans, benchmarks."""
