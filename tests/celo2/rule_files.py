"""What the tests of rules in files share: rules to write, and a look into the published format."""

import os
import subprocess
import sys
from pathlib import Path

import msgpack
import torch
from safetensors.torch import save_file

from celo2 import Rule
from celo2.rule import weight_shapes

VECTORS = Path(__file__).parent / "vectors"
ROOT = Path(__file__).resolve().parents[2]


def random_rule(hidden: int = 8, seed: int = 0, **described) -> Rule:
    generator = torch.Generator().manual_seed(seed)
    return Rule({name: torch.randn(shape, generator=generator) for name, shape in weight_shapes(hidden).items()}, **described)


DESCRIBED = {
    "variant": "celo2-base",
    "momentum_decays": (0.8, 0.95, 0.99),
    "second_moment_decay": 0.9,
    "factored_decays": (0.1, 0.2, 0.30000000000000004),
    "normalize_gradient": True,
    "step_exponents": (0.1, 0.2, 0.30000000000000004),
    "step_factor": 1.5,
    "description": "meta-trained on nothing, β = 0.9,\n“quoted” and in two lines",
}


def assert_same_weights(rule: Rule, expected: dict[str, torch.Tensor]) -> None:
    assert rule.weights.keys() == expected.keys()
    for name, weight in rule.weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, torch.as_tensor(expected[name])), name


def good_metadata() -> dict[str, str]:
    decays = {"momentum_decays": "[0.9, 0.99, 0.999]", "second_moment_decay": "0.95", "factored_decays": "[0.9, 0.99, 0.999]"}
    return {"format": "celo2-rule", "version": "1", "variant": "celo2", "description": "a test", **decays}


def write_safetensors(path: Path, weights: dict | None = None, **metadata: str | None) -> None:
    given = {name: value for name, value in (good_metadata() | metadata).items() if value is not None}
    save_file(random_rule().weights if weights is None else weights, path, given)


def pylo_weights(weights: dict) -> dict:
    """The same weights by PyLO's names (`CELO2MLP` in Belilovsky-Lab/pylo), which has them in the same shapes."""
    names = {"b0": "b0", "w1": "dense_w.0", "b1": "dense_b.0", "w2": "dense_w.1", "b2": "dense_b.1"}
    return {names.get(name, name.replace("w0__", "w0.")): w for name, w in weights.items()}


def unpacked(path: Path) -> dict:
    """A `.state` file decoded here, independently: {name: (shape, dtype, bytes)}."""

    def array(code: int, payload: bytes) -> tuple:
        assert code == 1
        shape, dtype, raw = msgpack.unpackb(payload)
        return tuple(shape), dtype, raw

    tree = msgpack.unpackb(path.read_bytes(), ext_hook=array)
    assert list(tree) == ["ff_mod_stack"]
    assert list(tree["ff_mod_stack"]) == ["~"]
    return tree["ff_mod_stack"]["~"]


def python(*args: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run Python in a process of its own that finds the project."""
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
