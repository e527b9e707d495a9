"""Configurations: load a YAML file and `section.key=value` overrides into one object, checked against a schema of dataclasses.

A schema is a dataclass of sections, and a section is a dataclass of options; `section` and `option` declare their fields. Values
are read as text first (`celo2.training.yaml_values`): the type of the option decides whether 1.10 is text or a number.

This project has its own loader so that it is strict and each error takes one line. OmegaConf accepts 1 for true and '5' for 5,
resolves `${...}` in texts and has no ranges. pydantic's strict mode refuses mappings for nested dataclasses; with validators
for these and a translation of its errors it would need as much code.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from celo2.training.yaml_values import (
    BOOLS,
    ConfigError,
    Plain,
    dump_yaml,
    is_null,
    number,
    read_yaml,
    read_yaml_file,
    scalar,
    untyped,
)

Schema = TypeVar("Schema")


@dataclass(frozen=True)
class Range:
    """The allowed values of an option: in words, and as a condition. NaN must not fulfil the condition of a range of numbers."""

    words: str
    holds: Callable[[Any], bool]


def at_least(minimum: float) -> Range:
    """The range of numbers from `minimum` on."""
    return Range(f"at least {minimum}", lambda x: x >= minimum)


POSITIVE = Range("above 0", lambda x: x > 0)
NOT_EMPTY = Range("some text", lambda x: x.strip() != "")
# For options that name a folder, as runs/<name>: the folder must stay below runs/, and the name must fit on one line.
NAME = Range(
    "some text in one line that leads to no other folder (no .., and no / at its start)",
    lambda x: x.strip() != "" and x.isprintable() and not x.startswith("/") and ".." not in x.split("/"),
)
TIMEOUT = Range("above 0 and at most 31536000, a year", lambda x: 0 < x <= 365 * 24 * 3600)
SEED = Range("between 0 and 4294967295", lambda x: 0 <= x < 1 << 32)
FRACTION = Range("a fraction between 0 and 1", lambda x: 0 <= x <= 1)
DECAY = Range("in [0, 1)", lambda x: 0 <= x < 1)


def option(default: Any, doc: str, allowed: Range | None = None, was: str | None = None, path: bool = False) -> Any:
    """Declare an option: a field of a section.

    Args:
        default: the value if the configuration gives none.
        doc: the text for --help.
        allowed: the range of the value, or of every item of a list. A value of None is not checked.
        was: the key of the option in earlier versions, which had no sections. It is still read, with a note on stderr.
        path: whether the value is a path, a list of paths, or a name or path; a leading `~` is then the home folder.
    """
    metadata = {"doc": doc, "allowed": allowed, "was": was, "path": path}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type) -> Any:
    """Declare a section: a field of a schema, with all the defaults of the section."""
    return field(default_factory=cls)


def load(schema: type[Schema], path: str | Path, overrides: Sequence[str] = ()) -> Schema:
    """Load the YAML file `path` and apply `section.key=value` overrides, whose values are YAML too.

    Raises:
        ConfigError: no such file, not a YAML mapping, an unknown key (the message suggests the nearest), a wrong type or value.
    """
    return load_written(schema, path, overrides)[0]


class Written(NamedTuple):
    """The dotted names of the options that the file and the overrides set."""

    file: set[str]
    overrides: set[str]


def load_written(schema: type[Schema], path: str | Path, overrides: Sequence[str] = ()) -> tuple[Schema, Written]:
    """The configuration, as from `load`, and which options were written."""
    tree = read_yaml_file(expanded(str(path), "the configuration"))
    tree = {} if is_null(tree) else tree
    if not isinstance(tree, dict):
        kind = "list" if isinstance(tree, list) else "single value"
        raise ConfigError(f"{path}: expected sections like 'run:', found a {kind}")
    try:
        nest = Nest(schema)
        # Sections come first, so that a section does not replace the value of an old key beside it.
        for key, value in sorted(tree.items(), key=lambda item: not isinstance(item[1], dict)):
            nest.add(key, value, str(path))
        of_file, nest.given = nest.given, set()
        for override in overrides:
            nest.add(*nest.parse(override))
        return build(schema, nest.tree), Written(of_file, nest.given)
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments of a command that takes overrides.

    Raises:
        ConfigError: an override that begins with dashes.
    """
    args, rest = parser.parse_known_intermixed_args(argv)
    for word in rest:
        if re.match(r"-+\w+\.\w", word):
            plain = word.lstrip("-")
            raise ConfigError(f"'{word}': write {plain if '=' in plain else f'{plain}=VALUE'}, without dashes")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


