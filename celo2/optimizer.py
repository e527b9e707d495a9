"""`Celo2`, the rule as a `torch.optim.Optimizer`: state, param groups, and AdamW for what the rule does not take."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from celo2.blocked import Passes
from celo2.distributed.collectives import broadcast_by_owner_
from celo2.distributed.owners import orthogonalized_by_owners, orthogonalized_over
from celo2.distributed.plan import Entry, Replicas, fingerprint, gather_ranges, make_plan
from celo2.distributed.shard import ShardingError, local_shard_of
from celo2.layout import local, matrix_count, stacked_shape
from celo2.orthogonalize import newton_schulz_flops
from celo2.rule import Rule
from celo2.rule_files import load_rule
from celo2.state import check_keys, check_options, check_parameter, keeping_dtypes, new_state
from celo2.step import Context, Work, orthogonalized_here, passes_for


class Celo2(torch.optim.Optimizer):
    r"""Celo2: a learned update for hidden matrices, AdamW for everything else, decoupled weight decay for both.

    Source: Moudgil, Knyazev, Belilovsky, "Celo2: Towards Learned Optimization Free Lunch", ICLR 2026, arXiv 2602.19142.
    One step on a matrix `W` with the learned direction `u` (orthogonalized, RMS 1) is `W <- W - lr (u + weight_decay W)`, so
    `lr` is the RMS change of a weight in one step; language models want about 3e-4 to 1e-3.

    Args:
        params: parameters, or groups. Give a whole model as `celo2.param_groups(model, lr, adamw_lr, weight_decay)`: embeddings
            and the output projection have two axes as well, and only routing by module keeps them from the rule. A group may
            carry `lr`, `weight_decay`, `betas` and `eps` (for AdamW), `orthogonalize`, `matrices` (see `celo2.layout`) and
            `update`: "celo2" or "adamw". Without `update`, parameters with two or more axes take the rule and the others
            AdamW; a rule of the variant "celo2-base" takes them all.
        lr: learning rate of groups without their own; a float or a tensor of one element.
        rule: what `load_rule` accepts: a shipped name, a path, or a `Rule`.
        orthogonalize: Newton–Schulz (paper: Celo2); False leaves it out (Celo2-base). A base rule never orthogonalizes.
        weight_decay: decoupled decay λ of groups without their own.
        betas: β1 and β2 of AdamW.
        eps: ε of AdamW.
        ns_dtype: dtype of Newton–Schulz; None is float32 on CPU and bfloat16 elsewhere.
        state_dtype: dtype of the four numbers that a matrix under the rule has for every weight: torch.float32 (16 bytes) or
            torch.bfloat16 (8 bytes; rounded stochastically, see `celo2.rounding`). Everything else is float32.
        replicas: a process group whose ranks hold the same whole parameters and gradients (DDP): every matrix is
            orthogonalized by one of them and sent to the others.
        shard_state: with `replicas`, keep the state of a parameter on the one rank that updates it.

    Sharded parameters (see `celo2.distributed.shard`): DTensors of FSDP2 as they are; for DeepSpeed ZeRO see
    `celo2.distributed.deepspeed`. The first step compares the ranks and raises `ShardingError` on all of them if they disagree.

    State, allocated at construction, for a parameter of shape P and stacked shape S = (..., R, C) (see `celo2.layout`): by
    the rule, `momentum` (3, *P), `second_moment` P, and `row` and `col`, means over the longer and the shorter axis of a
    matrix, or `diag` (3, *P) for a vector; by AdamW `step`, `exp_avg`, `exp_avg_sq`. A matrix with bfloat16 state has `count`,
    int32 (), its steps so far. For a sharded parameter P is its local shard, and `count` is the same on all ranks. `row` and
    `col` cover all its matrices: every rank updates them for a split matrix; for a matrix that is whole on one rank, only that
    rank does.

    Raises:
        ValueError, TypeError: a bad option, naming the parameter group.
        RuleError: a rule that cannot be loaded.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor,
        rule: str | Path | Rule = "celo2",
        orthogonalize: bool = True,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        ns_dtype: torch.dtype | None = None,
        state_dtype: torch.dtype = torch.float32,
        replicas: dist.ProcessGroup | None = None,
        shard_state: bool = False,
    ) -> None:
        if state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype must be torch.float32 or torch.bfloat16, not {state_dtype}")
        if ns_dtype is not None and not ns_dtype.is_floating_point:
            raise ValueError(f"ns_dtype must be a float dtype, not {ns_dtype}")
        if shard_state and replicas is None:
            raise ValueError("shard_state=True needs replicas, the process group that the state is divided over")
        self.rule = load_rule(rule)
        self.ns_dtype = ns_dtype
        self.state_dtype = state_dtype
        self.replicas = Replicas(replicas, shard_state) if replicas is not None else None
        self.passes: Passes | None = None  # None: `celo2.step.passes_for` chooses; benchmarks and tests set them
        self.orthogonalized = 0  # matrices that this rank has orthogonalized so far
        self._rule_on: dict[torch.device, Rule] = {}
        self._entries: dict[Tensor, Entry] = {}  # found at the first step
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "betas": betas,
            "eps": eps,
            "update": None,
            "orthogonalize": orthogonalize,
            "matrices": None,
        }
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("rule", "ns_dtype", "state_dtype", "replicas", "passes", "orthogonalized")}
        return {**super().__getstate__(), **own, "_rule_on": {}, "_entries": {}}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check and add a group, and allocate its state."""
        where = f"parameter group {len(self.param_groups)}"
        if isinstance(param_group, dict):
            check_keys(param_group, where)
        count = len(self.param_groups)
        try:
            super().add_param_group(param_group)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{where}: {error}") from None
        group = self.param_groups[-1]
        group.pop("differentiable", None)  # a default that torch adds when an optimizer is copied or loaded
        try:
            check_options(group, where)
            for p in group["params"]:
                check_parameter(p, group, where)
        except (ValueError, TypeError):
            del self.param_groups[count:]
            raise
        self._entries = {}
        if self.replicas is not None:
            for by_rule in (True, False):
                params = [p for p in group["params"] if self.takes_rule(p, group) is by_rule]
                self.replicas.add(params, [self._cost(p, group) for p in params], "celo2" if by_rule else "adamw")
        for p in group["params"]:
            if self.replicas is None or self.replicas.keeps_state(p):
                self.state[p] = new_state(p, group, self.takes_rule(p, group), self.state_dtype)

    def takes_rule(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether the rule, and not AdamW, updates `p` of `group`."""
        if group["update"] is None:
            return len(local_shard_of(p).shape) >= 2 or self.rule.variant == "celo2-base"
        return group["update"] == "celo2"

    def _cost(self, p: Tensor, group: dict[str, Any]) -> float:
        shape = stacked_shape(p.shape, group["matrices"])
        if not self.takes_rule(p, group) or len(shape) < 2 or not self._orthogonalizes(group):
            return p.numel()
        return matrix_count(shape) * newton_schulz_flops(*shape[-2:])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_known()
        if not self._entries:
            self._entries = self._find_entries()
        work: dict[torch.device, Work] = defaultdict(Work)
        for index, group in enumerate(self.param_groups):
            by_rule: list[Tensor] = []
            by_adamw: list[Tensor] = []
            for p in group["params"]:
                if p.grad is None or not math.prod(self._entries[p].local_shard.shape):
                    continue
                if p.grad.is_sparse or p.grad.is_complex():
                    kind = "sparse" if p.grad.is_sparse else "complex"
                    raise RuntimeError(
                        f"parameter group {index}: {kind} gradient of shape {tuple(p.grad.shape)}; use a dense one"
                    )
                (by_rule if self._entries[p].by_rule else by_adamw).append(p)
            if counts := [self.state[p]["count"] for p in by_rule if "count" in self.state.get(p, ())]:
                torch._foreach_add_(counts, 1)
            adamw_(by_adamw, self.state, group, self.replicas)
            for p in by_rule:
                owner = 0 if self.replicas is None else self.replicas.owners[p]
                work[p.device].add(self._entries[p], self.state.get(p), group, self._orthogonalizes(group), owner)
        whole = orthogonalized_here
        if self.replicas is not None:
            whole = functools.partial(orthogonalized_by_owners, replicas=self.replicas)
        for device, of_device in work.items():
            context = Context(self._rule(device), self.passes or passes_for(device), self._ns_dtype(device))
            with torch.cuda.device_of(context.rule.weights["b0"]):  # kernels start on the current device
                of_device.update_(context, whole, orthogonalized_over)
            self.orthogonalized += context.orthogonalized
        return loss

    def _check_known(self) -> None:
        """Raise ShardingError for a parameter that did not come through `add_param_group`."""
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p not in self.state and (self.replicas is None or p not in self.replicas.owners):
                    raise ShardingError(
                        f"parameter group {index}: a tensor of shape {tuple(p.shape)} that nothing explains has replaced a "
                        "parameter that Celo2 was built with; for DeepSpeed ZeRO use celo2.distributed.deepspeed.ZeroClient"
                    )

    def _find_entries(self) -> dict[Tensor, Entry]:
        entries = []
        for index, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"parameter {i} of group {index}" for i in range(len(group["params"]))]
            for name, p in zip(names, group["params"], strict=True):
                by_rule = self.takes_rule(p, group)
                entries.append(Entry(name, p, local_shard_of(p), by_rule, self._orthogonalizes(group), group["matrices"]))
        if self.replicas is not None or not all(entry.local_shard.whole for entry in entries):
            recipe = fingerprint(self.rule, self.ns_dtype)
            if self.replicas is not None:
                gather_ranges(entries, self.replicas.group, recipe)
            make_plan(entries, recipe)
        return {entry.p: entry for entry in entries}

    def _orthogonalizes(self, group: dict[str, Any]) -> bool:
        return group["orthogonalize"] and self.rule.variant != "celo2-base"

    def _ns_dtype(self, device: torch.device) -> torch.dtype:
        return self.ns_dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)

    def _rule(self, device: torch.device) -> Rule:
        if device not in self._rule_on:
            self._rule_on[device] = self.rule.to(device)
        return self._rule_on[device]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state; unlike torch's own, the state keeps its dtype, whatever the parameters' or the saved one is.

        Saved float32 accumulators are rounded to nearest where this optimizer has bfloat16 ones, whose `count` starts again;
        saved bfloat16 ones become float32 as they are.

        Raises:
            ValueError: groups, state names or shapes that do not fit this optimizer, naming the parameter group.
        """
        with keeping_dtypes(self):
            super().load_state_dict(state_dict)


def adamw_(
    params: Sequence[Tensor], state: Mapping[Tensor, dict[str, Tensor]], group: Mapping[str, Any], replicas: Replicas | None
) -> None:
    """torch's own fused AdamW, in place; parameters of lower precision are updated in the state's precision and rounded once."""
    mine = [p for p in params if replicas is None or replicas.keeps_state(p)]
    if mine:
        states = [state[p] for p in mine]
        # The fused kernel walks storage: every tensor must be contiguous, as the state is.
        weights = [local(p).to(s["exp_avg"].dtype).contiguous() for p, s in zip(mine, states, strict=True)]
        adamw(
            weights,
            [local(p.grad).to(w.dtype).contiguous() for p, w in zip(mine, weights, strict=True) if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for p, weight in zip(mine, weights, strict=True):
            if weight is not local(p):
                local(p).copy_(weight.view(local(p).shape))
    if params and replicas is not None and replicas.shard_state:
        broadcast_by_owner_(params, replicas.owners, replicas.group)
