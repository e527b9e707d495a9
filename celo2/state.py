"""State of the optimizer: create it, save it, and load it without changing its dtypes. Errors name the parameter group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from celo2.distributed.consolidate import collect_divided, whole_state
from celo2.distributed.plan import Entry, Replicas, check_explained, fingerprint, make_plan
from celo2.distributed.shard import LocalShard, local_shard_of
from celo2.groups import GROUP_KEYS, add_checked, check_group, meant_by, names_of, places_by_name, unmatched_names
from celo2.layout import stacked_axes, stacked_shape
from celo2.older_state import upgraded, upgraded_pickle
from celo2.rule import Rule, accumulator_shapes
from celo2.rule_files import load_rule
from celo2.stack import is_dtensor, local
from celo2.whitening import WHITENERS

REPLICATED = ("row", "col", "step", "count", *WHITENERS)  # state that is not sharded like the weights
# All names of `state_form`; wrappers may store values under other names beside them.
STATE_KEYS = {"momentum", "second_moment", "diag", "exp_avg", "exp_avg_sq", *REPLICATED}


class Stateful(torch.optim.Optimizer):
    """The part of `Celo2` that checks groups, and creates, saves and loads state. A step uses it only if groups, parameters or
    state have changed."""

    _rule: Rule
    _rule_on: dict[torch.device, Rule]  # copies of the rule on the devices of the parameters
    _has_step_sizes: bool  # `Rule.has_step_sizes`, set when the rule is copied to a device
    ns_dtype: torch.dtype | None
    state_dtype: torch.dtype
    replicas: Replicas | None
    _plan_key: list[tuple]  # for each group the options and parameters that the current plan was made for
    _entries: dict[Tensor, Entry]  # the current plan
    _shapes: list[tuple[int, ...]]  # shapes of all parameters when they were added

    @property
    def rule(self) -> Rule:
        """The rule of the next step. It may be set between steps, to anything that `load_rule` accepts.

        The state is kept; after a change of decays it needs some steps to adapt. If the new rule needs state of another form,
        as one with whitening does, the next step raises ValueError, which says how to reset the state. Setting a rule of the
        other variant raises RuleError, because it needs other groups.
        """
        return self._rule

    @rule.setter
    def rule(self, rule: str | Path | Rule) -> None:
        rule = load_rule(rule, self._rule.variant if hasattr(self, "_rule") else None)
        self._rule, self._rule_on, self._has_step_sizes = rule, {}, False
        self._plan_key, self._entries = [], {}  # the plan depends on the rule

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(upgraded_pickle(state))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check and add a group, and assign its parameters to owners among the replicas."""
        group = add_checked(self.param_groups, param_group, super().add_param_group)
        self._shapes += [entry.local_shard.shape for entry in self._entries_of(len(self.param_groups) - 1, group)]

    def takes_rule(self, p: Tensor, group: dict[str, Any]) -> bool:
        """Whether the rule rather than AdamW updates the parameter `p` of `group`."""
        if group["update"] is None:
            return len(local_shard_of(p).shape) >= 2 or self.rule.variant == "celo2-base"
        return group["update"] == "celo2"

    def _entries_of(self, index: int, group: dict[str, Any]) -> list[Entry]:
        """The parameters of a group as this rank sees them."""
        orthogonalize = group["orthogonalize"] and self.rule.variant != "celo2-base"
        whitened = orthogonalize and self.rule.whitening > 0
        entries = [
            Entry(name, p, local_shard_of(p), self.takes_rule(p, group), orthogonalize, group["matrices"], whitened, group)
            for name, p in zip(names_of(index, group), group["params"], strict=True)
        ]
        if self.replicas is not None:
            self.replicas.add(entries)
        return entries

    def _plan(self) -> dict[Tensor, Entry]:
        """Make the plan: check groups and state, compare the ranks, and assign owners; returns the entry of each parameter."""
        check_explained(self.param_groups, self._shapes)
        entries = []
        for index, group in enumerate(self.param_groups):
            check_group(group, f"parameter group {index}")
            entries += self._entries_of(index, group)
        for entry in entries:
            self._check_state(entry)
        make_plan(entries, self._recipe, self.replicas)
        return {entry.p: entry for entry in entries}

    def _recipe(self) -> dict[str, Any]:
        """The settings that must be equal on all ranks, besides the parameters; the rule is given by its fingerprint."""
        dtypes = {"ns_dtype": str(self.ns_dtype), "state_dtype": str(self.state_dtype)}
        divided = {} if self.replicas is None else {"shard_state": self.replicas.shard_state}
        return {"rule": fingerprint(self.rule, None), **dtypes, **divided}

    def _check_state(self, entry: Entry) -> None:
        """Raise ValueError if the state of a parameter does not fit its shape or update, because group or rule have changed."""
        shapes = {name: tuple(v.shape) for name, v in self.state.get(entry.p, {}).items() if name in STATE_KEYS - {"count"}}
        form = {name: shape for name, (shape, _) in state_form(entry, self.state_dtype).items() if name != "count"}
        if shapes and shapes != form:
            update = "celo2" if entry.by_rule else "adamw"
            raise ValueError(
                f"{entry.name}, shape {tuple(entry.p.shape)}: its state {shapes} is not that of the update {update}, {form}: the "
                "parameter, its group or the rule was changed after a step; optimizer.state.pop(parameter) resets its state"
            )

    def allocate_state(self) -> None:
        """Create all state now, so that a lack of memory shows at once and not when a parameter first has a gradient."""
        for index, group in enumerate(self.param_groups):
            for entry in self._entries_of(index, group):
                self._make_state(entry)

    def _make_state(self, entry: Entry) -> None:
        """Create missing state of a parameter, unless another rank keeps it; move state to the device of the parameter."""
        p, state = entry.p, self.state.get(entry.p, {})
        if STATE_KEYS & state.keys():
            self.state[p] = state | {name: state[name].to(p.device) for name in STATE_KEYS & state.keys()}
        elif self.keeps_state(p):
            self.state[p] = state | new_state(entry, self.state_dtype)

    def keeps_state(self, p: Tensor) -> bool:
        """Whether this rank keeps the state of `p`."""
        return self.replicas is None or self.replicas.keeps_state(p)

    def state_dict(self) -> dict[str, Any]:
        """Groups and state in torch's format.

        Raises:
            RuntimeError: the state is divided over ranks (`shard_state`), and `consolidate_state_dict` was not called since the
                last step.
        """
        with whole_state(self):
            return super().state_dict()

    def consolidate_state_dict(self, to: int = 0) -> None:
        """With `shard_state`: copy the state of all ranks to CPU memory of rank `to` of `replicas`. Valid until the next step.

        Every rank must call it; then `state_dict` on rank `to` holds all state. torch's ZeroRedundancyOptimizer has the same
        method.
        """
        found = collect_divided(self, to)
        if self.replicas is not None and self.replicas.rank == to:
            self.replicas.consolidated = found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load groups and state. Unlike in torch's optimizers, the state keeps this optimizer's dtypes.

        If this optimizer has bfloat16 accumulators, saved float32 ones are rounded to nearest, and their `count` starts at 0.
        Saved bfloat16 accumulators are converted to float32 exactly. As in torch's optimizers, a parameter without saved state
        has none afterwards. With `shard_state` pass the state of all ranks on every rank; each keeps its part.

        Raises:
            ValueError: groups, state names or shapes do not fit this optimizer; the message names the parameter group.
        """
        with keeping_dtypes(self):
            super().load_state_dict(state_dict)


def state_form(entry: Entry, state_dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of the state of a parameter of shape P and stacked shape S = (..., R, C) (see `celo2.layout`).

    Under the rule: `momentum` (3, *P) and `second_moment` (*P). Matrices have `row` and `col`, means over the longer and the
    shorter axis (3, *S without that axis); vectors have `diag` (3, *P). With bfloat16 accumulators there is `count`, int32 (),
    the number of steps so far; under a rule with `whitening` also `left_whitener` (..., R, R) and `right_whitener` (..., C, C),
    float32. Under AdamW: `step`, `exp_avg`, `exp_avg_sq`.

    For a DTensor, state derived from P is sharded like the parameter, so that torch's tools can save and reshard it; the rest is
    equal on all ranks. For a parameter with the attribute `local_shard`, P is the shape of that shard, and a rank updates `row`
    and `col` of an unsplit matrix only if it holds that matrix.
    """
    size = tuple(entry.p.shape)
    if not entry.by_rule:
        accumulator = size, torch.promote_types(entry.p.dtype, torch.float32)
        return {"step": ((), torch.float32), "exp_avg": accumulator, "exp_avg_sq": accumulator}
    shape = stacked_shape(entry.local_shard.shape, entry.layout)
    axes = stacked_axes(shape, entry.layout)
    shapes = accumulator_shapes(shape, axes, entry.whitened)
    for name in shapes.keys() - set(REPLICATED):
        shapes[name] = (*shapes[name][: len(shapes[name]) - len(shape)], *(size or (1,)))  # a scalar is a vector
    dtypes: dict[str, torch.dtype] = {}
    if axes is not None and state_dtype is torch.bfloat16:
        shapes["count"] = ()
        dtypes = {"momentum": torch.bfloat16, "second_moment": torch.bfloat16, "count": torch.int32}
    return {name: (shape, dtypes.get(name, torch.float32)) for name, shape in shapes.items()}


