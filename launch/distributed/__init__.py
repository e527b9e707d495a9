"""A training run over processes: strategies, the heartbeat of ranks, and the verification of the first step."""
