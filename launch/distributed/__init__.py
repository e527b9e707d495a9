"""Distributed training: strategies, the heartbeat of the ranks, and the verification of the first step."""
