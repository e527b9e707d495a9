"""Load and save rules: shipped rules by name, files of three formats, and the Hugging Face Hub.

Nothing here is ever unpickled. The metadata of a `.safetensors` rule holds everything in `Rule` besides the weights. The
published MessagePack file and PyLO's `.safetensors` hold the weights alone; converting such a file adds the other settings,
including its variant.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from celo2.baselines import HAND_SET
from celo2.rule import FIRST_LAYER, Rule, weight_shapes

FORMAT = "celo2-rule"
LARGEST_EXPONENT, LARGEST_FACTOR = 4, 1000.0  # bounds for step sizes; with the published decays no step size exceeds 1e17
LARGEST_WHITENING = 1
# 2: with step sizes, 3: with whitening, 4: with a bound of step sizes. Older programs refuse versions that they do not know.
VERSIONS = ("1", "2", "3", "4")
VARIANTS = ("celo2", "celo2-base")
NDARRAY_EXTENSION = 1  # MessagePack extension type of an array in the published files
HUB = "hub:"
FILES = ("rule.safetensors", "model.safetensors", "theta.state")  # names of rule files in folders: ours, PyLO's, the published
PICKLED = (".bin", ".pickle", ".pkl", ".pt", ".pth")
LARGEST = 4 * 2**20  # bytes of the largest rule file; one has 3 kB with 8 hidden units, 4 MB with 1,000
# PyLO's name of each weight (Belilovsky-Lab/pylo, `CELO2MLP`) and ours; the shapes are equal.
PYLO = {name.replace("__", "."): name for name in FIRST_LAYER.values()} | {"b0": "b0"}
PYLO |= {f"dense_{kind}.{layer}": f"{kind}{layer + 1}" for kind in "wb" for layer in (0, 1)}


class RuleError(ValueError):
    """A rule file, name or description that cannot be used. The message, one line, names the file and the problem."""

    def __init__(self, message: str) -> None:
        super().__init__("".join(char if char.isprintable() else ascii(char)[1:-1] for char in message))


PRETRAINED = Path(__file__).parent / "pretrained"  # <name>.safetensors, and <name>.md: how it was made and how good it is
SHIPPED = ("celo2", "celo2-base", "celo2-lm", "celo2-whitened", *HAND_SET)


def load_rule(source: str | Path | Rule, variant: str | None = None) -> Rule:
    """Load a rule by a name of `SHIPPED`, from a file or folder, or from the Hugging Face Hub.

    Args:
        source: a shipped name; a `Rule`, which is checked; a file (`.safetensors` of this project or of PyLO, or a published
            `theta.state`); a folder with one of `FILES`; or `hub:OWNER/NAME`, `hub:OWNER/NAME@REVISION`,
            `hub:OWNER/NAME@REVISION:FILE` (see `celo2.hub`).
        variant: "celo2" or "celo2-base", needed if the file does not name its variant. None then means "celo2", but for a
            `theta.state` on the Hub None is an error unless the variant of its repository is known.

    Raises:
        RuleError: unknown name; no such file; a file or `Rule` with wrong names, shapes, dtypes or settings; a rule of the
            other variant; a `source` of another type.
    """
    if isinstance(source, Rule):
        return of_variant(checked_rule(source), variant, "the rule")
    if not isinstance(source, str | os.PathLike):
        raise RuleError(f"a rule is a name, a path or a Rule, not {source!r:.60}")
    name = os.fspath(source)
    if name in HAND_SET:
        return of_variant(HAND_SET[name](), variant, name)
    if name.startswith(HUB):
        from celo2.hub import load  # imports this module

        return load(name, variant)
    path = PRETRAINED / f"{name}.safetensors" if name in SHIPPED else Path(source)
    try:
        if inside := [file for file in FILES if (path / file).is_file()]:
            path = path / the_rule(path, inside)
        found = path.is_file()
    except OSError as error:  # the name is too long, or the folder may not be read
        raise RuleError(f"rule '{name}': {error.strerror}") from None
    if not found:
        raise RuleError(
            f"no rule '{name}': neither a shipped rule ({', '.join(SHIPPED)}) nor a file, or a folder with one; a rule of the "
            f"Hugging Face Hub is {HUB}OWNER/NAME"
        )
    return read_rule(path, name if name in SHIPPED else path, variant)


def checked_rule(rule: Rule) -> Rule:
    """Check a rule made in memory and return it. Raises RuleError for weights or settings that no rule file may have."""
    try:
        check_weights(rule.weights, "the rule")
        check_description(rule, "the rule")
    except (TypeError, AttributeError) as error:
        raise RuleError(f"the rule: a weight or a setting has the wrong type ({error})") from None
    return rule


def is_fake(weight: Tensor) -> bool:
    """Whether a weight has a shape but no data, as under FakeTensorMode or on the device meta."""
    return weight.is_meta or hasattr(weight, "fake_mode")


def the_rule(place: object, files: Collection[str]) -> str:
    """The only one of `files`, the rule files in `place`. Raises RuleError for none or several."""
    if len(files) == 1:
        return next(iter(files))
    found = f"several rules, {', '.join(files)}" if files else f"no {', '.join(FILES[:-1])} or {FILES[-1]}"
    raise RuleError(f"{place} holds {found}: name the file")


def read_rule(path: Path, name: object, variant: str | None, said: str | None = None, otherwise: str | None = "celo2") -> Rule:
    """Read a rule from a file.

    Args:
        path: `.safetensors`, or the published format.
        name: the name of the rule in errors.
        variant: the variant that the caller asks for.
        said: the variant that is known for its repository.
        otherwise: the variant to assume if nothing tells it; None raises an error instead.
    """
    if path.suffix in PICKLED:
        raise RuleError(
            f"{name}: pickled files are never read; write the weights as safetensors (in PyLO network.save_pretrained)"
        )
    if path.stat().st_size > LARGEST:
        raise RuleError(f"{name}: {path.stat().st_size:,} bytes; a rule has at most {LARGEST:,}, so this is something else")
    weights, description = read_safetensors(path, name) if path.suffix == ".safetensors" else read_theta(path, name)
    check_weights(weights, name)
    found = description.pop("variant", said) or variant or otherwise
    if found is None:
        raise RuleError(
            f"{name}: neither the file nor its repository names the variant of the rule: pass it, in Python as "
            f"load_rule(..., variant='celo2' or 'celo2-base'), or to python -m celo2.convert as --variant"
        )
    rule = Rule(weights, variant=found, **description)
    check_description(rule, name)
    return of_variant(rule, variant, name)


def of_variant(rule: Rule, variant: str | None, name: object) -> Rule:
    """Return `rule`. Raises RuleError if `variant` is given and the rule has the other one."""
    if variant not in (None, *VARIANTS):
        raise RuleError(f"{name}: unknown variant '{variant}', expected one of {', '.join(VARIANTS)}")
    if variant not in (None, rule.variant):
        remedy = f"request {rule.variant} (optimizer.name, variant=, --variant)"
        raise RuleError(f"{name} is a {rule.variant} rule, but {variant} was requested: {remedy}")
    return rule


def save_rule(rule: Rule, path: str | Path) -> None:
    """Write `rule` to `path`: `.safetensors` with its settings, or, for a name ending in `.state`, the published format.

    The published format cannot hold the variant: for a celo2-base rule this function warns.

    Raises:
        RuleError: another ending, weights that are not a rule's, or settings that the published format cannot hold.
    """
    path = Path(path)
    check_weights(rule.weights, path)
    check_description(rule, path)
    if path.suffix == ".safetensors":
        settings = {name: value if isinstance(value, str) else json.dumps(value) for name, value in rule.settings().items()}
        version = VERSIONS[3 if "step_bound" in settings else 2 if rule.whitening else 1 if rule.has_step_sizes else 0]
        metadata = {"format": FORMAT, "version": version, **settings, "description": rule.description, "source": rule.source}
        path.write_bytes(save({name: w.detach().contiguous().cpu() for name, w in rule.weights.items()}, metadata))
    elif path.suffix == ".state":
        published = Rule(rule.weights)
        for name in rule.settings():
            if name != "variant" and getattr(rule, name) != getattr(published, name):
                raise RuleError(f"{path}: the published format cannot hold {name} {getattr(rule, name)}; write .safetensors")
        if rule.variant != published.variant:
            warnings.warn(
                f"{path} does not store the variant: load it with load_rule(..., variant='{rule.variant}')", stacklevel=2
            )
        arrays = {name: pack_array(w.detach().cpu().numpy()) for name, w in sorted(rule.weights.items())}
        path.write_bytes(msgpack.packb({"ff_mod_stack": {"~": arrays}}))
    else:
        raise RuleError(f"{path}: a rule is written as .safetensors or .state, not '{path.suffix}'")


def check_weights(weights: Mapping[str, Tensor], path: object) -> None:
    """Raise RuleError unless names, shapes, dtypes and values of the weights are valid for a rule."""
    hidden = weights["b0"].shape[0] if "b0" in weights and weights["b0"].ndim == 1 else 8
    if hidden == 0:
        raise RuleError(f"{path}: no hidden units")
    expected = weight_shapes(hidden)
    for problem, names in (("lacks", expected.keys() - weights.keys()), ("has unknown", weights.keys() - expected.keys())):
        if names:
            shown = [f"{name:.40}" for name in sorted(map(str, names))]
            more = f" and {len(shown) - 5} more" if len(shown) > 5 else ""
            raise RuleError(f"{path}: {problem} weight {', '.join(shown[:5])}{more}")
    for name, weight in weights.items():
        if tuple(weight.shape) != expected[name]:
            raise RuleError(f"{path}: weight {name} has shape {tuple(weight.shape)}, expected {expected[name]}")
        if weight.dtype != torch.float32:
            raise RuleError(f"{path}: weight {name} is {weight.dtype}, expected torch.float32: take weight.float()")
        if not is_fake(weight) and not weight.isfinite().all():
            raise RuleError(f"{path}: weight {name} is not finite")


def check_description(rule: Rule, path: object) -> None:
    """Raise RuleError unless variant, decays, `normalize_gradient`, step sizes and whitening are valid for a rule."""
    if rule.variant not in VARIANTS:
        raise RuleError(f"{path}: unknown variant '{rule.variant}', expected one of {', '.join(VARIANTS)}")
    for name, values, count in (
        ("momentum_decays", rule.momentum_decays, 3),
        ("second_moment_decay", (rule.second_moment_decay,), 1),
        ("factored_decays", rule.factored_decays, 3),
    ):
        if len(values) != count or not all(0 <= value < 1 for value in values):
            raise RuleError(f"{path}: {name} is {values}, expected {count} decays in [0, 1)")
    if not isinstance(rule.normalize_gradient, bool):
        raise RuleError(f"{path}: normalize_gradient must be True or False, not {rule.normalize_gradient!r}")
    if len(rule.step_exponents) != 3 or not all(abs(exponent) <= LARGEST_EXPONENT for exponent in rule.step_exponents):
        expected = f"3 exponents from -{LARGEST_EXPONENT} to {LARGEST_EXPONENT}"
        raise RuleError(f"{path}: step_exponents is {rule.step_exponents}, expected {expected}")
    if not 1 / LARGEST_FACTOR <= rule.step_factor <= LARGEST_FACTOR:
        raise RuleError(f"{path}: step_factor is {rule.step_factor}, expected {1 / LARGEST_FACTOR:g} to {LARGEST_FACTOR:g}")
    if not rule.step_bound >= 1 / LARGEST_FACTOR:
        raise RuleError(f"{path}: step_bound is {rule.step_bound}, expected {1 / LARGEST_FACTOR:g} or more")
    if not 0 <= rule.whitening <= LARGEST_WHITENING:
        raise RuleError(f"{path}: whitening is {rule.whitening}, expected 0 to {LARGEST_WHITENING}")
    if rule.whitening and rule.variant == "celo2-base":
        raise RuleError(f"{path}: whitening is a part of orthogonalization, which celo2-base rules do not use: set it to 0")


def read_safetensors(path: Path, name: object) -> tuple[dict[str, Tensor], dict]:
    """Read weights and settings of a `.safetensors` rule; PyLO's files do not name a variant."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise RuleError(f"{name}: not a readable safetensors file ({error})") from error
    if metadata.get("format") != FORMAT and "w0.0" in weights:
        check_pylo(path.with_name("config.json"), name)
        weights = {PYLO.get(key, f"'{key}'"): w for key, w in weights.items()}  # quoted: not a name of PYLO
        return weights, {"description": f"PyLO's weights, read from {path.name}"}
    if metadata.get("format") != FORMAT:
        raise RuleError(f"{name}: not a Celo2 rule (its metadata has format '{metadata.get('format')}', not '{FORMAT}')")
    if metadata.get("version") not in VERSIONS:
        raise RuleError(
            f"{name}: rule format version '{metadata.get('version')}', this program reads '{VERSIONS[0]}' to '{VERSIONS[-1]}'"
        )
    try:
        return weights, {
            "variant": metadata["variant"],
            "momentum_decays": numbers(metadata["momentum_decays"]),
            "second_moment_decay": float(metadata["second_moment_decay"]),
            "factored_decays": numbers(metadata["factored_decays"]),
            "normalize_gradient": json.loads(metadata.get("normalize_gradient", "false")),
            **read_additions(metadata),
            "description": metadata.get("description", ""),
            "source": metadata.get("source", ""),
        }
    except (KeyError, ValueError, TypeError, RecursionError, OverflowError) as error:
        raise RuleError(
            f"{name}: damaged description of variant, decays or step sizes ({type(error).__name__}: {error})"
        ) from error


