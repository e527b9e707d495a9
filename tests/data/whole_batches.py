"""Batches as one piece, to compare them."""

import torch


def whole(batches, step):
    """The global batch of a step: inputs, targets (B, T)."""
    return batches.micro_batches(step, 0, 1, batches.sizes.at(step))[0]


def join(micro_batches):
    return tuple(torch.cat(parts) for parts in zip(*micro_batches, strict=True))


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
