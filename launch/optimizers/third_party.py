"""Optimizers of other libraries: found by dotted path, checked, and with a state that a checkpoint can hold.

A checkpoint holds tensors by parameter and nothing else (no pickle), but libraries keep numbers, texts and lists in their state,
counters in their groups, and tensors in attributes. `ThirdParty` turns all of these into tensors between steps. `construct`
checks the configured arguments against the constructor, and the arguments of `step` against what a training run can give. So an
optimizer that cannot work fails with one clear line before training begins.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from celo2.training.configuration import close, shown
from configs.load import ConfigError

KEPT = (bool, int, float, Tensor, list, tuple, dict)  # types of an optimizer's attributes that may belong to its state
NUMBERS = {bool: torch.bool, int: torch.int64, float: torch.float64}
BOOLEANS = ("bool", "bool | None", "Optional[bool]", "typing.Optional[bool]")  # annotations
SCHEDULED = ("lr", "initial_lr")  # not kept: they follow from the configuration and the step
COUNTER = "group:"  # prefix of a group's counter in the state of the group's first parameter
ATTRIBUTE = "own:"  # prefix of an optimizer's attribute in the state of its first parameter
DECAY_BESIDE = "decay_beside"  # key of a group: decoupled weight decay, which the library's optimizer does not see


class ThirdParty(torch.optim.Optimizer):
    """A library's optimizer that, between steps, keeps its whole state as tensors in `state[p]`.

    A number `step` becomes the tensor `step.int`, a list `GG` the tensors `GG.list` (its length), `GG.0`, `GG.1`, ...; a counter
    `k` of a group becomes `group:k.int` of the group's first parameter, an attribute `a` of the optimizer (VeLO's LSTM)
    `own:a...` of the first parameter of all. `train()` and `eval()` call the library's methods of that name if it has them, as
    Schedule-free does, which averages weights. A group may have the decay `DECAY_BESIDE`, which `step` applies first.

    Attributes:
        loss: float32 (), of the global batch, to be set before a step. Learned optimizers need it.
    """

    loss: Tensor | None = None

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.takes_loss = "loss" in inspect.signature(inner.step).parameters
        self.constants = [dict(group) for group in inner.param_groups]
        self.initial = {p: pack(state) for p, state in inner.state.items()}  # made by the constructor; a checkpoint replaces it
        self.numbers = {key: value for key, value in attributes(inner).items() if type(value) in NUMBERS}
        self.counters: set[str] = set()  # keys of groups that have changed since construction
        super().__init__(inner.param_groups, {})

    @contextmanager
    def _unpacked(self) -> Iterator[torch.optim.Optimizer]:
        """The library's optimizer, with state and groups in the library's form as long as the context is open."""
        self.inner.param_groups = self.param_groups
        self.inner.state.clear()
        for group in self.param_groups:
            for p in group["params"]:
                packed = self.state[p] if p in self.state else self.initial.get(p)
                if packed:
                    state = unpack(packed)
                    for key in [key for key in state if key.startswith(COUNTER)]:
                        group[key.removeprefix(COUNTER)] = state.pop(key)
                    for key in [key for key in state if key.startswith(ATTRIBUTE)]:
                        setattr(self.inner, key.removeprefix(ATTRIBUTE), state.pop(key))
                    if state:
                        self.inner.state[p] = state
        yield self.inner
        self.initial = {}
        moving = {key: value for key, value in attributes(self.inner).items() if self.numbers.get(key) is not value}
        first = self.param_groups[0]["params"][0]
        for group, constants in zip(self.param_groups, self.constants, strict=True):
            numbers = {key: value for key, value in group.items() if type(value) in NUMBERS and key not in SCHEDULED}
            self.counters |= {key for key, value in numbers.items() if value != constants.get(key)}
            for index, p in enumerate(group["params"]):
                state = dict(self.inner.state.get(p, {}))
                if index == 0:
                    state |= {COUNTER + key: numbers[key] for key in sorted(self.counters & set(numbers))}
                if p is first:
                    state |= {ATTRIBUTE + key: moving[key] for key in sorted(moving)}
                if state:
                    self.state[p] = pack(state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Apply the decay `DECAY_BESIDE`, then make one step of the library's optimizer."""
        for group in self.param_groups:
            for p in group["params"] if group.get(DECAY_BESIDE) else ():
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group[DECAY_BESIDE])
        with self._unpacked() as inner:
            if self.takes_loss:
                learned: Any = inner
                return learned.step(loss=self.loss)
            return inner.step() if closure is None else inner.step(closure)

    def train(self) -> None:
        """Switch to the weights that training needs."""
        self._call("train")

    def eval(self) -> None:
        """Switch to the weights that evaluation and checkpoints need."""
        self._call("eval")

    def _call(self, method: str) -> None:
        if hasattr(self.inner, method):
            with self._unpacked() as inner:
                getattr(inner, method)()