def new_state(entry: Entry, state_dtype: torch.dtype) -> dict[str, Tensor]:
    """New state of a parameter: zeros, on the device of the parameter."""
    state, p = {}, entry.p
    for name, (shape, dtype) in state_form(entry, state_dtype).items():
        if is_dtensor(p) and name not in REPLICATED:
            zeros = torch.zeros_like(p, dtype=dtype, memory_format=torch.contiguous_format)
            zeros = zeros if p.ndim else zeros.view(1)
            state[name] = zeros if len(shape) == zeros.ndim else torch.stack([zeros] * shape[0])
        else:
            state[name] = torch.zeros(shape, dtype=dtype, device=p.device)
    return state


def fits(state: dict[str, Tensor], form: dict[str, tuple[tuple[int, ...], torch.dtype]], p: Tensor) -> bool:
    """Whether `state` has the form `form` and is on the device of `p`."""
    own = {name: value for name, value in state.items() if name in STATE_KEYS}
    return {name: (tuple(v.shape), v.dtype, v.device) for name, v in own.items()} == {
        name: (*of_name, p.device) for name, of_name in form.items()
    }


def fill_(own: Tensor, saved: Any, shard: LocalShard) -> None:
    """Copy a saved value, of one of `accepted_shapes`, into the state `own` of a parameter with this local shard."""
    saved = saved if isinstance(saved, Tensor) else torch.as_tensor(saved, device="cpu")
    if is_dtensor(own) and not is_dtensor(saved):  # the whole value, or this rank's part as a vector: copy this rank's part
        here = local(own)
        if saved.shape == own.shape:
            saved = saved.reshape(*own.shape[: own.ndim - len(shard.shape)], -1)[..., shard.start : shard.stop]
        here.copy_(saved.reshape(here.shape))
    else:
        own.copy_(saved if is_dtensor(own) or not is_dtensor(saved) else saved.full_tensor())


