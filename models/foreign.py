"""Refuse code that a model's configuration from somebody else would make transformers run.

transformers runs code from outside in two ways: classes that `auto_map` names, which lie beside the configuration or on the
Hugging Face hub, and attention kernels of a repository of the hub, `attn_implementation: owner/name`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

OWN = ("gpt3",)  # model types of this project


class ForeignCode(ValueError):
    """A configuration that asks for code of somebody else. The message is one line."""


def refuse_code(config: Mapping[str, Any], where: str) -> None:
    """Raise ForeignCode if a configuration, as it stands in JSON or YAML, can only be followed with code from outside.

    An `auto_map` is allowed beside a model type that transformers knows: then the class of transformers is used
    (`without_auto_map`).
    """
    model_type = config.get("model_type")
    if "auto_map" in config and model_type not in (*CONFIG_MAPPING_NAMES, *OWN):
        raise ForeignCode(
            f"{where}: auto_map asks for code of its own, which is never run, and transformers has no {model_type!r}"
        )
    for key, value in entries(config):
        if "implementation" in key:
            for name in value.values() if isinstance(value, Mapping) else [value]:
                if isinstance(name, str) and "/" in name:
                    raise ForeignCode(f"{where}: {key} names a repository, {name!r}, whose code is never run; leave {key} out")


def entries(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield str(key), value
            yield from entries(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from entries(value)


def without_auto_map(config: PretrainedConfig) -> PretrainedConfig:
    """`config`, changed in place: neither it and its sub-configurations nor saved copies name classes from outside any more."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if isinstance(part, PretrainedConfig):
            vars(part).pop("auto_map", None)
    return config
