"""`Celo2`, the rule as a `torch.optim.Optimizer`: state, param groups, and AdamW for parameters that the rule does not update."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp import is_autocast_available
from torch.optim.adamw import adamw

from celo2.blocked import Passes
from celo2.distributed.collectives import broadcast_by_owner_
from celo2.distributed.owners import orthogonalized_by_owners, orthogonalized_over
from celo2.distributed.plan import Entry, Replicas, check_explained
from celo2.groups import FLOATS, PLANNED, bad_gradient, check_capture, warn_of_unused, warn_of_variant
from celo2.kernels import passes_for
from celo2.rule import Rule
from celo2.stack import gate_of, local, local_gradient
from celo2.state import STATE_KEYS, Stateful
from celo2.step import Context, Work, orthogonalized_here


class Celo2(Stateful):
    r"""Celo2: a learned update for hidden matrices, AdamW for everything else, decoupled weight decay for both.

    Source: Moudgil, Knyazev, Belilovsky, "Celo2: Towards Learned Optimization Free Lunch", ICLR 2026, arXiv 2602.19142.
    One step on a matrix `W` with the learned direction `u` (orthogonalized, RMS 1) is `W <- W - lr (u + weight_decay W)`. So
    `lr` is the RMS change of a weight in one step; language models need about 3e-4 to 1e-3. A rule with step sizes scales `u`
    to an RMS other than 1 (docs/algorithm.md).

    Args:
        params: parameters, or param groups. For a whole model pass `celo2.param_groups(model, lr, adamw_lr, weight_decay)`:
            embeddings and the output projection have two axes too, and only routing by module keeps the rule from updating
            them. A group may set `lr`, `weight_decay`, `betas` and `eps` (for AdamW), `orthogonalize`, `matrices` (see
            `celo2.layout`) and `update`: "celo2" or "adamw". Without `update`, the rule updates parameters with two or more
            axes, and AdamW the others; a rule of the variant "celo2-base" updates them all.
        lr, weight_decay: defaults of the groups. lr is a float or a tensor of one element; weight_decay is the paper's λ.
        rule: what `load_rule` accepts: a shipped name, a path, `hub:OWNER/NAME`, or a `Rule`.
        orthogonalize: True runs Newton–Schulz (paper: Celo2), False skips it (Celo2-base). A celo2-base rule always skips it.
        betas, eps: β1, β2 and ε of AdamW.
        ns_dtype: dtype of Newton–Schulz; None means float32 on CPUs and bfloat16 on other devices.
        state_dtype: dtype of momentum and second moment, four numbers per weight of a matrix under the rule: torch.float32 (16
            bytes) or torch.bfloat16 (8 bytes; rounded stochastically, see `celo2.rounding`). All other state is float32.
        replicas: a process group whose ranks hold the same whole parameters and gradients (DDP). One of these ranks
            orthogonalizes each matrix and sends the result to the others.
        shard_state: with `replicas`, keep the state of a parameter only on the one rank that updates it.

    Sharded parameters (see `celo2.distributed.shard`): DTensors of FSDP2 work as they are; for DeepSpeed ZeRO see
    `celo2.distributed.deepspeed`. The first step compares the ranks and raises `ShardingError` on all of them if they disagree.
    The optimizer creates the state of a parameter (`celo2.state`) in the first step in which the parameter has a gradient.

    Raises:
        ValueError, TypeError: a bad option; the message names the parameter group.
        RuleError: the rule cannot be loaded.
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
        if ns_dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"ns_dtype must be a float dtype of 16, 32 or 64 bits, not {ns_dtype}")
        if shard_state and replicas is None:
            raise ValueError("shard_state=True needs replicas, the process group that the state is divided over")
        self.rule = rule  # the setter loads it
        self.ns_dtype = ns_dtype
        self.state_dtype = state_dtype
        self.replicas = Replicas(replicas, shard_state) if replicas is not None else None
        self.passes: Passes | None = None  # None: `passes_for` chooses the passes; benchmarks and tests set them
        self.orthogonalized, self._shapes = 0, []  # orthogonalized: how many matrices this rank has orthogonalized so far
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(params, defaults | {"update": None, "orthogonalize": orthogonalize, "matrices": None})
        warn_of_variant(params, self.rule)
        warn_of_unused(self)
        check_explained(self.param_groups, self._shapes)

    def __getstate__(self) -> dict[str, Any]:
        names = ("_rule", "ns_dtype", "state_dtype", "replicas", "passes", "orthogonalized", "_shapes")
        own = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), **own, "_rule_on": {}, "_plan_key": [], "_entries": {}}

    @torch._disable_dynamo  # torch.compile would need minutes for many small functions and save nothing
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, once; returns what `closure` returns.

        As with torch's fused optimizers, the attribute `found_inf`, float32 () on the device, skips the step where it is 1:
        weights and state keep their values, whatever the gradients are. The host never reads it.

        Raises:
            RuntimeError: a gradient is not a dense tensor of real floats, or this step cannot be captured in a CUDA graph.
            ShardingError, ValueError: ranks disagree, or groups, parameters or state were changed and no longer fit together.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            check_capture(self)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        work: dict[torch.device, Work] = defaultdict(Work)
        key = [(*map(g.get, PLANNED), *((id(p), p.shape) for p in g["params"])) for g in self.param_groups]
        if key != self._plan_key:  # the first step, or groups or parameters have changed
            self._plan_key, self._entries = key, self._plan()
        for group, entries in [(group, self._with_gradient(i, group)) for i, group in enumerate(self.param_groups)]:
            by_rule = [entry for entry in entries if entry.by_rule]
            if counts := [self.state[e.p]["count"] for e in by_rule if "count" in self.state.get(e.p, ())]:
                torch._foreach_add_(counts, 1 if found_inf is None else 1 - found_inf.to(counts[0]))
            adamw_([entry.p for entry in entries if not entry.by_rule], self.state, group, self.replicas, found_inf)
            if found_inf is not None:  # a skipped step computes a finite update and multiplies it by an lr of 0
                group = {**group, "lr": (1 - found_inf.to(getattr(group["lr"], "dtype", torch.float64))) * group["lr"]}
            orthogonalize = group["orthogonalize"] and self._rule.variant != "celo2-base"
            for entry in by_rule:
                owner = 0 if self.replicas is None else self.replicas.owners[entry.p]
                work[entry.p.device].add(entry, self.state.get(entry.p), group, orthogonalize, owner)
        whole_directions = orthogonalized_here
        if self.replicas is not None:
            whole_directions = functools.partial(orthogonalized_by_owners, replicas=self.replicas)
            self.replicas.consolidated = None
        for device, of_device in work.items():
            context = self._context(device, found_inf)
            autocast = torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()
            with torch.cuda.device_of(context.rule.weights["b0"]), autocast:  # kernels start on the current device
                of_device.update_(context, whole_directions, orthogonalized_over)
            self.orthogonalized += context.orthogonalized
        return loss

    def _with_gradient(self, index: int, group: dict[str, Any]) -> list[Entry]:
        """The entries of a group whose parameters have a gradient and are not empty; creates the state that they lack."""
        found = []
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.dtype not in FLOATS or p.grad.layout is not torch.strided:
                raise bad_gradient(index, group, p)
            entry, own = self._entries[p], [v for name, v in self.state.get(p, {}).items() if name in STATE_KEYS]
            if not own or any(value.device != p.device for value in own):
                self._make_state(entry)
            if 0 not in entry.local_shard.shape:
                found.append(entry)
        return found

    def _context(self, device: torch.device, found_inf: Tensor | None) -> Context:
        """The `Context` of a step on `device`; the rule is copied to the device once."""
        if device not in self._rule_on:
            self._rule_on[device], self._has_step_sizes = self._rule.to(device), self._rule.has_step_sizes
        ns_dtype = self.ns_dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        gate = None if found_inf is None else gate_of(found_inf, device)
        return Context(self._rule_on[device], self.passes or passes_for(device), ns_dtype, gate, self._has_step_sizes)


