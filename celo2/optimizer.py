"""`Celo2`, the rule as a `torch.optim.Optimizer`: state, param groups, checks, and AdamW for what the rule does not take."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from celo2 import matrices
from celo2.blocked import Stack, batches, directions_
from celo2.orthogonalize import newton_schulz
from celo2.rule import RMS_EPS, Rule, accumulator_shapes, update
from celo2.weights import load_rule

UPDATES = ("celo2", "adamw")
GROUP_KEYS = ("params", "param_names", "lr", "weight_decay", "betas", "eps", "update", "orthogonalize", "matrices")
SCHEDULER_KEYS = (
    "initial_lr",
    "max_lr",
    "min_lr",
    "swa_lr",
    "base_momentum",
    "max_momentum",
)  # torch's schedulers write them

# Newton–Schulz takes matrices of one shape together, up to this many elements (64 MB in float32) or one matrix.
BATCH_ELEMENTS = 1 << 24


class Celo2(torch.optim.Optimizer):
    r"""Celo2: a learned update for hidden matrices, AdamW for everything else, decoupled weight decay for both.

    Source: Moudgil, Knyazev, Belilovsky, "Celo2: Towards Learned Optimization Free Lunch", ICLR 2026, arXiv 2602.19142.
    One step on a matrix `W` with the learned direction `u` (orthogonalized, RMS 1) is `W <- W - lr (u + weight_decay W)`, so
    `lr` is the RMS change of a weight in one step; language models want about 3e-4 to 1e-3.

    Args:
        params: parameters, or groups. Give a whole model as `celo2.param_groups(model, lr, adamw_lr, weight_decay)`: embeddings
            and the output projection have two axes as well, and only routing by module keeps them from the rule. A group may
            carry `lr`, `weight_decay`, `betas` and `eps` (for AdamW), `orthogonalize`, `matrices` (see `celo2.matrices`) and
            `update`: "celo2" or "adamw". Without `update`, parameters with two or more axes take the rule and the others
            AdamW; a rule of the variant "celo2-base" takes them all.
        lr: learning rate of groups without their own; a float or a tensor of one element.
        rule: what `load_rule` accepts: a shipped name, a path, or a `Rule`.
        orthogonalize: Newton–Schulz (paper: Celo2); False leaves it out (Celo2-base). A base rule never orthogonalizes.
        weight_decay: decoupled decay λ of groups without their own.
        betas: β1 and β2 of AdamW.
        eps: ε of AdamW.
        ns_dtype: dtype of Newton–Schulz; None is float32 on CPU and bfloat16 elsewhere.
        state_dtype: dtype of the accumulators: torch.float32.

    State, allocated at construction, for a parameter of stacked shape S (see `celo2.matrices`): by the rule, `momentum`
    (3, *S), `second_moment` S, and `row` and `col`, or `diag` (3, *S) for a vector; by AdamW `step`, `exp_avg`, `exp_avg_sq`.

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
    ) -> None:
        if state_dtype is not torch.float32:
            raise ValueError(f"state_dtype must be torch.float32, not {state_dtype}")
        if ns_dtype is not None and not ns_dtype.is_floating_point:
            raise ValueError(f"ns_dtype must be a float dtype, not {ns_dtype}")
        self.rule = load_rule(rule)
        self.ns_dtype = ns_dtype
        self.state_dtype = state_dtype
        self._rule_on: dict[torch.device, Rule] = {}
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
        own = {name: getattr(self, name) for name in ("rule", "ns_dtype", "state_dtype")}
        return {**super().__getstate__(), **own, "_rule_on": {}}

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
        for p in group["params"]:
            self._allocate(p, group)

    def takes_rule(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether the rule, and not AdamW, updates `p` of `group`."""
        if group["update"] is None:
            return p.ndim >= 2 or self.rule.variant == "celo2-base"
        return group["update"] == "celo2"

    def _allocate(self, p: Tensor, group: dict[str, Any]) -> None:
        if self.takes_rule(p, group):
            shape = matrices.stacked_shape(p.shape, group["matrices"])
            shapes = accumulator_shapes(shape, matrices.stacked_axes(shape, group["matrices"]))
        else:
            shapes = {"step": (), "exp_avg": tuple(p.shape), "exp_avg_sq": tuple(p.shape)}
        dtype = torch.promote_types(p.dtype, torch.float32) if "step" in shapes else self.state_dtype
        self.state[p] = {
            name: torch.zeros(s, dtype=torch.float32 if name == "step" else dtype, device=p.device) for name, s in shapes.items()
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None and p.numel()]
            for p in params:
                if p.grad.is_sparse or p.grad.is_complex():
                    kind = "sparse" if p.grad.is_sparse else "complex"
                    raise RuntimeError(
                        f"parameter group {index}: {kind} gradient of shape {tuple(p.grad.shape)}; use a dense one"
                    )
            by_rule = [p for p in params if self.takes_rule(p, group)]
            taken = set(by_rule)
            self._step_adamw([p for p in params if p not in taken], group)
            self._step_rule(by_rule, group)
        return loss

    def _step_adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """torch's own fused AdamW; parameters of lower precision are updated in the state's precision and rounded once."""
        if not params:
            return
        states = [self.state[p] for p in params]
        # The fused kernel walks storage: every tensor must be contiguous, as the state is.
        weights = [p.to(s["exp_avg"].dtype).contiguous() for p, s in zip(params, states, strict=True)]
        adamw(
            weights,
            [p.grad.to(w.dtype).contiguous() for p, w in zip(params, weights, strict=True)],
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
        for p, weight in zip(params, weights, strict=True):
            if weight is not p:
                p.copy_(weight)

    def _step_rule(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """The rule: matrices of one shape together, everything that is no stack of plain matrices one by one."""
        layout = group["matrices"]
        buckets: dict[tuple, list[list[Tensor]]] = defaultdict(lambda: [[]])
        for p in params:
            shape = matrices.stacked_shape(p.shape, layout)
            axes = matrices.stacked_axes(shape, layout)
            if axes is None or min(axes) < len(shape) - 2:
                self._step_whole(p, group, axes)
                continue
            bucket = buckets[(p.device, *shape[-2:])]
            if bucket[-1] and sum(q.numel() for q in bucket[-1]) + p.numel() > BATCH_ELEMENTS:
                bucket.append([])
            bucket[-1].append(p)
        for (device, rows, cols), bucket in buckets.items():
            for batch in bucket:
                self._step_matrices(batch, group, device, rows, cols)

    def _step_matrices(self, params: list[Tensor], group: dict[str, Any], device: torch.device, rows: int, cols: int) -> None:
        """The blocked path: directions of all matrices (R, C) of `params`, orthogonalized together, then applied."""
        layout = group["matrices"]
        orthogonalize = self._orthogonalizes(group)
        dtype = self._ns_dtype(device) if orthogonalize else torch.float32
        weights = [matrices.stack(p, layout).reshape(-1, rows, cols) for p in params]  # each (N, R, C)
        stacks = [self._stack(p, w, layout) for p, w in zip(params, weights, strict=True)]
        for batch in batches(stacks, max(1, BATCH_ELEMENTS // (rows * cols))):
            counts = [len(s.w) for s in batch]
            u = torch.empty(sum(counts), rows, cols, dtype=dtype, device=device)
            directions_(self._rule(device), batch, u)
            if orthogonalize:
                u = newton_schulz(u)
            norm = torch.linalg.vector_norm(u, dim=(1, 2), keepdim=True, dtype=torch.float32)  # (N, 1, 1)
            scale = (norm.square() / (rows * cols) + RMS_EPS).rsqrt()
            for s, n_u, n_scale in zip(batch, u.split(counts), scale.split(counts), strict=True):
                apply_(s.w, n_u * n_scale, group)
        for p, w in zip(params, weights, strict=True):
            matrices.unstack_(p, w, layout)

    def _step_whole(self, p: Tensor, group: dict[str, Any], axes: tuple[int, int] | None) -> None:
        """The reference path: vectors, and batches of matrices whose second moment is factored over a batch axis."""
        w, g = p if p.ndim else p.view(1), p.grad if p.ndim else p.grad.view(1)
        u = update(
            self._rule(p.device),
            self.state[p],
            g.float(),
            w.float(),
            orthogonalize=self._orthogonalizes(group),
            ns_dtype=self._ns_dtype(p.device),
            axes=axes,
        )
        apply_(w, u, group)

    def _stack(self, p: Tensor, w: Tensor, layout: matrices.Layout | None) -> Stack:
        """`p`, seen as w (N, R, C), with its gradient and accumulators."""
        state = self.state[p]
        row, col = state["row"], state["col"]
        return Stack(
            g=matrices.stack(p.grad, layout).reshape(w.shape),
            w=w,
            m=state["momentum"].view(3, *w.shape).transpose(0, 1),
            v=state["second_moment"].view(w.shape),
            row=row.view(3, len(w), row.shape[-1]).transpose(0, 1),
            col=col.view(3, len(w), col.shape[-1]).transpose(0, 1),
        )

    def _orthogonalizes(self, group: dict[str, Any]) -> bool:
        return group["orthogonalize"] and self.rule.variant != "celo2-base"

    def _ns_dtype(self, device: torch.device) -> torch.dtype:
        return self.ns_dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)

    def _rule(self, device: torch.device) -> Rule:
        if device not in self._rule_on:
            self._rule_on[device] = self.rule.to(device)
        return self._rule_on[device]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state; unlike torch's own, the state keeps its dtype, whatever the parameters' is.

        Raises:
            ValueError: groups, state names or shapes that do not fit this optimizer, naming the parameter group.
        """
        saved: dict[int, dict[str, Any]] = {}

        def check(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            check_saved_state(self, state_dict)
            ids = [i for group in state_dict["param_groups"] for i in group["params"]]
            saved.update((j, state_dict["state"][i]) for j, i in enumerate(ids))
            return {**state_dict, "state": {}}

        def restore(optimizer: torch.optim.Optimizer) -> None:
            optimizer.state = own
            for group in optimizer.param_groups:
                if group["matrices"] is not None:
                    group["matrices"] = matrices.as_layout(group["matrices"])
                group["betas"] = tuple(group["betas"])
            for p, values in zip(ordered, saved.values(), strict=True):
                for name, value in values.items():
                    own[p][name].copy_(value)

        own = self.state
        ordered = [p for group in self.param_groups for p in group["params"]]
        hooks = [  # `check` after the user's pre-hooks, which may adapt what is saved; `restore` before the user's post-hooks
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def apply_(w: Tensor, u: Tensor, group: dict[str, Any]) -> None:
    """Step 10, in place: `W <- W - lr (u + weight_decay W)`, in float32 whatever the dtype of w (same shape as u)."""
    lr, weight_decay = group["lr"], group["weight_decay"]
    updated = w.to(torch.promote_types(w.dtype, torch.float32)).mul_(1 - lr * weight_decay).sub_(u.mul_(lr))
    if updated is not w:
        w.copy_(updated)


def check_keys(group: dict[str, Any], where: str) -> None:
    """Raise ValueError for a group key that means nothing here."""
    for key in group:
        if key not in GROUP_KEYS + SCHEDULER_KEYS:
            near = difflib.get_close_matches(key, GROUP_KEYS, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; known keys are {', '.join(GROUP_KEYS)}"
            raise ValueError(f"{where}: unknown key '{key}'{hint}")


def check_options(group: dict[str, Any], where: str) -> None:
    """Raise ValueError for an option of a group that is out of range; layouts become tuples."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"{where}: lr as a tensor must have one element, not {lr.numel()}")
    for name in ("lr", "weight_decay", "eps"):
        if not isinstance(group[name], (Real, Tensor)) or not float(group[name]) >= 0:
            raise ValueError(f"{where}: {name} must be a number of at least 0, not {group[name]!r}")
    if not isinstance(group["orthogonalize"], bool):
        raise ValueError(f"{where}: orthogonalize must be True or False, not {group['orthogonalize']!r}")
    betas = group["betas"] if isinstance(group["betas"], (tuple, list)) else ()
    if len(betas) != 2 or not all(isinstance(beta, (Real, Tensor)) and 0 <= beta < 1 for beta in betas):
        raise ValueError(f"{where}: betas must be two numbers in [0, 1), not {group['betas']}")
    if group["update"] not in (None, *UPDATES):
        raise ValueError(f"{where}: unknown update '{group['update']}', expected one of {', '.join(UPDATES)}")
    if group["matrices"] is not None:
        try:
            group["matrices"] = matrices.as_layout(group["matrices"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def check_parameter(p: Tensor, group: dict[str, Any], where: str) -> None:
    """Raise for a parameter that neither update can take, or that the group's layout does not fit."""
    if not p.is_floating_point():
        raise TypeError(f"{where}: a parameter of shape {tuple(p.shape)} is {p.dtype}; only real float parameters can be updated")
    layout = group["matrices"]
    if layout is not None and torch.Size(layout[0]).numel() != p.numel():
        raise ValueError(f"{where}: matrices {layout} do not fit a parameter of shape {tuple(p.shape)}")


def check_saved_group(group: dict[str, Any], saved: dict[str, Any], where: str) -> None:
    """Raise ValueError if a saved group has other keys, options out of range, or parameters that do not fit `group`."""
    check_keys(saved, where)
    missing = [key for key in GROUP_KEYS if key in group and key not in saved and key != "param_names"]
    if missing:
        raise ValueError(f"{where}: the saved group lacks {', '.join(missing)}")
    if len(saved["params"]) != len(group["params"]):
        raise ValueError(f"{where}: {len(saved['params'])} parameters were saved, expected {len(group['params'])}")
    checked = dict(saved)
    check_options(checked, where)
    for p in group["params"]:
        check_parameter(p, checked, where)


def check_saved_state(optimizer: Celo2, state_dict: dict[str, Any]) -> None:
    """Raise ValueError if the saved groups and state do not fit; torch itself checks the number and size of groups."""
    groups = zip(optimizer.param_groups, state_dict["param_groups"], strict=False)
    if len(optimizer.param_groups) != len(state_dict["param_groups"]):
        counts = f"{len(state_dict['param_groups'])} parameter groups, expected {len(optimizer.param_groups)}"
        raise ValueError(f"the saved state has {counts}")
    for index, (group, saved_group) in enumerate(groups):
        where = f"parameter group {index}"
        check_saved_group(group, saved_group, where)
        for p, key in zip(group["params"], saved_group["params"], strict=False):
            own, saved = optimizer.state[p], state_dict["state"].get(key, {})
            where = f"parameter group {index}, a parameter of shape {tuple(p.shape)}"
            if own.keys() != saved.keys():
                raise ValueError(f"{where}: saved state holds {sorted(saved)}, expected {sorted(own)}")
            for name, value in own.items():
                if value.shape != torch.as_tensor(saved[name]).shape:
                    shapes = f"{tuple(torch.as_tensor(saved[name]).shape)}, expected {tuple(value.shape)}"
                    raise ValueError(f"{where}: saved {name} has shape {shapes}")