class Nest:
    """Collects the values of a file and overrides in a mapping of sections; keys may be sections, dotted keys or old keys."""

    def __init__(self, schema: type) -> None:
        self.tree: dict[str, Any] = {}
        self.sections = {s.name for s in fields(schema)}
        self.new_names = renamed(schema)
        self.kinds = {
            f"{section}.{key}": kind
            for section, part in vars(schema()).items()
            for key, kind in typing.get_type_hints(type(part)).items()
        }
        self.noted: set[str] = set()
        self.given: set[str] = set()  # the dotted names of the options that were set

    def parse(self, override: str) -> tuple[str, Any]:
        """Key and value of `section.key=value`. Text may be written with or without quotes; all other values are YAML."""
        # If the locale is not UTF-8, Python replaces bytes of an argument that it cannot decode by surrogates.
        written = override.encode("utf-8", "surrogateescape")
        try:
            override = written.decode("utf-8")
        except UnicodeDecodeError:
            shown = written.decode("utf-8", "backslashreplace")
            raise ConfigError(f"'{shown}': not UTF-8 text; rename such a file or folder, or name it by a link") from None
        key, separator, text = override.partition("=")
        key = key.strip()
        if not separator:
            word = re.match(r"([A-Za-z_]\w*(?:\.\w+)+)(?::\s*(.*))?$", override)
            hint = f"; write {word[1]}={word[2] or 'VALUE'}, without spaces" if word else ""
            raise ConfigError(f"'{override}': expected section.key=value{hint}")
        if not all(key.split(".")):
            raise ConfigError(f"'{override}': expected section.key=value")
        if text.startswith("="):
            raise ConfigError(f"'{override}': one = is enough; put a text that begins with = in quotes")
        kind = self.kinds.get(self.new_names.get(key, key))
        if kind is not str and kind != str | None and typing.get_origin(kind) is not Literal:
            value = read_yaml(text, f"'{override}': the value")
            return key, Plain("") if value is None else value
        if text.strip()[:1] in ('"', "'"):
            try:
                value = read_yaml(text, "")
            except ConfigError:  # the text begins with a quote but is not quoted
                value = None
            if isinstance(value, str) and not isinstance(value, Plain):
                return key, value
        return key, Plain(text)

    def add(self, key: str, value: Any, file: str | None = None) -> None:
        """Store the value of `key`. A later value replaces an earlier one, but two values in one `file` are an error."""
        if key in self.sections and isinstance(value, dict):
            for option, item in value.items():
                self.put(f"{key}.{option}", item, file)
        elif key in self.sections and file and is_null(value):
            self.tree.setdefault(key, {})  # a section without keys
        else:
            dotted = self.new_names.get(key, key)
            if dotted != key and key not in self.noted:
                self.noted.add(key)
                print(f"note: the key '{key}' is now '{dotted}'", file=sys.stderr)
            self.put(dotted, value, file)

    def put(self, dotted: str, value: Any, file: str | None) -> None:
        """Store one option, or one key of an option that is a mapping."""
        *parents, last = dotted.split(".")
        place = self.tree
        for parent in parents:
            if is_null(place.get(parent)):
                place[parent] = {}
            place = place[parent]
            if not isinstance(place, dict):
                raise ConfigError(f"'{dotted}={value}': '{parent}' is a value, not a section")
        if file and last in place:
            raise ConfigError(f"{file}: '{dotted}' is set twice, in its section and at the top level")
        place[last] = value
        self.given.add(".".join(dotted.split(".")[:2]))


def build(schema: type[Schema], tree: Mapping[str, Any]) -> Schema:
    """Build the configuration from nested mappings. Raises ConfigError for unknown keys and for wrong types or values."""
    return build_part(schema, tree, "", [f.name for f in fields(schema)] + [name for name, _, _ in options(schema)])  # type: ignore[arg-type]


