"""What a comparison can search for: the keys of `--search`, where each begins for a contestant, and what a setting means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from celo2.training.configuration import close
from celo2.training.search import FACTOR, Key
from configs.load import ConfigError
from configs.schema import Config
from launch.compare.contestants import Contestant, flow
from launch.optimizers.table import decays, entry_of
from launch.optimizers.third_party import accepted, find_class

DIGITS = 3  # of a value, so that it fits into a folder's name and reads back the same


@dataclass(frozen=True)
class Searchable:
    """One key of `--search`."""

    option: str  # of the configuration; betas are a part of optimizer.arguments
    folder: str  # how a trial's folder names it
    factor: float = FACTOR  # see celo2.training.search.Key
    values: tuple[float, ...] = ()


# In the order in which coordinate descent takes them: the most sensitive first.
SEARCHABLE = {
    "lr": Searchable("optimizer.lr", "lr"),
    "adamw_lr": Searchable("optimizer.adamw_lr", "adamw", factor=4),
    "weight_decay": Searchable("optimizer.weight_decay", "wd", factor=4),
    "schedule.final": Searchable("schedule.final", "final", values=(0.0, 0.03, 0.1, 0.3)),
    "schedule.decay": Searchable("schedule.decay", "decay", values=(0.2, 0.4, 0.6, 0.8, 1.0)),
    "beta1": Searchable("betas", "b1", values=(0.8, 0.9, 0.95, 0.98)),
    "beta2": Searchable("betas", "b2", values=(0.9, 0.95, 0.98, 0.99, 0.999)),
    "train.grad_clip": Searchable("train.grad_clip", "clip"),
}
BETAS = ("beta1", "beta2")


def checked(names: Sequence[str], config: Config) -> list[str]:
    """The keys to search for, in the order of SEARCHABLE.

    Raises:
        ConfigError: an unknown key, one that is named twice, or one without effect.
    """
    for name in names:
        if name not in SEARCHABLE:
            meant = "".join(f"did you mean {near}? " for near in close(name, SEARCHABLE))
            raise ConfigError(f"--search {name}: {meant}the keys are {', '.join(SEARCHABLE)}")
        if list(names).count(name) > 1:
            raise ConfigError(f"--search names {name} twice")
    if "schedule.decay" in names and config.schedule.kind != "wsd":
        raise ConfigError("--search schedule.decay: only schedule.kind=wsd has a decay fraction; add schedule.kind=wsd")
    if "schedule.final" in names and config.schedule.kind == "constant":
        raise ConfigError("--search schedule.final: schedule.kind=constant has no end; choose another schedule.kind")
    return [name for name in SEARCHABLE if name in names]


def keys_of(contestant: Contestant, names: Sequence[str], config: Config) -> tuple[Key, ...]:
    """The keys of `names` that change anything for a contestant, each beginning at the configuration's value.

    Raises:
        ConfigError: a key that cannot begin there, or a contestant without any of the keys.
    """
    found, firsts = [], values_of(contestant, config, contestant.lr)
    own_schedule = any(word.startswith("schedule.kind=") for word in contestant.overrides)
    for name in names:
        idle = name not in firsts or (name == "adamw_lr" and not contestant.takes_adamw_lr)
        idle |= name == "weight_decay" and not decays(contestant.section)
        if idle or (name.startswith("schedule.") and own_schedule):
            continue
        entry, first = SEARCHABLE[name], firsts[name]
        if not entry.values and not 0 < first < math.inf:
            raise ConfigError(
                f"--search {name}: the search begins at {first:g} and multiplies by factors; give {entry.option} a positive value"
            )
        values = tuple(sorted({*entry.values, first})) if entry.values else ()
        found.append(Key(name, first, entry.factor, values, DIGITS))
    if not found:
        raise ConfigError(f"{contestant.label} has none of the keys of --search ({', '.join(names)})")
    return tuple(found)


def values_of(contestant: Contestant, config: Config, lr: float) -> dict[str, float]:
    """The value of every key that a contestant has, by the configuration and its own options, with this learning rate."""
    adamw_lr = config.optimizer.adamw_lr if contestant.takes_adamw_lr else contestant.section.adamw_lr
    values = {"lr": lr, "adamw_lr": lr if adamw_lr is None else adamw_lr, "weight_decay": contestant.section.weight_decay}
    values |= {"schedule.final": config.schedule.final, "schedule.decay": config.schedule.decay}
    return values | {"train.grad_clip": config.train.grad_clip} | dict(zip(BETAS, betas_of(contestant) or (), strict=False))


def betas_of(contestant: Contestant) -> tuple[float, float] | None:
    """The two betas at which a contestant's search begins; None if its constructor has no betas, or they have no effect."""
    entry = entry_of(contestant.section)
    if "betas" in entry.idle_arguments:
        return None
    parameter = accepted(find_class(entry.path, entry.package)).get("betas")
    if parameter is None:
        return None
    usual = (contestant.section.arguments or {}).get("betas") or entry.arguments.get("betas") or parameter.default
    return (float(usual[0]), float(usual[1])) if isinstance(usual, tuple | list) and len(usual) == 2 else None


def overrides_of(contestant: Contestant, config: Config, values: dict[str, float]) -> tuple[list[str], str]:
    """Values by key as section.key=value, and as a part of the name of a trial's folder.

    Both leave out values that the configuration has anyway, so that searches for other keys share their trials. The contestant's
    own learning rate counts as a value, too, if it differs from the configuration's.
    """
    lr = values.get("lr", contestant.lr)
    usual = values_of(contestant, config, lr)
    if f"{lr:g}" != f"{config.optimizer.lr:g}":
        values = {"lr": lr} | values
    words, names = [], []
    for name, value in values.items():
        if name == "lr" or value != usual[name]:
            names.append(f"{SEARCHABLE[name].folder}_{value:g}")
            words += [] if name in BETAS else [f"{SEARCHABLE[name].option}={value:g}"]
    betas = {name: values.get(name, usual.get(name)) for name in BETAS}
    if any(betas[name] != usual.get(name) for name in BETAS):
        words.append(f"optimizer.arguments={flow((contestant.section.arguments or {}) | {'betas': list(betas.values())})}")
    return words, "_".join(names) or "usual"
