"""Routing of modules that are none of transformers', and what is refused."""

import re
from collections import Counter

import pytest
import torch
from routed_models import BY_RULE, MODELS, by_name, gpt2, stacked, star, update_of
from torch import nn

from celo2 import param_groups

# --- plain modules ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.fc = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)


class NanoGPT(nn.Module):
    """The modules of nanoGPT: token and position embeddings, blocks, a head without bias, tied or not."""

    def __init__(self, vocab: int = 50, context: int = 12, width: int = 8, inner: int = 32, tied: bool = True) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, width)
        self.wpe = nn.Embedding(context, width)
        self.h = nn.ModuleList(Block(width, inner) for _ in range(2))
        self.lm_head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.wte.weight = self.lm_head.weight


NANO_BY_RULE = {f"h.{i}.{name}.weight" for i in range(2) for name in ("qkv", "fc", "out")}


def by_rule(groups: list[dict]) -> set[str]:
    return {name for name, update in update_of(groups).items() if update == "celo2"}


# (50, 12): as in nanoGPT for words. (20, 64): characters, fewer than positions; 32 is the inner width of the blocks.
@pytest.mark.parametrize(("vocab", "context"), [(50, 12), (20, 64), (20, 32)])
@pytest.mark.parametrize("tied", [True, False])
def test_nano_gpt(tied, vocab, context):
    """The output projection must never be trained as a hidden matrix: it is found, or the ambiguity is an error."""
    model = NanoGPT(vocab, context, tied=tied)
    try:
        groups = param_groups(model, 1e-3, 2e-2, 0.1)
    except ValueError as error:
        assert not tied and context == 32, error  # fc has the shape of the position embedding
        assert "lm_head" in str(error) and "also_adamw" in str(error)
        groups = param_groups(model, 1e-3, 2e-2, 0.1, also_adamw=[model.lm_head])
    assert by_rule(groups) == NANO_BY_RULE
    assert Counter(id(p) for group in groups for p in group["params"]) == Counter(id(p) for p in model.parameters())


def test_ambiguous_head_is_an_error_that_also_adamw_solves():
    """With a vocabulary as large as the inner width, shapes do not tell fc from the head."""
    model = NanoGPT(vocab=32, tied=False)
    with pytest.raises(ValueError, match=r"h\.0\.fc, h\.1\.fc, lm_head.*also_adamw"):
        param_groups(model, 1e-3, 2e-2, 0.1)
    assert by_rule(param_groups(model, 1e-3, 2e-2, 0.1, also_adamw=[model.lm_head])) == NANO_BY_RULE
    # Tied, there is nothing to ask.
    assert by_rule(param_groups(NanoGPT(vocab=32), 1e-3, 2e-2, 0.1)) == NANO_BY_RULE


def test_also_adamw_adds_to_what_is_found():
    """Naming another layer does not unmark the head."""
    model = NanoGPT(tied=False)
    groups = param_groups(model, 1e-3, 2e-2, 0.1, also_adamw=[model.h[0]])
    assert by_rule(groups) == {name for name in NANO_BY_RULE if not name.startswith("h.0.")}


def test_also_adamw_of_a_transformers_model():
    model = MODELS["mixtral"]()
    routers = [layer.mlp.gate for layer in model.model.layers]
    updates = update_of(param_groups(model, 1e-3, 2e-2, 0.1, also_adamw=routers))
    assert {star(name) for name, update in updates.items() if update == "celo2"} == BY_RULE["mixtral"].keys() - {
        "model.layers.*.mlp.gate.weight"
    }


