"""`python -m launch.benchmark loss`: the chunked loss against the one with all logits at once, forward and backward.

Goal: no slower than the naive loss, and under a quarter of its memory.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from launch.benchmark.measure import TIMES, Column, Row, Step, peak_bytes, summary, time_rounds
from models.loss import chunk_size, chunked_cross_entropy, cross_entropy_reference

# (tokens, width, vocabulary) and the dtype of the products: a micro-batch of gpt3-1.3b, and what a CPU does in a second.
PROBLEMS = {"cuda": ((16 * 2048, 2048, 50304), torch.bfloat16), "cpu": ((2048, 256, 50257), torch.float32)}
CHUNKS = {"cuda": (256, 512, 1024, 2048, 4096), "cpu": (64, 128, 256, 512, 1024)}

ROUNDS = 7
COLUMNS = (
    Column("loss", "loss"),
    *TIMES,
    Column("to_naive", "x naive", ".2f"),
    Column("peak_mib", "peak MiB", ",.0f"),
    Column("memory_to_naive", "of naive", ".2f"),
)


def measure(args: Namespace, device: torch.device) -> tuple[str, list[Row]]:
    """Time and peak memory of the loss and its gradients, naive and for several sizes of a chunk."""
    (tokens, width, vocabulary), dtype = PROBLEMS[device.type]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.02).to(device).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device)

    def gradients(function: Callable[..., Tensor], **options: int) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = function(hidden, weight, targets, **options)
        return torch.autograd.grad(loss, (hidden, weight))

    steps: dict[str, Step] = {"naive": partial(gradients, cross_entropy_reference)}
    for chunk in CHUNKS[device.type]:
        name = f"chunks of {chunk}" + (" (the default)" if chunk == chunk_size(tokens) else "")
        steps[name] = partial(gradients, chunked_cross_entropy, chunk_tokens=chunk)
    rows = []
    for name, seconds in time_rounds(steps, args.rounds, device).items():
        rows.append({"loss": name, **summary(seconds), "peak_mib": peak_bytes(steps[name], device) / 2**20})
    naive = rows[0]
    for row in rows:
        row["to_naive"] = row["ms"] / naive["ms"]
        row["memory_to_naive"] = row["peak_mib"] / naive["peak_mib"]
    note = f"{tokens:,} tokens x {width} -> {vocabulary:,}, {str(dtype).removeprefix('torch.')}, forward and backward"
    return note, rows