def attributes(inner: torch.optim.Optimizer) -> dict[str, Any]:
    """Attributes of a library's optimizer, beside state and groups, that a checkpoint can hold: numbers, tensors, and lists."""
    found = {}
    for key, value in vars(inner).items():
        if not key.startswith("_") and key not in ("defaults", "state", "param_groups") and type(value) in KEPT:
            with suppress(ConfigError):
                pack({key: value})
                found[key] = value
    return found


def pack(state: dict[str, Any]) -> dict[str, Tensor]:
    """The state of a parameter as tensors alone; `unpack` is the inverse.

    Raises:
        ConfigError: `state` holds something that is not a tensor, number, text, None, or list, tuple or mapping of these.
    """
    packed: dict[str, Tensor] = {}

    def put(key: str, value: Any) -> None:
        if isinstance(value, Tensor):
            packed[key] = value
        elif type(value) in NUMBERS:
            packed[f"{key}.{type(value).__name__}"] = torch.tensor(value, dtype=NUMBERS[type(value)])
        elif type(value) is str:
            packed[f"{key}.str"] = torch.tensor(list(value.encode()), dtype=torch.uint8)
        elif value is None:
            packed[f"{key}.none"] = torch.zeros(())
        elif type(value) in (list, tuple, dict):
            packed[f"{key}.{type(value).__name__}"] = torch.tensor(len(value))
            for index, item in enumerate(value.items() if type(value) is dict else value):
                put(f"{key}.{index}", item)
        else:
            raise ConfigError(f"this optimizer keeps a {type(value).__name__} ('{key}') in its state: no checkpoint can hold it")

    for key, value in state.items():
        put(str(key), value)
    return packed


def unpack(packed: dict[str, Tensor]) -> dict[str, Any]:
    """The state of a parameter in the form that its library uses; the inverse of `pack`."""

    def get(key: str) -> Any:
        if key in packed:
            return packed[key]
        kind = next(k for k in ("bool", "int", "float", "str", "none", "list", "tuple", "dict") if f"{key}.{k}" in packed)
        value = packed[f"{key}.{kind}"]
        if kind in ("list", "tuple", "dict"):
            items = [get(f"{key}.{index}") for index in range(int(value))]
            return items if kind == "list" else tuple(items) if kind == "tuple" else dict(items)
        if kind == "str":
            return bytes(value.tolist()).decode()
        return None if kind == "none" else value.item()

    return {key: get(key) for key in dict.fromkeys(name.partition(".")[0] for name in packed)}


def find_class(path: str, package: str | None = None) -> type[torch.optim.Optimizer]:
    """The optimizer class of the dotted `path`.

    Raises:
        ConfigError: no such module (naming the pip `package`, where known), no such name in it, or no torch.optim.Optimizer.
    """
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as error:  # the last two: no name before the dot, or a relative one
        hint = f"; pip install {package}" if package else ""
        raise ConfigError(f"optimizer {path}: cannot import '{module_name}' ({error}){hint}") from None
    found = getattr(module, name, None)
    if found is None:
        names = [n for n, value in vars(module).items() if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)]
        near = close(name, names)
        raise ConfigError(f"optimizer {path}: '{module_name}' has no {name}" + (f"; did you mean {near[0]}?" if near else ""))
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"optimizer {path} is not a torch.optim.Optimizer")
    return found


