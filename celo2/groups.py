"""Check the parameter groups that users give to `Celo2`. Every error names the group."""

from __future__ import annotations

import difflib
import inspect
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from celo2.distributed.shard import local_shard_of
from celo2.holders import HELD
from celo2.layout import as_layout

if TYPE_CHECKING:
    from celo2.optimizer import Celo2
    from celo2.rule import Rule

UPDATES = ("celo2", "adamw")
GROUP_KEYS = ("params", "param_names", "lr", "weight_decay", "betas", "eps", "update", "orthogonalize", "matrices")
PLANNED = ("update", "orthogonalize", "matrices")  # the options that a plan depends on, besides the parameters and their shapes
# Names that other optimizers and the arguments of `param_groups` use for the keys of a group here.
ALIASES = {
    **{"learning_rate": "lr", "adamw_lr": "lr", "wd": "weight_decay", "l2": "weight_decay", "layout": "matrices"},
    **{"beta1": "betas", "beta2": "betas", "adamw_betas": "betas", "epsilon": "eps", "adamw_eps": "eps", "use_muon": "update"},
}
# Options of torch's optimizers that would change the update, and the only value that each may have here. `foreach`, `fused` and
# `capturable` only choose how the same update is computed and may have any value.
FIXED = {"maximize": False, "amsgrad": False, "nesterov": False, "differentiable": False, "decoupled_weight_decay": True}
REPEATED = "; leave out those that the optimizer has (docs/optimizer.md, Unfreezing)"
NEAR = 0.76  # lowest similarity that counts as a misspelling: "matrics" has 0.93, "lrs" 0.8; "steps" and eps have 0.75
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def add_checked(groups: list[dict[str, Any]], new: dict[str, Any], add: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Add `new` to `groups` by torch's function `add`, check it, and return it with all its options; an error removes it again.

    Unknown keys are kept and ignored: `name`, `lr_scale`, the keys of schedulers, and the arguments of `Celo2` that
    ZeroRedundancyOptimizer and SAM put into every group.
    """
    count = len(groups)
    where = f"parameter group {count}"
    own_flag = isinstance(new, dict) and "differentiable" in new
    if isinstance(new, dict):
        check_keys(new, where)
    try:
        add(new)
    except (ValueError, TypeError) as error:
        remedy = REPEATED if "more than one parameter group" in str(error) else ""
        raise type(error)(f"{where}: {error}{remedy}") from None
    group = groups[-1]
    if not own_flag:
        group.pop("differentiable", None)  # a default that torch adds when an optimizer is copied or loaded
    try:
        check_group(group, where)
    except (ValueError, TypeError):
        del groups[count:]
        raise
    return group


def check_keys(group: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if a key is a misspelling of one of GROUP_KEYS."""
    for key in group:
        if meant := meant_by(key):
            raise ValueError(f"{where}: unknown key '{key}'; did you mean '{meant}'?")


def meant_by(key: Any) -> str | None:
    """The one of GROUP_KEYS that `key` misspells; None if `key` is one of them, or may be a key of another library."""
    if not isinstance(key, str) or key in GROUP_KEYS:
        return None
    plain = key.lower().replace("-", "_").strip("_")
    if plain in GROUP_KEYS or plain in ALIASES:
        return ALIASES.get(plain, plain)
    if any(f"_{own}_" in f"_{plain}_" for own in GROUP_KEYS):  # lr_scale, initial_lr, weight_decay_at_y
        return None
    return next(iter(difflib.get_close_matches(plain, GROUP_KEYS, n=1, cutoff=NEAR)), None)


def check_group(group: dict[str, Any], where: str) -> None:
    """Raise ValueError or TypeError if an option is out of range, or a parameter cannot be updated.

    Also converts betas and layouts to tuples, and numbers of other libraries to Python's numbers, so that
    `torch.load(weights_only=True)` can read saved groups.
    """
    for key, value in FIXED.items():
        if bool(group.get(key, value)) is not value:
            remedy = "; minimize the negative loss" if key == "maximize" else ""
            raise ValueError(f"{where}: {key}={group[key]!r} is not supported{remedy}")
    lr = group["lr"]
    if isinstance(lr, Tensor) and (lr.numel() != 1 or not lr.is_floating_point()):
        raise ValueError(f"{where}: lr as a tensor must have one element of a float dtype, not {lr.numel()} of {lr.dtype}")
    for name in ("lr", "weight_decay", "eps"):
        value = group[name]
        if not is_number(value) or not 0 <= float(value) < math.inf:
            raise ValueError(f"{where}: {name} must be a finite number of at least 0, not {value!r}")
        group[name] = plain_number(value)
    if not isinstance(group["orthogonalize"], bool):
        raise ValueError(f"{where}: orthogonalize must be True or False, not {group['orthogonalize']!r}")
    group["betas"] = as_betas(group["betas"], where)
    if group["update"] not in (None, *UPDATES):
        raise ValueError(f"{where}: unknown update '{group['update']}', expected one of {', '.join(UPDATES)}")
    if group["matrices"] is not None:
        try:
            group["matrices"] = as_layout(group["matrices"])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    layout = group["matrices"]
    for p in group["params"]:
        shape = tuple(p.shape)
        if p.requires_grad and p.dtype not in FLOATS:  # frozen parameters may have other dtypes, such as quantized weights
            raise TypeError(f"{where}: a parameter of shape {shape} is {p.dtype}; only real floats of 16 to 64 bits can learn")
        if layout is not None and math.prod(layout[0]) != math.prod(local_shard_of(p).shape):
            raise ValueError(f"{where}: matrices {layout} do not fit a parameter of shape {shape}")


def is_number(value: Any) -> bool:
    """Whether `value` is a real number or a tensor of one element; True and False are not numbers."""
    return (isinstance(value, Real) and not isinstance(value, bool)) or (isinstance(value, Tensor) and value.numel() == 1)


def plain_number(value: Any) -> Any:
    """`value` as a float; an int or a tensor stays as it is, since a scheduler may fill the tensor."""
    return value if isinstance(value, Tensor) or type(value) is int else float(value)


def as_betas(value: Any, where: str) -> tuple[Any, Any]:
    """`value`, any sequence of two numbers in [0, 1), as a tuple. Raises ValueError for anything else."""
    if isinstance(value, Tensor):
        value = value.tolist()
    betas = tuple(value) if hasattr(value, "__getitem__") and not isinstance(value, (Mapping, str, bytes)) else ()
    if len(betas) != 2 or not all(is_number(beta) and 0 <= float(beta) < 1 for beta in betas):
        raise ValueError(f"{where}: betas must be two numbers in [0, 1), not {value!r}")
    first, second = (plain_number(beta) for beta in betas)
    return first, second


class ParamGroups(list[dict[str, Any]]):
    """The list of groups that `param_groups` returns, with the variant of the rule that the groups are for."""

    def __init__(self, groups: Iterable[dict[str, Any]], variant: str) -> None:
        super().__init__(groups)
        self.variant = variant


def warn_of_variant(params: Any, rule: Rule) -> None:
    """Warn if `params` are `ParamGroups` for a rule of another variant. Groups made by hand do not name a variant."""
    if isinstance(params, ParamGroups) and params.variant != rule.variant:
        warnings.warn(
            f"the groups are those of param_groups(..., variant='{params.variant}'), but the rule is a {rule.variant} rule: give "
            f"param_groups variant='{rule.variant}'",
            stacklevel=3,
        )


def warn_of_unused(optimizer: torch.optim.Optimizer) -> None:
    """Warn of each argument of an optimizer that has no effect because every group sets another value."""
    parameters = inspect.signature(type(optimizer)).parameters
    for name, value in optimizer.defaults.items():
        given = name in parameters and not same(value, parameters[name].default)
        values = [group[name] for group in optimizer.param_groups]
        if given and not any(same(own, value) for own in values):
            own = [*dict.fromkeys(str(float(v) if isinstance(v, Tensor) else v) for v in values)]
            few = ", ".join([*own[:3], "..."] if len(own) > 3 else own)
            warnings.warn(f"{name}={value!r} has no effect: every parameter group has its own ({few})", stacklevel=3)


def same(one: Any, other: Any) -> bool:
    """Whether two values of an option are equal; sequences by their elements."""
    if hasattr(one, "__len__") and hasattr(other, "__len__") and not isinstance(one, Tensor):
        return tuple(one) == tuple(other)
    return one is other or (is_number(one) and is_number(other) and float(one) == float(other)) or bool(one == other)


def names_of(index: int, group: Mapping[str, Any]) -> Sequence[str]:
    """Names of a group's parameters, for messages and to compare ranks."""
    names, count = group.get("param_names") or (), len(group["params"])
    # ZeroRedundancyOptimizer gives every rank the names of all parameters, but only some of the parameters.
    return names if len(names) == count else [f"parameter {i} of group {index}" for i in range(count)]


def places_by_name(names: Sequence[str], saved: Sequence[str] | None, where: str) -> Sequence[int]:
    """The index of each parameter of a group in the saved group, by name; without saved names the order is the same.

    Two names are equal if they differ only in the names of wrappers (`module.`) or in a prefix (`model.`).

    Raises:
        ValueError: the names differ.
    """
    if saved is None or len(saved) != len(names):
        return range(len(names))
    own, others = (list(map(parts_of, of)) for of in (names, saved))
    if len(set(own)) == len(own) and set(own) == set(others):
        place = {name: i for i, name in enumerate(others)}
        return [place[name] for name in own]
    if all(map(is_same, own, others)):
        return range(len(names))
    places = [[i for i, other in enumerate(others) if is_same(name, other)] for name in own]
    if all(len(found) == 1 for found in places) and len({i for (i,) in places}) == len(names):
        return [i for (i,) in places]
    i = next(i for i, pair in enumerate(zip(own, others, strict=True)) if not is_same(*pair))
    raise ValueError(
        f"{where}: the saved state is of '{saved[i]}', not of '{names[i]}'; if that is its new name, and the order the same, "
        "delete 'param_names' from the saved groups"
    )


def is_same(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether one of two names, given in parts, is a suffix of the other."""
    shorter = min(len(one), len(other))
    return one[-shorter:] == other[-shorter:]


def parts_of(name: str) -> tuple[str, ...]:
    """The parts of a parameter's name, without those that wrappers add."""
    return tuple(part for part in name.split(".") if part not in HELD)


def has_name(name: str, others: Collection[str]) -> bool:
    """Whether one of `others` is equal to `name` in the sense of `places_by_name`."""
    return name in others or any(is_same(parts_of(name), parts_of(other)) for other in others)


def unmatched_names(groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]) -> str:
    """Text for an error about groups that differ from the saved ones: the names that only one side has, if names are known."""
    own, saved = ([name for group in of for name in group.get("param_names") or ()] for of in (groups, saved_groups))
    if not own or not saved:
        return ""
    sides = (("not saved", own, saved), ("no longer here", saved, own))
    found = [(what, [name for name in names if not has_name(name, others)]) for what, names, others in sides]
    if not any(names for _, names in found):
        return (
            "; the parameters are the same, but other options divide them otherwise (param_groups makes one group less where "
            "weight_decay is 0): build the optimizer with the options that were saved, and set others in its groups after loading"
        )
    return "".join(f"; {what}: {', '.join([*names[:3], '...'] if len(names) > 3 else names)}" for what, names in found if names)


def bad_gradient(index: int, group: Mapping[str, Any], p: Tensor) -> RuntimeError:
    """The error for a parameter `p` of group `index` whose gradient no update can use."""
    g: Any = p.grad
    name = next(name for name, q in zip(names_of(index, group), group["params"], strict=True) if q is p)
    kind = "complex" if g.is_complex() else str(g.dtype) if g.layout is torch.strided else "sparse"
    remedy = "use a dense one of a float dtype" + (", as of nn.Embedding(..., sparse=False)" if kind == "sparse" else "")
    return RuntimeError(f"parameter group {index}: {kind} gradient of shape {tuple(g.shape)} of '{name}'; {remedy}")


def check_capture(optimizer: Celo2) -> None:
    """Raise RuntimeError unless a step can be captured in a CUDA graph, whose replays reuse all values that the host passed."""
    for index, group in enumerate(optimizer.param_groups):
        learning = [p for p in group["params"] if p.grad is not None]
        lr = group["lr"]
        if any(not isinstance(lr, Tensor) or lr.device != p.device for p in learning):
            kind = f"a tensor on {lr.device}" if isinstance(lr, Tensor) else "a number"
            remedy = f"give lr=torch.tensor({float(lr):g}, device='{learning[0].device}') and fill it between replays"
            raise RuntimeError(f"parameter group {index}: a CUDA graph would keep this lr, {kind}, for ever; {remedy}")
        if optimizer.replicas is None and any(not optimizer.state.get(p) for p in learning):
            raise RuntimeError(f"parameter group {index}: a step in a CUDA graph needs its state: take a step before capturing")
