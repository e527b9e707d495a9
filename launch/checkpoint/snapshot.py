"""Copies this rank's part of a checkpoint to host memory. Training waits only for this copy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from launch.distributed.gather import Share, list_shares
from launch.distributed.host_group import HostGroup
from launch.distributed.strategy import Strategy


class Snapshot(NamedTuple):
    """This rank's part of a checkpoint in host memory."""

    shares: list[Share]  # in order
    config: str  # config.json
    state: dict[str, Any]  # state.json
    host: HostGroup


def take_snapshot(strategy: Strategy, state: dict[str, Any], by_all: bool = True) -> Snapshot:
    """Copy this rank's weights and optimizer state. Every rank must call it after the same step; nothing is sent.

    `by_all`: every rank will write the tensors that it owns; if False, the first rank will write everything.
    """
    shares = list_shares(strategy, by_all)
    values = copy_to_host([share.value for share in shares if share.value is not None])
    shares = [share._replace(value=value) for share, value in zip(shares, values, strict=True)]
    if (average := strategy.average) is not None and average.begun:
        state = state | {"average": {"kind": average.options.kind, "members": int(average.members)}}
    return Snapshot(shares, strategy.model.config.to_json_string(use_diff=False), state, strategy.host)


def copy_to_host(tensors: list[Tensor]) -> list[Tensor]:
    """Return contiguous copies in CPU memory, which training does not change.

    Copies from a GPU go to pinned memory, one after another, and the host waits once. torch keeps that memory for the next time.
    """
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=t.device.type == "cuda") for t in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor.detach(), non_blocking=True)
    for device in {t.device for t in tensors if t.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()
    return copies