def accepted_shapes(name: str, shape: tuple[int, ...], p: Tensor) -> list[tuple[int, ...]]:
    """Shapes that a saved value may have: that of the state, or for a DTensor its flat local shard, as in version 0.1."""
    if is_dtensor(p) and name not in REPLICATED:
        return [shape, (*shape[: len(shape) - p.ndim], local(p).numel())]
    return [shape]


def checked(optimizer: Stateful, state_dict: dict[str, Any]) -> dict[str, Any]:
    """`state_dict` in the current format. Raises ValueError or TypeError if groups or state do not fit the optimizer."""
    if absent := {"param_groups", "state"} - state_dict.keys():
        raise ValueError(f"not the state_dict of an optimizer: it lacks {' and '.join(sorted(absent))}")
    groups, saved_groups = optimizer.param_groups, list(state_dict["param_groups"])
    if len(groups) != len(saved_groups):
        unlike = unmatched_names(groups, saved_groups)
        added = "; if groups were added to the saved optimizer, add them here before loading"
        unlike += added if len(saved_groups) > len(groups) else ""
        raise ValueError(f"the saved state has {len(saved_groups)} parameter groups, expected {len(groups)}{unlike}")
    for index, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        where = f"parameter group {index}"
        missing = [key for key in GROUP_KEYS if key in group and key not in saved_group and key != "param_names"]
        if missing:
            near = [f"'{key}', which may mean {meant_by(key)}" for key in saved_group if meant_by(key) in missing]
            raise ValueError(f"{where}: the saved group lacks {', '.join(missing)}{''.join(f'; it has {n}' for n in near)}")
        if len(saved_group["params"]) != len(group["params"]):
            found, unlike = len(saved_group["params"]), unmatched_names(groups, saved_groups)
            raise ValueError(f"{where}: {found} parameters were saved, expected {len(group['params'])}{unlike}")
        if names := group.get("param_names"):
            params = [saved_group["params"][i] for i in places_by_name(names, saved_group.get("param_names"), where)]
            saved_groups[index] = {**saved_group, "params": params, "param_names": names}
    state_dict = upgraded(groups, {**state_dict, "param_groups": saved_groups})
    for index, (group, saved_group) in enumerate(zip(groups, saved_groups, strict=True)):
        loaded = {**saved_group, "params": group["params"], "param_names": group.get("param_names")}
        check_group(loaded, f"parameter group {index}")
        for entry, key in zip(optimizer._entries_of(index, loaded), saved_group["params"], strict=True):
            saved = state_dict["state"].get(key, {})
            if not saved.keys() & STATE_KEYS or not optimizer.keeps_state(entry.p):
                continue
            where = f"parameter group {index}, a parameter of shape {tuple(entry.p.shape)}"
            form = state_form(entry, optimizer.state_dtype)
            if (form.keys() ^ saved.keys()) & STATE_KEYS - {"count"}:  # only bfloat16 accumulators have a count
                remedy = (
                    "build it with the rule and groups of the saved optimizer, or clear the saved 'state' to start with a new "
                    "state"
                )
                raise ValueError(
                    f"{where}: saved state holds {sorted(saved)}, expected {sorted(form)}, since this optimizer has another rule "
                    f"or update for it; {remedy}"
                )
            for name in (name for name in form if name in saved):
                shape, expected = tuple(torch.as_tensor(saved[name]).shape), form[name][0]
                if shape not in accepted_shapes(name, expected, entry.p):
                    raise ValueError(f"{where}: saved {name} has shape {shape}, expected {expected}")
    return state_dict