def build_part(cls: type[Schema], tree: Any, prefix: str, known: Sequence[str]) -> Schema:
    """Build a schema, or one of its sections, whose keys have the prefix `section.`; `known` holds all names of the schema."""
    kinds, own = typing.get_type_hints(cls), {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(tree, Mapping):
        raise ConfigError(f"'{prefix.rstrip('.')}' is a section: set its keys ({prefix}{', '.join(own)}), found {shown(tree)}")
    values: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in own:
            raise ConfigError(f"unknown key '{name}'{nearest(prefix, key, known)}")
        if is_dataclass(kinds[key]):
            values[key] = build_part(kinds[key], {} if value is None else value, f"{name}.", known)
        else:
            values[key] = checked(kinds[key], value, name, own[key].metadata["allowed"])
            if own[key].metadata["path"]:
                values[key] = expanded(values[key], name)
    return cls(**values)


def expanded(value: Any, name: str) -> Any:
    """Replace a leading `~` by the home folder in a path, or in each path of a list."""
    if isinstance(value, list):
        return [expanded(item, name) for item in value]
    home = re.match(r"(\w+:)?(~.*)", value or "", re.DOTALL)  # the prefix: text:~/FILE
    if home is None:
        return value
    try:
        return (home[1] or "") + str(Path(home[2]).expanduser())
    except RuntimeError:
        raise ConfigError(
            f"{name} is '{value}', but there is no such user; write ./{value} for a file whose name begins with ~"
        ) from None


def nearest(prefix: str, key: Any, known: Sequence[str]) -> str:
    """A hint for an unknown key: the nearest name in the same section, else an equal or similar key in another section."""
    own = [name for name in known if name.rpartition(".")[0] == prefix.rstrip(".")]
    for names in (own, known):
        by_key = {name.rpartition(".")[2]: name for name in reversed(names)}
        near = [str(key)] if str(key) in by_key else close(str(key), by_key)
        if near:
            return f"; did you mean '{by_key[near[0]]}'?"
    return f"; known here: {', '.join(own)}"


def close(word: str, known: Iterable[str]) -> list[str]:
    """The one of `known` that `word` probably means: a similar one, or one that begins with `word`. Empty if none is near."""
    known = list(known)
    return (
        difflib.get_close_matches(word, known, n=1, cutoff=0.75) or [k for k in known if len(word) > 2 and k.startswith(word)][:1]
    )


def shown(value: Any) -> str:
    """A value as text for a message, at most 80 characters."""
    text = repr(scalar(value))
    return text if len(text) <= 80 else f"{text[:77]}..."


def checked(kind: Any, value: Any, name: str, allowed: Range | None = None) -> Any:
    """Convert `value` to type `kind` and check its range. The type decides how text without quotes is read."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # X | None; typing.Union if X is a Literal
        return None if is_null(value) else checked(arguments[0], value, name, allowed)
    if origin is Literal:
        if value not in arguments:
            near = close(str(value), arguments)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ConfigError(f"{name} is '{value}', expected one of {', '.join(arguments)}{hint}")
        return str(value)
    if origin is list:
        if not isinstance(value, list):
            items = [f"{key}: {item}" for key, item in value.items()] if isinstance(value, dict) else str(value).split(",")
            example = "" if is_null(value) else ", ".join(item.strip() for item in items)
            example = f"[{{{example}}}]" if isinstance(value, dict) else f"[{example}]"
            raise ConfigError(f"{name} is {shown(value)}, expected a list: {name}='{example}'")
        return [checked(arguments[0], item, f"{name}[{i}]", allowed) for i, item in enumerate(value)]
    plain = origin or kind
    found: Any = None
    if plain is dict and isinstance(value, dict):
        found = untyped(value, name)
    elif plain is str and isinstance(value, str):
        found = str(value)
    elif plain is bool:
        found = BOOLS.get(value.lower()) if isinstance(value, Plain) else value
    elif plain in (int, float):
        found = value
        if isinstance(value, Plain):
            found = float(value) if value.lower().lstrip("+-") in ("inf", "nan") else number(value)
        if isinstance(found, int | float) and not isinstance(found, bool):
            if plain is float:
                found = as_float(found)
            elif isinstance(found, float) and found.is_integer() and abs(found) <= 1 << 53:
                found = int(found)
    if not isinstance(found, plain) or (isinstance(found, bool) and plain is not bool):
        expected = {float: "a number", dict: "a mapping, such as {key: value}", str: "text"}.get(plain, plain.__name__)
        raise ConfigError(f"{name} is {shown(value)}, expected {expected}")
    if allowed is not None and not allowed.holds(found):
        raise ConfigError(f"{name} is {shown(found)}, expected {allowed.words}")
    if plain in (int, float) and not math.isfinite(as_float(found)):  # Python's integers may exceed the range of floats
        raise ConfigError(f"{name} is {shown(found)}, expected a finite number")
    return found


def as_float(value: int | float) -> float:
    """`value` as a float, infinite if it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def options(schema: type) -> list[tuple[str, Any, str]]:
    """Every option as (dotted name, default, documentation)."""
    defaults = asdict(schema())
    return [(name, defaults[part][option.name], option.metadata["doc"]) for name, part, option in declared(schema)]


def help_text(schema: type) -> str:
    """All options, one on each line, for --help."""
    return "\n".join(
        [
            "keys of the configuration, with their defaults:",
            *(f"  {name} = {default!r}: {doc}" for name, default, doc in options(schema)),
        ]
    )


def renamed(schema: type) -> dict[str, str]:
    """The dotted names of options by their keys in earlier versions."""
    return {option.metadata["was"]: name for name, _, option in declared(schema) if option.metadata["was"]}


def declared(schema: type) -> list[tuple[str, str, Field]]:
    """Every option as (dotted name, section, field)."""
    defaults = schema()
    return [(f"{s.name}.{f.name}", s.name, f) for s in fields(defaults) for f in fields(getattr(defaults, s.name))]


def to_yaml(config: Any) -> str:
    """The whole configuration, defaults included, as YAML that `load` reads back."""
    return dump_yaml(asdict(config))
