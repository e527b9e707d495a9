"""The tasks of the evaluation, the optimizers, and a training run of an optimizer on a task."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from celo2 import Celo2, Rule, load_rule
from celo2.baselines import HAND_SET, hand_set
from celo2.metatrain.evaluation.networks import Autoencoder, Convolutional, Network, Recurrent, Transformer
from celo2.metatrain.problems import FINAL, warm_up_and_cosine
from celo2.metatrain.tasks import CLASSES, load_images, read_text
from celo2.training.configuration import ConfigError

VALIDATION_SHARE, VALIDATION_BATCHES = 0.1, 16
WEIGHT_DECAY, ADAMW_LR = 0.1, 3e-3

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A network, its kind of data ("text" or "images"), and its batches: sequences of `context` bytes, or images."""

    build: Callable[[], Network]
    data: str
    batch: int
    context: int = 0
    patches: bool = False


TASKS = {
    "gpt-tiny": Task(lambda: Transformer(64, 2, 2, 64), "text", 16, 64),
    "gpt": Task(lambda: Transformer(128, 4, 4, 128), "text", 16, 128),
    "gpt-wide": Task(lambda: Transformer(512, 4, 8, 128), "text", 16, 128),
    "rnn": Task(lambda: Recurrent(128), "text", 32, 48),
    "vit": Task(lambda: Transformer(64, 3, 4, 16, patch=4, classes=CLASSES), "images", 64, patches=True),
    "conv": Task(lambda: Convolutional(32, CLASSES), "images", 64),
    "autoencoder": Task(Autoencoder, "images", 64),
}

adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95), eps=1e-8, weight_decay=WEIGHT_DECAY)
OF_TORCH: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": adamw,
    "muon": partial(torch.optim.Muon, weight_decay=WEIGHT_DECAY),
}
# Adam's direction has decays 0.9 and 0.95 and no bias correction; it is orthogonalized and normalized.
BY_HAND = HAND_SET | {"adam-orthogonalized": partial(hand_set, {"scaled_momentum": (1.0,)}, "Adam's direction")}
BASELINES = ("adamw", "muon", "hand-momentum", "hand-nesterov", "adam-orthogonalized")  # without --baselines
# Where the search for a learning rate starts. An update of the rules has RMS 1; Muon's singular values are 1, so that its RMS is
# about width ** -0.5.
FIRST_LR = {"muon": 0.02}
USUAL_FIRST_LR = 2e-3
# A step shrinks a weight by the share lr * weight_decay, and Muon's lr is ten times a rule's. With the rules' decay, Muon is
# 0.025 worse after 1,500 steps of `gpt` (docs/long-runs.md).
FIRST_WEIGHT_DECAY = {"muon": 0.03}


def build_optimizers(
    optimizer: str | Rule,
    network: Network,
    lr: float,
    adamw_lr: float = ADAMW_LR,
    ns_dtype: torch.dtype | None = None,
    weight_decay: float = WEIGHT_DECAY,
) -> list[torch.optim.Optimizer]:
    """The optimizers of a network: `optimizer` (of `optimizer_of`) for the hidden matrices, AdamW at `adamw_lr` for the rest.

    A rule of Celo2-base takes every parameter. `ns_dtype` is that of the rules' Newton–Schulz; torch's Muon has bfloat16 always.
    """
    boundary = {id(p) for module in network.boundary for p in module.parameters()}
    hidden = [p for p in network.parameters() if p.ndim == 2 and id(p) not in boundary]
    rest = [p for p in network.parameters() if p.ndim != 2 or id(p) in boundary]
    if isinstance(optimizer, str):
        of_hidden = OF_TORCH[optimizer](hidden, lr=lr, weight_decay=weight_decay)
        return [of_hidden, adamw(rest, lr=adamw_lr, weight_decay=weight_decay)]
    if optimizer.variant == "celo2-base":
        groups = [{"params": hidden + rest, "update": "celo2"}]
        return [Celo2(groups, lr=lr, rule=optimizer, orthogonalize=False, weight_decay=weight_decay)]
    celo2 = Celo2(hidden, lr=lr, rule=optimizer, weight_decay=weight_decay, ns_dtype=ns_dtype)
    return [celo2, adamw(rest, lr=adamw_lr, weight_decay=weight_decay)]


def optimizer_of(name: str) -> str | Rule:
    """The optimizer of a name: a key of OF_TORCH itself, or else the rule of a hand-set baseline, of a name or of a file.

    Raises:
        RuleError: as `load_rule`.
    """
    if name in OF_TORCH:
        return name
    return BY_HAND[name]() if name in BY_HAND else load_rule(name)


