"""Configurations: a schema of dataclasses, a YAML file and `section.key=value` overrides become one checked object.

A schema is a dataclass of sections, and a section is a dataclass of options; `section` and `option` declare their fields.

The loader is our own, because it is strict and each of its errors takes one line. OmegaConf accepts 1 for true and '5' for 5,
resolves `${...}` in texts and knows no ranges. pydantic's strict mode refuses mappings for nested dataclasses and numbers that
YAML reads as text (1e-3); with validators for these and a translation of its errors it would be no less code.
"""

from __future__ import annotations

import difflib
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

Schema = TypeVar("Schema")


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the key."""


@dataclass(frozen=True)
class Range:
    """The numbers that an option may have: in words, and as a condition, which NaN must fail."""

    words: str
    holds: Callable[[Any], bool]


def at_least(minimum: float) -> Range:
    """`minimum` or more."""
    return Range(f"at least {minimum}", lambda x: x >= minimum)


POSITIVE = Range("above 0", lambda x: x > 0)
SEED = Range("between 0 and 4294967295", lambda x: 0 <= x < 1 << 32)
FRACTION = Range("a fraction between 0 and 1", lambda x: 0 <= x <= 1)
DECAY = Range("in [0, 1)", lambda x: 0 <= x < 1)


def option(default: Any, doc: str, allowed: Range | None = None, was: str | None = None) -> Any:
    """A field of a section.

    Args:
        default: its value where the configuration has none.
        doc: what --help says.
        allowed: the range of its value, or of every item of a list. None is never checked.
        was: its key in earlier versions, which had no sections. It is still read, with a note on stderr.
    """
    metadata = {"doc": doc, "allowed": allowed, "was": was}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type) -> Any:
    """A field of a schema: a section with all its defaults."""
    return field(default_factory=cls)


def load(schema: type[Schema], path: str | Path, overrides: Sequence[str] = ()) -> Schema:
    """The configuration of the YAML file `path` with `section.key=value` overrides, whose values are YAML, too.

    Raises:
        ConfigError: no such file, no YAML mapping, an unknown key (naming the nearest right one), a wrong type or value.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read configuration '{path}' ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections like 'run:', found a {type(tree).__name__}")
    # Sections first, so that they do not replace what an old key beside them sets.
    given = sorted(((str(key), value) for key, value in tree.items()), key=lambda item: not isinstance(item[1], dict))
    given += [parse_override(override) for override in overrides]
    return build(schema, nested(schema, given))


def parse_override(override: str) -> tuple[str, Any]:
    """Key and value of `section.key=value`."""
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise ConfigError(f"'{override}': expected section.key=value")
    try:
        # Where the locale is not UTF-8, Python keeps what it cannot read of an argument as surrogates, which YAML does not take.
        return key, yaml.safe_load(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    except yaml.YAMLError:
        raise ConfigError(f"'{override}': the value is not YAML") from None


def nested(schema: type, given: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping of sections that holds the values given by dotted or old keys; of several values for a key the last."""
    new_names, sections = renamed(schema), {s.name for s in fields(schema)}
    tree: dict[str, Any] = {}
    noted = set()
    for key, value in given:
        is_section = key in sections and (value is None or isinstance(value, dict))  # not the old key of the same name
        dotted = key if is_section else new_names.get(key, key)
        if dotted != key and key not in noted:
            noted.add(key)
            print(f"note: the key '{key}' is now '{dotted}'", file=sys.stderr)
        *parents, last = dotted.split(".")
        place = tree
        for parent in parents:
            if place.get(parent) is None:
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ConfigError(f"'{dotted}={value}': '{parent}' is a value, not a section")
        place[last] = value
    return tree


def build(schema: type[Schema], tree: Mapping[str, Any]) -> Schema:
    """The configuration from nested mappings: every key known, every value of its type and in its range."""
    return build_part(schema, tree, "", [f.name for f in fields(schema)] + [name for name, _, _ in options(schema)])  # type: ignore[arg-type]


def build_part(cls: type[Schema], tree: Any, prefix: str, known: Sequence[str]) -> Schema:
    """A schema, or a section of it whose keys have the prefix `section.`; `known` holds all names of the schema."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"'{prefix.rstrip('.')}' is a section: expected keys below it, found {tree!r}")
    kinds, own = typing.get_type_hints(cls), {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in own:
            raise ConfigError(f"unknown key '{name}'{nearest(prefix, key, known)}")
        if is_dataclass(kinds[key]):
            values[key] = build_part(kinds[key], {} if value is None else value, f"{name}.", known)
        else:
            values[key] = checked(kinds[key], value, name, own[key].metadata["allowed"])
    return cls(**values)


def nearest(prefix: str, key: Any, known: Sequence[str]) -> str:
    """A hint at the nearest known name: in the same section, else the same key in another section, else any."""
    own = [name for name in known if name.rpartition(".")[0] == prefix.rstrip(".")]
    near = difflib.get_close_matches(f"{prefix}{key}", own, n=1)
    near = near or [name for name in known if name.rpartition(".")[2] == str(key)]
    near = near or difflib.get_close_matches(f"{prefix}{key}", known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; known here: {', '.join(own)}"


def checked(kind: Any, value: Any, name: str, allowed: Range | None = None) -> Any:
    """`value` if it is of type `kind` and in its range. A float may be an integer, or the text that YAML makes of 1e-3."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:  # X | None
        return None if value is None else checked(arguments[0], value, name, allowed)
    if origin is Literal:
        if value not in arguments:
            near = difflib.get_close_matches(str(value), arguments, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"{name} is '{value}', expected one of {', '.join(arguments)}{hint}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{name} is {value!r}, expected a list")
        return [checked(arguments[0], item, f"{name}[{i}]", allowed) for i, item in enumerate(value)]
    plain = origin or kind
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if plain is float and (is_number or isinstance(value, str)):
        try:
            value = float(value)
        except ValueError:
            raise ConfigError(f"{name} is '{value}', expected a number") from None
    if plain is str and is_number:
        value = str(value)
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise ConfigError(f"{name} is {value!r}, expected {plain.__name__}")
    if allowed is not None and not allowed.holds(value):
        raise ConfigError(f"{name} is {value}, expected {allowed.words}")
    return value


def options(schema: type) -> list[tuple[str, Any, str]]:
    """Every option as (dotted name, default, documentation)."""
    defaults = asdict(schema())
    return [(name, defaults[part][option.name], option.metadata["doc"]) for name, part, option in declared(schema)]


def help_text(schema: type) -> str:
    """Every option on a line, for --help."""
    return "\n".join(
        [
            "keys of the configuration, with their defaults:",
            *(f"  {name} = {default!r}: {doc}" for name, default, doc in options(schema)),
        ]
    )


def renamed(schema: type) -> dict[str, str]:
    """The dotted name of every key of earlier versions."""
    return {option.metadata["was"]: name for name, _, option in declared(schema) if option.metadata["was"]}


def declared(schema: type) -> list[tuple[str, str, Field]]:
    """Every option as (dotted name, section, field)."""
    defaults = schema()
    return [(f"{s.name}.{f.name}", s.name, f) for s in fields(defaults) for f in fields(getattr(defaults, s.name))]


def to_yaml(config: Any) -> str:
    """The whole configuration, defaults included, as YAML that `load` reads back."""
    return yaml.safe_dump(asdict(config), sort_keys=False)