def accepted(cls: type) -> dict[str, inspect.Parameter]:
    """The parameters that the constructor of `cls` names, without `params`."""
    return {
        name: parameter
        for name, parameter in list(inspect.signature(cls).parameters.items())[1:]
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def expected(parameter: inspect.Parameter, value: Any) -> str:
    """What a constructor's parameter expects instead of `value`, by its default and its annotation; empty if `value` fits."""
    default, annotation = parameter.default, inspect.formatannotation(parameter.annotation).strip("'")
    bare = parameter.annotation is parameter.empty
    optional = bare or "None" in annotation or "Optional" in annotation
    numbers: tuple[type, ...] = (int, float)
    if (value is None and optional) or (isinstance(value, str) and "str" in annotation):
        return ""
    if type(default) is bool or annotation in BOOLEANS:
        return "" if isinstance(value, bool) or (bare and type(value) in numbers) else "true or false"
    if type(default) in numbers:
        whole = annotation == "int"
        return "" if type(value) in numbers[: 1 if whole else 2] else f"a {'whole ' * whole}number, such as {default}"
    if type(default) in (tuple, list) and default and all(item is None or type(item) in numbers for item in default):
        any_length = "..." in annotation or "Sequence" in annotation
        fits = isinstance(value, list | tuple) and (len(value) == len(default) or (any_length and len(value) > 0))
        fits = fits and all(item is None or type(item) in numbers for item in value)
        return "" if fits else f"{'' if any_length else f'{len(default)} '}numbers, such as {list(default)}"
    is_text = type(default) is str and (annotation == "str" or "Literal" in annotation)
    return "text" if is_text and not isinstance(value, str) else ""


def construct(cls: type[torch.optim.Optimizer], groups: list[dict[str, Any]], arguments: dict[str, Any]) -> torch.optim.Optimizer:
    """`cls` over `groups` with further `arguments` of its constructor.

    Raises:
        ConfigError: the constructor does not have an argument, or refuses its value, for example one of another type than the
            default; or a group asks for weight decay, and the constructor has none.
    """
    name, known = f"{cls.__module__}.{cls.__qualname__}", accepted(cls)
    asked = list(inspect.signature(cls.step).parameters.values())[1:]
    given = ("loss",) if any(p.name == "loss" for p in asked) else ()
    needed = [p.name for p in asked if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if missing := [key for key in needed if key not in given]:
        raise ConfigError(f"{name} is not supported: its step needs '{missing[0]}', and train.py provides only the loss")
    for key, value in arguments.items():
        if key in ("lr", "weight_decay"):
            raise ConfigError(f"optimizer.arguments holds '{key}': give it as optimizer.{key}")
        if key not in known:
            near = close(str(key), known)
            hint = f"; did you mean '{near[0]}'?" if near else f"; it takes {', '.join(known) or 'none'}"
            raise ConfigError(f"optimizer.arguments: {name} has no argument '{key}'{hint}")
        if wanted := expected(known[key], value):
            raise ConfigError(f"optimizer.arguments.{key} is {shown(value)}, expected {wanted}")
    if "weight_decay" not in known and any(group["weight_decay"] for group in groups):
        raise ConfigError(f"{name} has no weight decay: set optimizer.weight_decay=0")
    settings: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    if "lr" in known:
        settings["lr"] = groups[0]["lr"]  # every group has its own; some constructors require one
    try:
        return cls(groups, **settings)
    except Exception as error:  # a library may raise any error for a value that it refuses
        option = "optimizer.arguments: " if arguments else ""
        raise ConfigError(f"{option}{name} refuses its arguments: {' '.join(str(error).split())}") from None
