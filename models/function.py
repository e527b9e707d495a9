"""Which keys of a transformers configuration make two models different functions."""

import copy
from collections.abc import Collection, Mapping
from typing import Any

from transformers import PretrainedConfig

# Keys that name or describe a model, or say how its function is computed, returned or saved.
WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "attn_implementation", "auto_map", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "eos_token_id", "experts_implementation", "id2label", "label2id", "num_labels", "output_attentions", "output_hidden_states",
    "problem_type", "return_dict", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
NOT_SET = "not set"


def changes_function(key: str) -> bool:
    """Whether a model with another value of a (dotted) key computes another function in evaluation mode from the same weights.

    Names, special tokens that only generation reads, dropout and initialization do not.
    """
    parts = key.split(".")
    training = is_dropout(key) or "initializer" in parts[-1]
    return not (training or WITHOUT_EFFECT & {*parts} or parts[-1].startswith("_attn"))


def is_dropout(key: str) -> bool:
    """Whether a (dotted) key is the probability that something is left out in training."""
    name = key.rpartition(".")[2]
    return "dropout" in name or name.endswith(("pdrop", "layerdrop"))


def function_differences(
    there: Mapping[str, Any], here: PretrainedConfig, given: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """The keys that make the model of `there` and that of `here` different functions, with both values.

    Args:
        there: a configuration as a config.json of any version of transformers holds it. A key that it lacks has the default of
            today. A key that the class of today does not know counts only if it is in `given`.
        here: a configuration of today.
        given: the keys of `there` that a user has chosen.
    """
    if there.get("model_type") != here.model_type:
        return {"model_type": (there.get("model_type"), here.model_type)}
    old, new = flat(type(here).from_dict(copy.deepcopy(dict(there))).to_dict()), flat(here.to_dict())
    keys = [key for key in (new | old) if changes_function(key) and (key in new or key.partition(".")[0] in given)]
    pairs = {key: (old.get(key, NOT_SET), new.get(key, NOT_SET)) for key in keys}
    return {key: pair for key, pair in pairs.items() if plain(pair[0]) != plain(pair[1])}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys. An empty mapping is None, as some versions write it."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = None if isinstance(value, Mapping) else value
    return result


def plain(value: Any) -> Any:
    """`value` as JSON and YAML would have it: lists for tuples, numbers for texts such as 1e-8."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
