"""`python -m launch.benchmark precision`: the loss of a small model on the same batches, Newton–Schulz in bfloat16 and float32.

The text is a Markov chain with four equally likely successors of every token: the loss falls from log V, at best to log 4.
"""

from __future__ import annotations

import math
import statistics
from argparse import Namespace

import torch
from torch import Tensor

from celo2 import Celo2, param_groups
from launch.benchmark.measure import Column, Row
from models import CausalLMLoss, build_model

VOCABULARY, SUCCESSORS, SEQUENCES = 512, 4, 16
STEPS = {"cuda": 400, "cpu": 40}
LAST = 20  # steps whose mean loss counts
LR, ADAMW_LR = 2e-3, 1e-2  # configs/demo.yaml, whose model this is
ROUNDS = 2
COLUMNS = (
    Column("seed", "seed", "d"),
    Column("bf16", "loss, bf16", ".4f"),
    Column("fp32", "loss, fp32", ".4f"),
    Column("difference", "difference", "+.4f"),
)


def markov(successors: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Sequences (SEQUENCES, length) of the chain with `successors` (V, SUCCESSORS)."""
    tokens = [torch.randint(len(successors), (SEQUENCES,), generator=generator)]
    for _ in range(length - 1):
        tokens.append(successors[tokens[-1], torch.randint(SUCCESSORS, (SEQUENCES,), generator=generator)])
    return torch.stack(tokens, 1)


def final_loss(seed: int, ns_dtype: torch.dtype, device: torch.device) -> float:
    """Mean loss of the last steps of a training run, in nats per token."""
    torch.manual_seed(seed)
    model = build_model(size="gpt3-mini", vocab_size=VOCABULARY).to(device)
    loss_model = CausalLMLoss(model)
    optimizer = Celo2(param_groups(model, LR, ADAMW_LR, 0.1), LR, ns_dtype=ns_dtype)
    generator = torch.Generator().manual_seed(seed)
    successors = torch.randint(VOCABULARY, (VOCABULARY, SUCCESSORS), generator=generator)
    losses = []
    for _ in range(STEPS[device.type]):
        tokens = markov(successors, model.config.max_position_embeddings + 1, generator).to(device)
        loss = loss_model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return statistics.fmean(torch.stack(losses[-LAST:]).tolist())


def measure(args: Namespace, device: torch.device) -> tuple[str, list[Row]]:
    """A row for each round, which is one seed."""
    rows = []
    for seed in range(args.rounds):
        bf16, fp32 = (final_loss(seed, dtype, device) for dtype in (torch.bfloat16, torch.float32))
        rows.append({"seed": seed, "bf16": bf16, "fp32": fp32, "difference": bf16 - fp32})
    note = (
        f"gpt3-mini, {STEPS[device.type]} steps, mean of the last {LAST}; at best log {SUCCESSORS} = {math.log(SUCCESSORS):.4f}"
    )
    return note, rows