def test_mlp_without_embeddings():
    """Nothing marks an input or output layer: every matrix takes the rule, unless it is named."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    groups = param_groups(model, 1e-3, 2e-2, 0.1)
    assert update_of(groups) == {f"{i}.{n}": "celo2" if n == "weight" else "adamw" for i in (0, 2, 4) for n in ("weight", "bias")}
    named = param_groups(model, 1e-3, 2e-2, 0.1, also_adamw=[model[0], model[4]])
    assert by_rule(named) == {"2.weight"}
    assert {n: group["weight_decay"] for n, (_, group) in by_name(named).items()} == {
        f"{i}.{n}": 0.1 if n == "weight" else 0.0 for i in (0, 2, 4) for n in ("weight", "bias")
    }


def test_convolutions():
    """A convolution is one matrix (outputs, everything else); a depthwise one is a vector a channel."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 16, 1), nn.Conv1d(16, 4, 5), nn.Flatten(), nn.Linear(4, 5)
    )
    groups = by_name(param_groups(model, 1e-3, 2e-2, 0.1))
    weights = {n: group for n, (_, group) in groups.items() if n.endswith("weight")}
    assert {n: group["update"] for n, group in weights.items()} == {
        "0.weight": "celo2",
        "1.weight": "adamw",
        "2.weight": "celo2",
        "3.weight": "celo2",
        "5.weight": "celo2",
    }
    assert {n: stacked(model.get_parameter(n), g) for n, g in weights.items() if n != "1.weight"} == {
        "0.weight": (1, 8, 27),
        "2.weight": (1, 16, 8),
        "3.weight": (1, 4, 80),
        "5.weight": (1, 5, 4),
    }
    assert weights["1.weight"]["weight_decay"] == 0.0


def test_module_that_is_one_parameter_list():
    model = nn.ParameterDict({"matrix": nn.Parameter(torch.zeros(3, 4)), "scalar": nn.Parameter(torch.zeros(()))})
    assert update_of(param_groups(model, 1e-3, 2e-2, 0.1)) == {"matrix": "celo2", "scalar": "adamw"}


# --- errors -----------------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.held = weight


def claimed_as_input_and_hidden() -> tuple[nn.Module, list[nn.Module]]:
    embedding = nn.Embedding(5, 8)
    return nn.ModuleDict({"tokens": embedding, "other": Holder(embedding.weight)}), []


def claimed_as_hidden_and_named() -> tuple[nn.Module, list[nn.Module]]:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    return model, [model[1]]


def claimed_as_other_matrices() -> tuple[nn.Module, list[nn.Module]]:
    model = gpt2()
    model.transformer.h[0].twin = Holder(model.transformer.h[0].attn.c_attn.weight)
    return model, []


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (claimed_as_input_and_hidden, "tokens.weight"),
        (claimed_as_hidden_and_named, "0.weight"),
        (claimed_as_other_matrices, "transformer.h.0.attn.c_attn.weight"),
    ],
)
def test_parameter_claimed_differently_is_an_error(make, name):
    model, also_adamw = make()
    with pytest.raises(ValueError, match=rf"'{re.escape(name)}' is claimed more than once"):
        param_groups(model, 1e-3, 2e-2, 0.1, also_adamw=also_adamw)


@pytest.mark.parametrize("p", [torch.zeros(2, 3, dtype=torch.complex64), torch.zeros(0, 3)], ids=["complex", "empty"])
def test_parameter_that_nothing_claims_is_an_error(p):
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "odd": Holder(nn.Parameter(p))})
    with pytest.raises(ValueError, match=r"nothing claims.*'odd\.held'"):
        param_groups(model, 1e-3, 2e-2, 0.1)
    model["odd"].held.requires_grad_(False)
    assert len(by_name(param_groups(model, 1e-3, 2e-2, 0.1))) == 2


def test_frozen_integer_parameter_is_left_out():
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "odd": Holder(nn.Parameter(torch.zeros(3, dtype=torch.int8), False))})
    assert by_name(param_groups(model, 1e-3, 2e-2, 0.1)).keys() == {"layer.weight", "layer.bias"}


def test_unknown_variant_is_an_error():
    with pytest.raises(ValueError, match="celo2_base"):
        param_groups(nn.Linear(2, 2), 1e-3, 2e-2, variant="celo2_base")
