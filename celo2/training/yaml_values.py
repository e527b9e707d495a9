"""Read YAML without guessing the types of values.

PyYAML follows YAML 1.1: `1e-8` is text, `12:30` is 750, `1.10` is 1.1, `no` is false, and of two equal keys the second silently
replaces the first. Here a scalar without quotes stays text, a `Plain`, until its type is known. For an option of a schema this is
the type of the option; for all other values the core schema of YAML 1.2 decides (`untyped`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names the key or the file."""


class Plain(str):
    """A scalar that was written without quotes."""


NULL = {"", "~", "null", "Null", "NULL"}
BOOLS = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
NUMBER = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)(e[-+]?\d+)?", re.IGNORECASE)
INTEGER = re.compile(r"[-+]?\d[\d_]*")
HEX_OCTAL = re.compile(r"0x[0-9a-f]+|0o[0-7]+", re.IGNORECASE)


def number(text: str) -> int | float | None:
    """Parse a number: 12, 1_000, 0x1f, 0o17, 1.5, 1e-8, .inf, .nan; 007 is 7. None if `text` is not a number."""
    try:
        if text.lower().lstrip("+-") in (".inf", ".nan"):
            return float(text.replace(".", ""))
        if HEX_OCTAL.fullmatch(text):
            return int(text, 0)
        if INTEGER.fullmatch(text):
            return int(text)
        return float(text) if NUMBER.fullmatch(text) else None
    except ValueError:  # 1__0, or more digits than Python converts to an integer
        return None


def untyped(value: Any, name: str) -> Any:
    """Convert every `Plain` in `value` to None, True, False, a number or text, by the core schema of YAML 1.2.

    Raises:
        ConfigError: a value is yes, no, on or off, which YAML 1.1 and 1.2 read differently; or two keys are equal, as 4 and 4.0.
    """
    if isinstance(value, dict):
        found: dict[Any, Any] = {}
        for written, item in value.items():
            if unclear(written):
                raise ConfigError(f"{name} has the key {written}: write '{written}' in quotes")
            key = scalar(written)
            if key in found:
                raise ConfigError(f"{name} has the key {written} twice, in two forms")
            found[key] = untyped(item, f"{name}.{written}")
        return found
    if isinstance(value, list):
        return [untyped(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if unclear(value):
        raise ConfigError(f"{name} is {value}: write true or false, or '{value}' in quotes")
    return scalar(value)


def unclear(value: Any) -> bool:
    """Whether `value` is true or false in YAML 1.1 and text in YAML 1.2."""
    return isinstance(value, Plain) and value.lower() in ("yes", "no", "on", "off")


def is_null(value: Any) -> bool:
    """Whether `value` is None, or null without quotes."""
    return value is None or (isinstance(value, Plain) and value in NULL)


def scalar(value: Any) -> Any:
    """Convert a `Plain` by the core schema of YAML 1.2; return any other value unchanged."""
    if not isinstance(value, Plain):
        return value
    if is_null(value):
        return None
    if value.lower() in ("true", "false"):
        return BOOLS[value.lower()]
    found = number(value)
    return str(value) if found is None else found


def read_yaml(text: str, where: str) -> Any:
    """Read the only document in `text`: mappings, lists, texts and `Plain`; None if the text is empty.

    Errors begin with `where`. Anchors, aliases and merge keys (`<<`) are resolved.

    Raises:
        ConfigError: not YAML, several documents, a repeated key, a tag, or an alias within its own anchor; names the line.
    """
    try:
        node = yaml.compose(text, yaml.BaseLoader)  # resolves no types
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{where}{explain(error, text)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None
    return None if node is None else Reader(where).value(node)


def explain(error: yaml.MarkedYAMLError, text: str) -> str:
    """Text for a syntax error: the line and the problem."""
    mark = error.problem_mark or error.context_mark
    line = mark.line if mark else 0
    lines = text.splitlines()
    problem = f"not YAML ({' '.join(filter(None, [error.context, error.problem]))})"
    if line < len(lines) and re.match(r"\s*\t", lines[line]):
        problem = "a tab at the start of the line: YAML wants spaces"
    elif error.context and "single document" in error.context:
        problem = "a second document begins: one file holds one configuration, without --- in between"
    return f"{f', line {line + 1}' if len(lines) > 1 else ''}: {problem}"


class Reader:
    """Converts the YAML nodes of one text to values."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.open: list[yaml.Node] = []  # the nodes from the root to the current one

    def fail(self, node: yaml.Node, problem: str) -> ConfigError:
        """The error with the line of `node`."""
        return ConfigError(f"{self.where}, line {node.start_mark.line + 1}: {problem}")

    def value(self, node: yaml.Node) -> Any:
        """The value of a node, with all nodes below it."""
        if node.tag.rpartition(":")[2] not in ("str", "seq", "map"):
            raise self.fail(node, f"the tag {node.tag} is not supported: write the value without it")
        if isinstance(node, yaml.ScalarNode):
            return Plain(node.value) if node.style is None else node.value
        if node in self.open:
            raise self.fail(node, "an alias refers to a value that contains the alias")
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node)
            return [self.value(item) for item in node.value]
        finally:
            self.open.pop()

    def mapping(self, node: yaml.MappingNode) -> dict[Any, Any]:
        """The value of a mapping node: its own keys replace merged ones, and no key may be repeated."""
        merged: dict[Any, Any] = {}
        own: dict[Any, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.fail(key_node, "a key must be a name")
            key = self.value(key_node)
            if key in lines:
                raise self.fail(key_node, f"'{key}' is set twice, first in line {lines[key]}")
            lines[key] = key_node.start_mark.line + 1
            value = self.value(value_node)
            if key == "<<":
                parts = value if isinstance(value, list) else [value]
                if not all(isinstance(part, dict) for part in parts):
                    raise self.fail(value_node, "<< merges mappings: name one by its alias, <<: *name")
                for part in reversed(parts):
                    merged |= part
            else:
                own[key] = value
        return merged | own


def read_yaml_file(path: str | Path) -> Any:
    """`read_yaml` of a UTF-8 file, with or without a byte order mark."""
    try:
        return read_yaml(Path(path).expanduser().read_bytes().decode("utf-8-sig"), str(path))
    except OSError as error:
        raise ConfigError(f"cannot read configuration '{path}' ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text, so not a configuration") from None


class Dumper(yaml.SafeDumper):
    """Writes quotes around every text that this reader or a YAML 1.1 reader would not read as text."""


Dumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMBER, list("-+.0123456789"))
Dumper.add_implicit_resolver("tag:yaml.org,2002:int", HEX_OCTAL, ["0"])
Dumper.ignore_aliases = lambda self, data: True  # type: ignore[method-assign]


def dump_yaml(value: Any, **options: Any) -> str:
    """`value` as YAML that `read_yaml` and readers of YAML 1.1 read in the same way."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, **options)
