"""Diagnostics of a training run. Without one of the options below, this module does nothing.

`log.layers`: statistics of every layer. `log.profile`: a profile of some steps. `log.memory_snapshot`: a snapshot of GPU memory
when it runs out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from celo2 import Celo2
from celo2.distributed.collectives import add_up_, gather_objects
from celo2.orthogonalize import newton_schulz
from celo2.stack import local
from configs.load import ConfigError
from configs.schema import Config
from launch.distributed.birth import PIECE
from launch.distributed.gather import gather_whole, keeper_of, keeps_state
from launch.distributed.strategy import MicroBatches, Strategy
from launch.distributed.verification import whole_direction
from launch.private import dump_memory_history, record_memory_history
from launch.run.attention import AttentionLogits
from launch.run.schedule import due
from launch.run.summary import warning

DIRECTIONS = 3  # hidden matrices whose singular values are logged: the first, the middle one and the last
MEMORY_SNAPSHOT = "memory_rank_{rank}.pickle"  # https://pytorch.org/memory_viz shows it


class Diagnostics:
    """Observes the steps of a strategy.

    As a context manager around the training loop, it ends a profile, and writes the memory snapshot after an out-of-memory error.

    The statistics of a layer are exact under every strategy, because sums over local shards are added up over the ranks. At a
    step with statistics, each rank copies the weights that it updates, and all ranks run one more forward pass of the step's
    batch, without dropout.
    """

    def __init__(self, config: Config, strategy: Strategy, run_dir: Path, say: Callable[[str], None]) -> None:
        """`say` shows a warning to a person."""
        self.config, self.strategy, self.run_dir, self.say = config, strategy, run_dir, say
        self.rank = strategy.accelerator.process_index
        self.profile: Any = None
        self.before: dict[str, Tensor] = {}  # this rank's weights before the step
        self.gradients: dict[str, Tensor] = {}  # sums of squares of this rank's gradients
        self.whole: dict[str, dict[str, Tensor]] = {}  # whole tensors from which the chosen directions are computed
        self.attention: dict[str, float] = {}
        self.begun = False  # whether this process has begun a step
        if config.log.layers:
            strategy.optimizer.register_step_pre_hook(self._look)
        if config.log.memory_snapshot:
            record_memory_history()

    def begin(self, step: int, micro_batches: MicroBatches) -> None:
        """Prepare for step `step`, counted from 1, before it computes the gradient on this rank's `micro_batches`."""
        first, last = self.config.log.profile or (0, 0)
        if self.profile is not None and step > last:
            self._end_profile()
        if self.profile is None and first <= step <= last:
            on_gpu = [ProfilerActivity.CUDA] if self.strategy.device.type == "cuda" else []
            self.profile = profile(activities=[ProfilerActivity.CPU, *on_gpu])
            self.profile.start()
        self.before = {}
        if self.config.log.layers and (step == 1 or due(step, self.config.log.layers, self.config.train.steps)):
            self.before = {name: local(shard.weight).detach().clone() for name, shard in self.strategy.shards.items()}
            self.gradients, self.whole = {}, {}
            # DeepSpeed's stage 3 records the order of modules in the first forward pass of a process, so that pass must be a
            # training step's.
            early = self.config.distributed.strategy == "zero3" and not self.begun
            self.attention = {} if early else self._attention(micro_batches)
        self.begun = True

    def record(self, grad_norm: float) -> dict[str, float]:
        """Return the statistics of the last step; empty if it was not observed. Every rank must call it.

        `grad_norm` is the norm of the step's whole gradient before clipping.

        For each parameter: weight_norm, grad_norm (before clipping), update_norm and update_ratio, all from Frobenius norms. For
        each block: attention_logit, the largest of the batch. For some matrices: singular_before and singular_after, the
        largest, the median and the smallest singular value of the input (Frobenius norm 1) and the output of Newton–Schulz.
        """
        if not self.before:
            return {}
        squares = {}
        for name, shard in self.strategy.shards.items():
            before, after = self.before[name], local(shard.weight).detach()
            gradient = self.gradients.get(name, math.nan if not self.gradients else 0.0)
            moved = sum_of_squares(after, before)
            squares[name] = torch.stack([sum_of_squares(before), torch.as_tensor(gradient).to(moved), moved])
        self._add_up(squares)
        norms = {name: of_one.sqrt().tolist() for name, of_one in squares.items()}
        clipped = math.sqrt(sum(gradient**2 for _, gradient, _ in norms.values()))
        record = {}
        for name, (weight, gradient, update) in norms.items():
            record[f"weight_norm/{name}"] = weight
            record[f"grad_norm/{name}"] = gradient * grad_norm / clipped if clipped else gradient
            record[f"update_norm/{name}"] = update
            record[f"update_ratio/{name}"] = update / weight if weight else math.nan
        record |= {f"attention_logit/{name}": value for name, value in self.attention.items()}
        record |= self._singular_values()
        self.before = {}
        return record

    @torch.no_grad()
    def _look(self, *_: object) -> None:
        """Record gradients. Called before each step of the optimizer, when they are averaged and clipped."""
        if not self.before:
            return
        for name, shard in self.strategy.shards.items():
            if shard.weight.grad is not None:
                self.gradients[name] = sum_of_squares(local(shard.weight.grad))
        for name in self._chosen():
            shard, optimizer = self.strategy.shards[name], self.strategy.optimizer
            here = self.rank == 0 or not shard.local_shard.whole or keeper_of(self.strategy, shard) is not None
            if shard.weight.grad is None or not keeps_state(self.strategy, shard) or not here:
                continue
            values = {"weight": shard.weight.detach(), "gradient": shard.weight.grad, **optimizer.state.get(shard.weight, {})}
            found = gather_whole(self.strategy, shard, values, self._group(name)["matrices"])
            if found:
                self.whole[name] = {key: value.clone() for key, value in found.items()}

    def _chosen(self) -> list[str]:
        """Return the names of the hidden matrices to observe; none if the optimizer is not Celo2 or does not orthogonalize."""
        names = list(self.strategy.hidden) if isinstance(self.strategy.optimizer, Celo2) else []
        return sorted({names[i * (len(names) - 1) // (DIRECTIONS - 1)] for i in range(DIRECTIONS)}) if names else []

    def _group(self, name: str) -> dict[str, Any]:
        weight = self.strategy.shards[name].weight
        return next(group for group in self.strategy.optimizer.param_groups if any(p is weight for p in group["params"]))

    def _singular_values(self) -> dict[str, float]:
        """Return the singular values for the first matrix of each chosen parameter, on every rank."""
        found: dict[str, float] = {}
        for name, values in self.whole.items():
            shape = self.strategy.shards[name].local_shard.shape
            count = values["count"] + 1 if "count" in values else None
            u = whole_direction(self.strategy.optimizer, self._group(name), shape, values, count, orthogonalize=False)
            matrix = u.reshape(-1, *u.shape[-2:])[0]
            matrix = matrix / torch.linalg.matrix_norm(matrix)
            finite = bool(matrix.isfinite().all())  # torch raises an error for numbers that are not finite
            for when, tensor in (("before", matrix), ("after", newton_schulz(matrix))):
                singular = torch.linalg.svdvals(tensor) if finite else tensor.new_full((1,), math.nan)  # in descending order
                for word, value in (("max", singular[0]), ("median", singular[len(singular) // 2]), ("min", singular[-1])):
                    found[f"singular_{when}/{name}/{word}"] = value.item()
        if self.strategy.world > 1:
            for others in gather_objects(found, dist.group.WORLD):  # type: ignore[arg-type]
                found |= others
        return dict(sorted(found.items()))

    def _add_up(self, squares: dict[str, Tensor]) -> None:
        """Add up, in place, the sums of sharded parameters over the ranks that hold the shards."""
        groups = {s.local_shard.group for s in self.strategy.shards.values() if s.local_shard.group is not None}
        for group in sorted(groups, key=dist.get_process_group_ranks):
            names = [name for name, shard in self.strategy.shards.items() if shard.local_shard.group is group]
            add_up_([squares[name] for name in names], group)

    @torch.no_grad()
    def _attention(self, micro_batches: MicroBatches) -> dict[str, float]:
        """Return the largest attention logit of every block over the whole batch of the step."""
        strategy = self.strategy
        strategy.loss_model.eval()
        logits = AttentionLogits(strategy.model, strategy.device)
        with ExitStack() as stack, torch.compiler.set_stance("force_eager"):
            stack.callback(strategy.loss_model.train)
            stack.enter_context(logits)
            for inputs, targets in micro_batches:
                strategy.loss(inputs, targets)
        if strategy.world > 1:
            dist.all_reduce(logits.largest, dist.ReduceOp.MAX)
        found = {name: value for name, value in zip(logits.names, logits.largest.tolist(), strict=True) if value != -math.inf}
        if not found:
            raise ConfigError(
                f"log.layers: the attention of {type(strategy.model).__name__} cannot be observed; it must call "
                "scaled_dot_product_attention or softmax (model.hf.attn_implementation=sdpa)"
            )
        return found

    def _end_profile(self) -> None:
        ended, self.profile = self.profile, None
        ended.stop()
        folder = self.run_dir / "profile"
        with warning("no profile", self.say):
            folder.mkdir(parents=True, exist_ok=True)
            ended.export_chrome_trace(str(folder / f"rank_{self.rank}.json.gz"))
            by = "self_device_time_total" if self.strategy.device.type == "cuda" else "self_cpu_time_total"
            table = ended.key_averages().table(sort_by=by, row_limit=40)
            (folder / f"rank_{self.rank}.txt").write_text(table, encoding="utf-8")

    def __enter__(self) -> Diagnostics:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self.profile is not None:
            self._end_profile()
        if self.config.log.memory_snapshot and isinstance(error, torch.OutOfMemoryError):
            with warning("no snapshot of the memory", self.say):
                dump_memory_history(self.run_dir / MEMORY_SNAPSHOT.format(rank=self.rank))


def sum_of_squares(values: Tensor, less: Tensor | None = None) -> Tensor:
    """Return the sum of the squares of `values`, or of `values - less`, in float64. It works in pieces to save memory."""
    pieces = values.reshape(-1).split(PIECE)
    others = [None] * len(pieces) if less is None else less.reshape(-1).split(PIECE)
    sums = [(p.double() if o is None else p.double() - o.double()).square().sum() for p, o in zip(pieces, others, strict=True)]
    return torch.stack(sums).sum()


def check_device(config: Config, on_gpu: bool) -> None:
    """Raise ConfigError for options of this module that the device does not support."""
    if config.log.memory_snapshot and not on_gpu:
        raise ConfigError("log.memory_snapshot needs a GPU, and this run has none")