def adamw_(
    params: Sequence[Tensor], state: Mapping, group: Mapping[str, Any], replicas: Replicas | None, found_inf: Tensor | None
) -> None:
    """Update `params` by torch's fused AdamW, in the precision of the state; lower-precision parameters are rounded once."""
    mine = [p for p in params if replicas is None or replicas.keeps_state(p)]
    if mine:
        moments, squares, steps = ([local(state[p][name]) for p in mine] for name in ("exp_avg", "exp_avg_sq", "step"))
        # The fused kernel reads memory in order and ignores strides: every tensor must be contiguous, as the state is.
        weights = [local(p).to(moment.dtype).contiguous() for p, moment in zip(mine, moments, strict=True)]
        gradients = [local_gradient(p).to(w.dtype).contiguous() for p, w in zip(mine, weights, strict=True)]
        options: dict[str, Any] = {name: group[name] for name in ("lr", "weight_decay", "eps")} | {"found_inf": found_inf}
        options |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
        if isinstance(options["lr"], Tensor) and not options["lr"].is_cpu:
            options["lr"] = options["lr"].float()  # the fused kernel reads no other dtype there
        adamw(weights, gradients, moments, squares, [], steps, fused=True, amsgrad=False, maximize=False, **options)
        for p, weight in zip(mine, weights, strict=True):
            if weight is not local(p):
                local(p).copy_(weight.view(local(p).shape))
    if params and replicas is not None and replicas.shard_state:
        broadcast_by_owner_(params, replicas.owners, replicas.group)
