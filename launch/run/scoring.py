"""Log-probabilities of continuations under the model in training, and the tasks that use them.

A task runs on the first rank only, and asks for the scores of rows of tokens. The other ranks receive the rows and compute their
share. How rows are grouped into forward passes depends only on the rows, not on the number of ranks, and each pass runs on one
rank. So every score is the same, bit for bit, for any number of ranks.

Letters: N rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from configs.load import ConfigError
from data import first_line
from data.batches import IGNORE
from launch.distributed.strategy import Strategy

LENGTH_MULTIPLE = 64  # rows of a pass are padded to a multiple of it, as matrix units and some architectures need


class Row(NamedTuple):
    """A sequence of tokens. The last `scored` of them are scored, each given all tokens before it."""

    tokens: np.ndarray  # (T,) int32
    scored: int


# rows -> (N, 2) float64: the log-probability in nats, and 1 if every scored token is the most likely one
Ask = Callable[[Sequence[Row]], Tensor]


class Task(Protocol):
    """A downstream task."""

    name: str  # as in the configuration

    def __call__(self, ask: Ask) -> Mapping[str, float]:
        """Run the task. Returns its metrics by their keys in metrics.jsonl."""


class Stopped(Exception):
    """A signal stopped the evaluation. It is raised on all ranks."""


def row(before: Sequence[int], after: Sequence[int], context: int) -> Row:
    """Return the row that scores `after` given `before`. If both are longer than the context, the start of `before` is cut off.

    Raises:
        ValueError: `before` or `after` is empty, or `after` is longer than the context.
    """
    if not before or not after:
        raise ValueError("no token to score, or none before it")
    if len(after) > context:
        raise ValueError(f"{len(after)} tokens to score, the context has {context}")
    return Row(np.array([*before, *after][-(context + 1) :], np.int32), len(after))


def passes_of(rows: Sequence[Row], tokens: int) -> list[tuple[list[int], int]]:
    """Group rows into forward passes, the longest rows first. Returns (row numbers, padded length T) of each pass.

    `tokens`: the most tokens in one pass; a pass of a single row may exceed it.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].tokens), i))
    passes, at = [], 0
    while at < len(order):
        length = -(-(len(rows[order[at]].tokens) - 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        together = max(1, tokens // length)
        passes.append((order[at : at + together], length))
        at += together
    return passes


class Scorer:
    """Scores rows with the model of a strategy.

    Args:
        strategy: holds the model.
        context: tokens of a training sequence.
        sequences: the most sequences of that length in a pass.
        padding: the token that fills up rows that are too short; no score depends on it.
        stopping: asked before every round of passes whether to stop; it gives the same answer on every rank.
        mark: the heartbeat's.
    """

    def __init__(
        self,
        strategy: Strategy,
        context: int,
        sequences: int,
        padding: int,
        stopping: Callable[[], bool],
        mark: Callable[[str], None],
    ) -> None:
        self.strategy, self.context, self.tokens, self.padding = strategy, context, sequences * context, padding
        self.stopping, self.mark = stopping, mark
        self.rank, self.world = strategy.accelerator.process_index, strategy.accelerator.num_processes
        self.scoring = False

    @torch.no_grad()
    def score(self, rows: Sequence[Row]) -> Tensor:
        """Return the scores (N, 2) of `rows`, on the CPU. Every rank must call it with the same rows.

        Raises:
            Stopped: on every rank.
        """
        self.scoring = True
        device = self.strategy.accelerator.device
        scores = torch.zeros((len(rows), 2), dtype=torch.float64, device=device)
        passes = passes_of(rows, self.tokens)
        for first in range(0, len(passes), self.world):
            self.mark("evaluation of a task")
            if self.stopping():
                raise Stopped
            own = first + self.rank
            numbers, length = passes[min(own, len(passes) - 1)]  # every rank runs a pass, because a sharded model needs all ranks
            found = self.strategy.loss(*self.batch([rows[i] for i in numbers], length), by_row=True)
            if own < len(passes):
                scores[torch.tensor(numbers, device=device)] = found.double()
        found = self.strategy.accelerator.reduce(scores, "sum").cpu()  # each score is non-zero on one rank only
        self.scoring = False
        return found

    def batch(self, rows: Sequence[Row], length: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (N, `length`)."""
        length = min(length, self.context)
        inputs = torch.full((len(rows), length), self.padding, dtype=torch.int64)
        targets = torch.full((len(rows), length), IGNORE, dtype=torch.int64)
        for i, (tokens, scored) in enumerate(rows):
            end = len(tokens) - 1
            inputs[i, :end] = torch.from_numpy(tokens[:-1])
            targets[i, end - scored : end] = torch.from_numpy(tokens[-scored:])
        return inputs, targets

    def run_tasks(self, tasks: Sequence[Task]) -> dict[str, float]:
        """Run all tasks. Returns their metrics on every rank. Every rank must call it; only the first rank's `tasks` are used.

        Raises:
            Stopped: on every rank.
            ConfigError: on every rank, for a task that fails.
        """
        if self.rank == 0:
            kind, value = self._run_tasks(tasks)
            self._from_first((kind, value))
        else:
            while (heard := self._from_first(None))[0] == "rows":
                self.score(heard[1])
            kind, value = heard
        if kind == "error":
            raise ConfigError(value)
        return value

    def _run_tasks(self, tasks: Sequence[Task]) -> tuple[str, Any]:
        def ask(rows: Sequence[Row]) -> Tensor:
            self._from_first(("rows", list(rows)))
            return self.score(rows)

        numbers: dict[str, float] = {}
        for task in tasks:
            try:
                numbers |= task(ask)
            except Exception as error:  # the other ranks wait for rows, so that they must be told of any error
                if self.scoring:  # they are in `score`, too, and raise the same
                    raise
                return "error", f"{task.name}: {first_line(error)}"
        return "numbers", numbers

    def _from_first(self, value: Any) -> Any:
        self.mark("the first rank's part of a task is done")  # if it hangs, the first rank has fewer marks than the others
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]