def read_additions(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read the settings of a `.safetensors` rule that version 1 does not have: step sizes, their bound, and whitening.

    Version 2 has step sizes; 3 has whitening and may have step sizes; 4 has step sizes with a bound and may have whitening.
    """
    version, found = metadata["version"], dict[str, Any]()
    if version == VERSIONS[2] or (version == VERSIONS[3] and "whitening" in metadata):
        found |= {"whitening": float(metadata["whitening"])}
    if version in (VERSIONS[1], VERSIONS[3]) or (version == VERSIONS[2] and "step_factor" in metadata):
        found |= {"step_exponents": numbers(metadata["step_exponents"]), "step_factor": float(metadata["step_factor"])}
    if version == VERSIONS[3]:
        found |= {"step_bound": float(metadata["step_bound"])}
    return found


def numbers(text: str) -> tuple[float, ...]:
    """The numbers of a JSON list. Raises ValueError for anything else."""
    found = json.loads(text)
    if not isinstance(found, list):
        raise ValueError(f"{text:.40} is not a list")
    return tuple(float(number) for number in found)


def check_pylo(config: Path, name: object) -> None:
    """Raise RuleError if PyLO's configuration beside a file asks for another activation than relu."""
    try:
        keys = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise RuleError(f"{name}: {config.name} beside it cannot be read ({error})") from error
    activation = keys.get("activation", "relu") if isinstance(keys, dict) else "relu"
    if activation != "relu":
        raise RuleError(
            f"{name}: {config.name} beside it asks for the activation {activation!r:.40}, but rules support only relu"
        )


def read_theta(path: Path, name: object) -> tuple[dict[str, Tensor], dict]:
    """Read weights and description of a published MessagePack file, which does not name a variant."""

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
        weights = {key: torch.from_numpy(array.astype(np.float32)) for key, array in arrays.items()}
    except OSError as error:
        raise RuleError(f"{name}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, msgpack.UnpackException) as error:
        raise RuleError(f"{name}: not a published theta.state ({type(error).__name__}: {error})") from error
    return weights, {"description": f"published weights, read from {path.name}"}


def pack_array(array: np.ndarray) -> msgpack.ExtType:
    """Encode an array as in the published files."""
    payload = msgpack.packb([list(array.shape), "float32", array.astype("<f4").tobytes()])
    return msgpack.ExtType(NDARRAY_EXTENSION, payload)
