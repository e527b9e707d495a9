"""Reads state.json of a checkpoint, and checks that its values have the types that a training run writes."""

from __future__ import annotations

import re
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from configs.schema import Config
from data.files import read_json
from launch.checkpoint.verify import CheckpointError

SECTIONS = ("run", "model", "data", "optimizer", "train", "schedule")  # sections of the configuration that resuming needs
IDENTITY = {"data set": str, "run.seed": int, "train.batch_size": int, "model.context": int | None, "optimizer.name": str}
NUMBERS = {"step": int, "tokens": int, "seconds": float}
LATER: dict[str, Any] = {  # keys that state.json of some versions lacks
    **dict.fromkeys(("sequences", "evaluated", "bad_steps", "rollbacks", "window_tokens"), int),
    **dict.fromkeys(("rolled_back_to", "rollbacks_in_a_row"), int),
    "healthy_since": bool,
    **dict.fromkeys(("val_loss", "best_loss", "window_loss"), float | None),
    "validation": str | None,
    "sources": dict[str, int],
    "recent_losses": list[float],
    "skipped": list[list[int]],
}
LARGEST_COUNT = 1 << 62  # bound of a run's counters; options are bounded only by LARGEST here
LARGEST = sys.float_info.max
HALF = re.compile("[\ud800-\udfff]")  # a lone surrogate, which cannot be written as UTF-8


def read_state(path: Path) -> dict[str, Any]:
    """Return the state.json of a checkpoint, after a check of the types of its values.

    Raises:
        CheckpointError: the file is missing, cannot be read, or has a value of the wrong type.
    """
    file = path / "state.json"
    try:
        saved = dict(read_json(file))
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no state.json") from None
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error})") from None
    if wrong := next(wrong_kinds(saved), None):
        raise CheckpointError(f"{file} is damaged: it is not what a training run writes ({wrong})")
    return saved


def wrong_kinds(saved: dict[str, Any]) -> Iterator[str]:
    """Yield the dotted names in a state.json whose values have the wrong type. Missing names are not reported."""
    parts: dict[str, tuple[Any, dict[str, Any]]] = {
        "": (saved, NUMBERS | LATER | {"config": dict}),
        "identity.": (saved.get("identity", {}), IDENTITY | {"tokenizer": str | None, "rule": str | None}),
        "average.": (saved.get("average", {}), {"kind": str, "members": int}),
    }
    if isinstance(sections := saved.get("config"), dict):
        for name, section in vars(Config()).items():
            parts[f"config.{name}."] = sections.get(name, {}), typing.get_type_hints(type(section))
    for prefix, (values, kinds) in parts.items():
        if not isinstance(values, dict):
            yield prefix.rstrip(".")
        else:
            largest = LARGEST if prefix.startswith("config.") else LARGEST_COUNT
            yield from (prefix + key for key, kind in kinds.items() if key in values and not fits(kind, values[key], largest))


def fits(kind: Any, value: Any, largest: float) -> bool:
    """Return whether a JSON value fits the type `kind`. A bool fits a text, because some text options were bools earlier.

    A whole number must be at most `largest` in magnitude; any other number must be finite.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return value is None or fits(arguments[0], value, largest)
    if origin is Literal or kind is str:
        return isinstance(value, bool) or (isinstance(value, str) and not HALF.search(value))
    if origin in (dict, list):
        items = value.values() if isinstance(value, dict) else value
        return isinstance(value, origin) and all(fits(arguments[-1], item, largest) for item in items)
    if kind in (int, float):  # NaN fails, too
        bound = LARGEST if kind is float else largest
        return isinstance(value, int | kind) and not isinstance(value, bool) and -bound <= value <= bound
    return kind is Any or isinstance(value, kind)


def require_state(path: Path, saved: dict[str, Any]) -> None:
    """Raise CheckpointError unless `saved`, from the checkpoint `path`, has all entries that resuming needs."""
    whole = saved.keys() >= {"config", "identity", *NUMBERS} and ("sequences" in saved or "skipped" in saved)
    whole = whole and saved["config"].keys() >= set(SECTIONS) and saved["identity"].keys() >= set(IDENTITY)
    whole = whole and all(len(pair) == 2 for pair in saved.get("skipped", []))
    whole = whole and saved["step"] >= 0 and saved.get("average", {"members": 0}).get("members", -1) >= 0
    if not whole:
        raise CheckpointError(f"{path / 'state.json'} is damaged: it is not what a training run writes")
