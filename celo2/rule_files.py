"""Rule weights in and out: shipped by name, `.safetensors` with its own description, the published `theta.state`.

Nothing here is ever unpickled. A `.safetensors` rule carries in its metadata everything that `Rule` holds beside the
weights; the published MessagePack file holds the weights alone, so what it is for is recorded when it is converted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import msgpack
import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from celo2.baselines import HAND_SET
from celo2.rule import Rule, weight_shapes

FORMAT = "celo2-rule"
VERSION = "1"
VARIANTS = ("celo2", "celo2-base")
NDARRAY_EXTENSION = 1  # MessagePack extension type of an array in the published files


class RuleError(ValueError):
    """A rule file, name or description that cannot be used; the message names the file and what is wrong."""


PRETRAINED = Path(__file__).parent / "pretrained"  # <name>.safetensors, and <name>.md: how it was made and how good it is
SHIPPED = ("celo2", "celo2-base", "celo2-lm", *HAND_SET)


def load_rule(source: str | Path | Rule) -> Rule:
    """A rule by a name of `SHIPPED` or by the path of a `.safetensors` or `theta.state` file.

    Raises:
        RuleError: unknown name, no such file, or a file whose names, shapes, dtypes or description are not a rule's.
    """
    if isinstance(source, Rule):
        return source
    if str(source) in HAND_SET:
        return HAND_SET[str(source)]()
    path = PRETRAINED / f"{source}.safetensors" if str(source) in SHIPPED else Path(source)
    if not path.is_file():
        raise RuleError(f"no rule '{source}': neither a shipped rule ({', '.join(SHIPPED)}) nor a file")
    weights, description = read_safetensors(path) if path.suffix == ".safetensors" else read_theta(path)
    check_weights(weights, path)
    rule = Rule(weights, **description)
    check_description(rule, path)
    return rule


def save_rule(rule: Rule, path: str | Path) -> None:
    """Write `rule` to `path`: `.safetensors` with its description, or, for a name ending in `.state`, the published format.

    Raises:
        RuleError: another ending, or weights that are not a rule's.
    """
    path = Path(path)
    check_weights(rule.weights, path)
    check_description(rule, path)
    if path.suffix == ".safetensors":
        description = {name: value if isinstance(value, str) else json.dumps(value) for name, value in rule.settings().items()}
        metadata = {"format": FORMAT, "version": VERSION, **description}
        path.write_bytes(save({name: w.detach().contiguous().cpu() for name, w in rule.weights.items()}, metadata))
    elif path.suffix == ".state":
        published = Rule(rule.weights)
        for name in ("momentum_decays", "second_moment_decay", "factored_decays", "normalize_gradient"):
            if getattr(rule, name) != getattr(published, name):
                raise RuleError(f"{path}: the published format cannot hold {name} {getattr(rule, name)}; write .safetensors")
        arrays = {name: pack_array(w.detach().cpu().numpy()) for name, w in sorted(rule.weights.items())}
        path.write_bytes(msgpack.packb({"ff_mod_stack": {"~": arrays}}))
    else:
        raise RuleError(f"{path}: a rule is written as .safetensors or .state, not '{path.suffix}'")


def check_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Raise RuleError unless names, shapes, dtypes and values are a rule's."""
    hidden = weights["b0"].shape[0] if "b0" in weights and weights["b0"].ndim == 1 else 8
    expected = weight_shapes(hidden)
    for problem, names in (("lacks", expected.keys() - weights.keys()), ("has unknown", weights.keys() - expected.keys())):
        if names:
            raise RuleError(f"{path}: {problem} weight {', '.join(sorted(map(str, names)))}")
    for name, weight in weights.items():
        if tuple(weight.shape) != expected[name]:
            raise RuleError(f"{path}: weight {name} has shape {tuple(weight.shape)}, expected {expected[name]}")
        if weight.dtype != torch.float32:
            raise RuleError(f"{path}: weight {name} is {weight.dtype}, expected torch.float32")
        if not weight.isfinite().all():
            raise RuleError(f"{path}: weight {name} is not finite")


def check_description(rule: Rule, path: Path) -> None:
    """Raise RuleError unless variant, decays and what is normalized are a rule's."""
    if rule.variant not in VARIANTS:
        raise RuleError(f"{path}: variant '{rule.variant}' is none of {', '.join(VARIANTS)}")
    for name, values, count in (
        ("momentum_decays", rule.momentum_decays, 3),
        ("second_moment_decay", (rule.second_moment_decay,), 1),
        ("factored_decays", rule.factored_decays, 3),
    ):
        if len(values) != count or not all(0 <= value < 1 for value in values):
            raise RuleError(f"{path}: {name} is {values}, expected {count} decays in [0, 1)")
    if not isinstance(rule.normalize_gradient, bool):
        raise RuleError(f"{path}: normalize_gradient must be True or False, not {rule.normalize_gradient!r}")


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Weights and description of a `.safetensors` rule."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise RuleError(f"{path}: not a readable safetensors file ({error})") from error
    if metadata.get("format") != FORMAT:
        raise RuleError(f"{path}: not a Celo2 rule (its metadata has format '{metadata.get('format')}', not '{FORMAT}')")
    if metadata.get("version") != VERSION:
        raise RuleError(f"{path}: rule format version '{metadata.get('version')}', this program reads '{VERSION}'")
    try:
        return weights, {
            "variant": metadata["variant"],
            "momentum_decays": tuple(float(decay) for decay in json.loads(metadata["momentum_decays"])),
            "second_moment_decay": float(metadata["second_moment_decay"]),
            "factored_decays": tuple(float(decay) for decay in json.loads(metadata["factored_decays"])),
            "normalize_gradient": json.loads(metadata.get("normalize_gradient", "false")),
            "description": metadata.get("description", ""),
        }
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise RuleError(f"{path}: damaged description of variant or decays ({type(error).__name__}: {error})") from error


def read_theta(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Weights of a published MessagePack file; what they are for it does not say."""

    def unpack_array(code: int, payload: bytes) -> np.ndarray:
        if code != NDARRAY_EXTENSION:
            raise ValueError(f"MessagePack extension {code} is not an array")
        shape, dtype, raw = msgpack.unpackb(payload)
        if dtype != "float32":
            raise ValueError(f"array of {dtype}, expected float32")
        array = np.frombuffer(raw, dtype="<f4").reshape(shape)
        if list(array.shape) != shape:
            raise ValueError(f"array of {array.size} numbers has shape {shape}")
        return array

    try:
        arrays = msgpack.unpackb(path.read_bytes(), ext_hook=unpack_array)["ff_mod_stack"]["~"]
        weights = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise RuleError(f"{path}: not a published theta.state ({type(error).__name__}: {error})") from error
    return weights, {"description": f"published weights, read from {path.name}"}


def pack_array(array: np.ndarray) -> msgpack.ExtType:
    """An array as the published files hold it."""
    payload = msgpack.packb([list(array.shape), "float32", array.astype("<f4").tobytes()])
    return msgpack.ExtType(NDARRAY_EXTENSION, payload)