def content_of(optimizer: str | Rule) -> str | None:
    """A digest of what a rule computes, independent of its name and place; None for an optimizer without a rule."""
    if isinstance(optimizer, str):
        return None
    digest = hashlib.sha256(repr(sorted(optimizer.settings().items())).encode())
    for key in sorted(optimizer.weights):
        digest.update(key.encode() + optimizer.weights[key].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def digest_of(data: Batch | Tensor) -> str:
    """A digest of a text or of images."""
    digest = hashlib.sha256()
    for part in [data] if isinstance(data, Tensor) else data:
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()[:16]


def train(
    task: Task,
    data: Batch | Tensor,
    optimizer: str | Rule,
    lr: float,
    seed: int,
    steps: int,
    device: str = "cpu",
    precision: str = "fp32",
    adamw_lr: float = ADAMW_LR,
    weight_decay: float = WEIGHT_DECAY,
    final: float = FINAL,
    validation_batches: int = VALIDATION_BATCHES,
) -> dict[str, object]:
    """One training run: its validation loss at the end (infinite: diverged), and the means of its training losses in 20 parts.

    The learning rates warm up and follow a cosine down to `final` of their peak. With `precision` "bf16" the forward pass runs
    under torch's autocast and Newton–Schulz in bfloat16.
    """
    torch.manual_seed(seed)
    network = task.build().to(device)  # drawn on the CPU: the same weights on every device
    bf16 = precision == "bf16"
    optimizers = build_optimizers(optimizer, network, lr, adamw_lr, torch.bfloat16 if bf16 else None, weight_decay)
    autocast = partial(torch.autocast, device, torch.bfloat16, enabled=bf16)
    schedules = [LambdaLR(part, lambda step: warm_up_and_cosine(step, steps, final)) for part in optimizers]
    curve: list[float] = []
    for x, y in batches(task, data, "training", seed, steps, device):
        with autocast():
            loss = network.loss(x, y)
        if not loss.isfinite():
            return {"loss": math.inf, "curve": curve}
        curve.append(loss.item())
        for part in optimizers:
            part.zero_grad()
        loss.backward()
        for part, schedule in zip(optimizers, schedules, strict=True):
            part.step()
            schedule.step()
    with torch.no_grad(), autocast():
        losses = [network.loss(x, y).item() for x, y in batches(task, data, "validation", 0, validation_batches, device)]
    parts = [float(np.mean(part)) for part in np.array_split(curve, min(20, len(curve)))]
    return {"loss": float(np.mean(losses)), "curve": parts}


def batches(task: Task, data: Batch | Tensor, split: str, seed: int, count: int, device: str) -> Iterator[Batch]:
    """`count` random batches of the training or the validation part of the data, a function of (split, seed), on `device`."""
    rng = np.random.default_rng([seed, split == "validation"])
    total = len(data) if task.data == "text" else len(data[0])
    border = round(total * (1 - VALIDATION_SHARE))
    low, high = (0, border) if split == "training" else (border, total)
    for _ in range(count):
        if task.data == "text":
            starts = torch.from_numpy(rng.integers(low, high - task.context, task.batch))
            window = data[starts[:, None] + torch.arange(task.context + 1)].long().to(device)  # (B, T + 1)
            yield window[:, :-1], window[:, 1:]
        else:
            rows = torch.from_numpy(rng.integers(low, high, task.batch))
            x, y = data[0][rows], data[1][rows]
            if task.patches:  # (B, 64) to sixteen patches of 2 × 2
                x = x.view(-1, 4, 2, 4, 2).transpose(2, 3).reshape(len(x), 16, 4)
            yield x.to(device), y.to(device)


def text_of(path: str) -> Tensor:
    """The bytes of a text as uint8 (n,)."""
    raw = read_text(Path(path), least=round(1000 / VALIDATION_SHARE))
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy())


def images_of(source: str) -> Batch:
    """Pixels (N, 64) and labels (N,) of one data set, shuffled, so that no split holds one class only."""
    images = load_images([source])
    if len(images.names) != 1:
        raise ConfigError(f"images {source}: {len(images.names)} data sets, expected one: {source}:{images.names[0]}")
    pixels, labels = images.arrays
    if len(labels) * VALIDATION_SHARE < 1:
        least = round(1 / VALIDATION_SHARE)
        raise ConfigError(f"images {source}: {len(labels)}, expected at least {least}, to keep some for validation")
    order = np.random.default_rng(0).permutation(len(labels))
    return torch.from_numpy(pixels[order]), torch.from_numpy(labels[order])
