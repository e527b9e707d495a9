"""`python -m launch.benchmark save`: how long training waits for a checkpoint of a 125M model, and how large that is."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from configs.schema import Checkpoint as CheckpointConfig
from configs.schema import Config
from launch.benchmark.measure import Column, Row
from launch.checkpoint.save import Saver
from launch.distributed.setup import make_strategy
from models import build_model

ROUNDS = 3
COLUMNS = (
    Column("stall_seconds", "stall s", ".2f"),
    Column("write_seconds", "written beside training s", ".2f"),
    Column("bytes", "bytes", ",d"),
    Column("bytes_per_weight", "bytes a weight", ".1f"),
)


def measure(args: Namespace, device: torch.device) -> tuple[str, list[Row]]:
    """A row for each round: a checkpoint of `gpt3-125m` with Celo2's state, written to a temporary folder."""
    model = build_model(size="gpt3-125m", vocab_size=50304)
    weights = model.num_parameters()
    strategy = make_strategy(Config(), Accelerator(cpu=device.type == "cpu"), model)
    records: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver([Path(folder)], CheckpointConfig(keep=1), records.append, strategy.host, saved=0)
        for step in range(1, args.rounds + 1):
            saver.save(strategy, {"step": step})
            saver.close()
    rows = [{**record, "bytes_per_weight": record["bytes"] / weights} for record in records]
    return f"{weights:,} weights", rows
