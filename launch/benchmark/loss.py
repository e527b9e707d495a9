"""`python -m launch.benchmark loss`: the chunked loss against the one with all logits at once, forward and backward.

Goal: no slower than the naive loss, and under a quarter of its memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from launch.benchmark.measure import TIMES, Column, Row, environment, peak_bytes, summary, time_rounds
from models.loss import chunk_size, chunked_cross_entropy, cross_entropy_reference

# (tokens, width, vocabulary) and the dtype of the products: a micro-batch of gpt3-1.3b, and what a CPU does in a second.
PROBLEMS = {"cuda": ((16 * 2048, 2048, 50304), torch.bfloat16), "cpu": ((2048, 256, 50257), torch.float32)}
CHUNKS = {"cuda": (256, 512, 1024, 2048, 4096), "cpu": (64, 128, 256, 512, 1024)}

COLUMNS = (
    Column("loss", "loss"),
    *TIMES,
    Column("to_naive", "x naive", ".2f"),
    Column("peak_mib", "peak MiB", ",.0f"),
    Column("memory_to_naive", "of naive", ".2f"),
)


def measure_loss(rounds: int, device: torch.device) -> Row:
    """Time and peak memory of the loss and its gradients, naive and for several sizes of a chunk."""
    (tokens, width, vocabulary), dtype = PROBLEMS[device.type]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator) * 0.02).to(device).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator).to(device)

    def gradients(function: object, **options: int) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = function(hidden, weight, targets, **options)
        return torch.autograd.grad(loss, (hidden, weight))

    steps = {"naive": lambda: gradients(cross_entropy_reference)}
    for chunk in CHUNKS[device.type]:
        name = f"chunks of {chunk}" + (" (the default)" if chunk == chunk_size(tokens) else "")
        steps[name] = lambda chunk=chunk: gradients(chunked_cross_entropy, chunk_tokens=chunk)
    seconds = time_rounds(steps, rounds, device)
    times = {name: summary(values) for name, values in seconds.items()}
    peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
    rows = [
        {
            "loss": name,
            **times[name],
            "to_naive": times[name]["ms"] / times["naive"]["ms"],
            "peak_mib": peaks[name] / 2**20,
            "memory_to_naive": peaks[name] / peaks["naive"],
        }
        for name in steps
    ]
    note = f"{tokens:,} tokens x {width} -> {vocabulary:,}, {str(dtype).removeprefix('torch.')}, forward and backward"
    return {**environment(device, rounds), "note": note, "rows": rows}