@contextmanager
def keeping_dtypes(optimizer: Stateful) -> Iterator[None]:
    """A context in which torch's `load_state_dict` checks the saved state and copies it into the optimizer's own tensors."""
    own, own_groups = optimizer.state, optimizer.param_groups
    saved: list[dict[str, Any]] = []  # the saved state of each parameter, in the order of the groups

    def check(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = checked(optimizer, state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        state = dict(state_dict["state"])
        saved.extend(state.pop(key, {}) for key in keys)
        return {**state_dict, "state": state}  # only entries that wrappers store under their own keys are left in it

    def restore(_: torch.optim.Optimizer) -> None:
        of_wrappers = dict(optimizer.state)
        optimizer.state = own
        for key in [key for key in own if not isinstance(key, Tensor)]:
            del own[key]
        own.update(of_wrappers)
        for index, (group, own_group) in enumerate(zip(optimizer.param_groups, own_groups, strict=True)):
            group |= {key: value for key, value in own_group.items() if key not in group}  # keys of wrappers
            check_group(group, f"parameter group {index}")  # converts lists to tuples
        optimizer._plan_key, optimizer._entries = [], {}  # the loaded groups may need another plan
        if optimizer.replicas is not None:
            optimizer.replicas.consolidated = None if any(saved) else {}
        entries = [entry for i, group in enumerate(optimizer.param_groups) for entry in optimizer._entries_of(i, group)]
        for entry, values in zip(entries, saved, strict=True):
            p, form = entry.p, state_form(entry, optimizer.state_dtype)
            if not values or not optimizer.keeps_state(p):
                own.pop(p, None)
                continue
            if not values.keys() & STATE_KEYS:
                own[p] = {}
            elif not fits(own.get(p, {}), form, p):
                own[p] = new_state(entry, optimizer.state_dtype)
            for name in (name for name in form if name in own[p]):
                if name in values:
                    fill_(own[p][name], values[name], entry.local_shard)
                else:
                    own[p][name].zero_()
            others = {name: value for name, value in values.items() if name not in STATE_KEYS}
            own[p] |= {n: v.to(p.device, copy=True) if isinstance(v, Tensor) else v for n, v in others.items()}

    hooks = [  # `check` runs after the user's pre-hooks, which may adapt the saved state, `restore` before the user's post-hooks
        optimizer.register_load_state_dict_pre_hook(check),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
