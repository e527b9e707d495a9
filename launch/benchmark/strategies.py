"""`python -m launch.benchmark strategies`: every strategy on 1, 2 and 4 processes: difference, memory, bytes exchanged."""

from __future__ import annotations

import torch

from launch.benchmark.equality import STEPS, table
from launch.benchmark.measure import Column, Row, environment

COLUMNS = (
    Column("row", "strategy"),
    Column("processes", "processes", "d"),
    Column("loss_difference", "loss", ".1e"),
    Column("weight_difference", "weights", ".1e"),
    Column("state", "state bytes", ",d"),
    Column("gradients", "gradient bytes", ",d"),
    Column("sent_bytes", "sent a step", ",.0f"),
    Column("formula_bytes", "formula", ",.0f"),
)


def measure_strategies(device: torch.device) -> Row:
    """A row for each strategy and number of processes; bytes of the rank with the most. Nothing is timed."""
    rows = [{**r, "state": max(r["state_bytes"]), "gradients": max(r["gradient_bytes"])} for r in table("celo2")]
    return {**environment(device, 1), "note": f"{STEPS} steps; differences from one process", "rows": rows}
