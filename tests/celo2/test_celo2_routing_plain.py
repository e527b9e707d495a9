"""Routing of modules that are none of transformers', and what is refused."""

import itertools
import re
from collections import Counter

import pytest
import torch
from routed_models import by_name, gpt2, stacked, update_of
from torch import nn

from celo2 import Celo2, param_groups, routing_table

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


# (50, 12): as in nanoGPT for words. (20, 64): characters, fewer than positions. (32, 12): as many as the blocks are wide inside.
@pytest.mark.parametrize(("vocab", "context"), [(50, 12), (20, 64), (20, 32), (32, 12)])
@pytest.mark.parametrize("tied", [True, False])
def test_nano_gpt(tied, vocab, context):
    """The output projection is never trained as a hidden matrix, nor a hidden layer of its shape as an output projection."""
    model = NanoGPT(vocab, context, tied=tied)
    groups = param_groups(model, 1e-3, 2e-2, 0.1)
    assert by_rule(groups) == NANO_BY_RULE
    assert Counter(id(p) for group in groups for p in group["params"]) == Counter(id(p) for p in model.parameters())


class Flat(nn.Module):
    """No blocks, and an output layer that shapes alone do not tell from the hidden layer before it."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.fc, self.result, self.norm = nn.Embedding(32, 8), nn.Linear(8, 32), nn.Linear(8, 32), nn.LayerNorm(32)


def test_ambiguous_head_is_an_error_that_rules_solve():
    with pytest.raises(ValueError, match=r'fc, result.*rules=\{"result": "adamw"\}'):
        param_groups(Flat(), 1e-3, 2e-2, 0.1)
    assert by_rule(param_groups(Flat(), 1e-3, 2e-2, 0.1, rules={"result": "adamw"})) == {"fc.weight"}


def test_mlp():
    """Without embeddings, the layer that ends the model is its output layer."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    groups = param_groups(model, 1e-3, 2e-2, 0.1)
    assert by_rule(groups) == {"0.weight", "2.weight"}
    assert {n: group["weight_decay"] for n, (_, group) in by_name(groups).items()} == {
        f"{i}.{n}": 0.1 if n == "weight" else 0.0 for i in (0, 2, 4) for n in ("weight", "bias")
    }


def test_convolutions():
    """A convolution is one matrix (outputs, everything else), a depthwise one is a vector; the last layer is the output."""
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
        "5.weight": "adamw",
    }
    assert {n: stacked(model.get_parameter(n), g) for n, g in weights.items() if g["update"] == "celo2"} == {
        "0.weight": (1, 8, 27),
        "2.weight": (1, 16, 8),
        "3.weight": (1, 4, 80),
    }
    assert weights["1.weight"]["weight_decay"] == 0.0


def mlp(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o), nn.Tanh())))


class FinalLayer(nn.Module):
    """The last layer of DiT: what makes its scale and shift is registered behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(8, 16))


NETWORKS = {
    "actor and critic": ({"actor": mlp(6, 8, 8, 4), "critic": mlp(6, 8, 8, 1)}, {"actor.4", "critic.4"}),
    "twin critics": ({f"q{i}": mlp(6, 8, 1) for i in range(2)}, {"q0.2", "q1.2"}),
    "behind a trunk": ({"trunk": mlp(6, 9, 8), "policy": mlp(8, 7, 4), "value": mlp(8, 7, 1)}, {"policy.2", "value.2"}),
    "layers of one module": (
        {f"l{i}": nn.Linear(*size) for i, size in enumerate([(6, 8), (8, 1), (6, 8), (8, 1)])},
        {"l1", "l3"},
    ),
    "autoencoder": ({"encoder": mlp(6, 8, 3), "decoder": mlp(3, 8, 6)}, {"decoder.2"}),
    "variational": ({"e": mlp(6, 8), "mean": mlp(8, 3), "log": mlp(8, 3), "decoder": mlp(3, 8, 6)}, {"decoder.2"}),
    "gated": ({"gate": nn.Linear(6, 24), "up": nn.Linear(6, 24), "down": nn.Linear(24, 6), "last": nn.Linear(6, 5)}, {"last"}),
    "residual": ({"first": mlp(6, 24, 6), "second": mlp(6, 24, 6), "last": mlp(6, 24, 5)}, {"last.2"}),
    "DiT": ({"embed": nn.Linear(6, 8), "middle": nn.Linear(8, 8), "final_layer": FinalLayer()}, {"final_layer.linear"}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_ends_of_networks(name):
    """Every network that ends beside the last one has an output layer; what feeds another layer is none."""
    parts, heads = NETWORKS[name]
    model = nn.Module()
    for attribute, part in parts.items():
        model.add_module(attribute, part)
    matrices = {n for n, p in model.named_parameters() if p.ndim > 1}
    assert matrices - by_rule(param_groups(model, 1e-3, 2e-2, 0.1)) == {f"{head}.weight" for head in heads}


def test_table_of_groups_that_were_made_by_hand():
    """`routing_table` says what `Celo2` does with groups that name no update."""
    layer = nn.Linear(6, 4)
    for params in (layer.named_parameters(), layer.parameters()):
        lines = routing_table(Celo2(params, lr=1e-2).param_groups).splitlines()
        assert "celo2 " in lines[1] and "adamw (celo2-base: celo2)" in lines[2]
    _, weight, bias = routing_table([{"params": list(layer.parameters())}]).splitlines()  # as nobody completed them
    assert weight.split("  ")[0] == "parameter 0 of group 0" and re.search(r"celo2 +– +– +1 of 4 × 6 +1$", weight)
    assert re.search(r"adamw \(celo2-base: celo2\) +– +– +– +1$", bias)


def test_module_that_is_one_parameter_list():
    model = nn.ParameterDict({"matrix": nn.Parameter(torch.zeros(3, 4)), "scalar": nn.Parameter(torch.zeros(()))})
    assert update_of(param_groups(model, 1e-3, 2e-2, 0.1)) == {"matrix": "celo2", "scalar": "adamw"}


# --- errors -----------------------------------------------------------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.kernel = weight


def test_parameter_claimed_as_other_matrices_is_an_error():
    model = gpt2()
    model.transformer.h[0].twin = Holder(model.transformer.h[0].attn.c_attn.weight)
    with pytest.raises(ValueError, match=r"'transformer\.h\.0\.attn\.c_attn\.weight' is claimed more than once"):
        param_groups(model, 1e-3, 2e-2, 0.1)


def test_weight_shared_with_an_embedding_or_a_head_goes_with_it():
    embedding, head = nn.Embedding(5, 8), nn.Linear(8, 5)
    model = nn.ModuleDict(
        {"other": Holder(embedding.weight), "tokens": embedding, "last": Holder(head.weight), "classifier": head}
    )
    assert by_rule(param_groups(model, 1e-3, 2e-2, 0.1)) == set()


def test_complex_parameter_is_an_error_that_names_the_remedies():
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "odd": Holder(nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64)))})
    text = r"parameter 'odd\.kernel', shape \(2, 3\), is torch\.complex64, and only real floats can .* freeze it"
    for rules in ({}, {"odd": "adamw"}):
        with pytest.raises(ValueError, match=text):
            param_groups(model, 1e-3, 2e-2, 0.1, rules=rules)
    model["odd"].kernel.requires_grad_(False)
    assert len(by_name(param_groups(model, 1e-3, 2e-2, 0.1))) == 2


def test_empty_parameter_takes_adamw():
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "odd": Holder(nn.Parameter(torch.zeros(0, 3)))})
    assert update_of(param_groups(model, 1e-3, 2e-2, 0.1))["odd.kernel"] == "adamw"


def test_frozen_integer_parameter_is_left_out():
    model = nn.ModuleDict({"layer": nn.Linear(2, 2), "odd": Holder(nn.Parameter(torch.zeros(3, dtype=torch.int8), False))})
    assert by_name(param_groups(model, 1e-3, 2e-2, 0.1)).keys() == {"layer.weight", "layer.bias"}


def test_unknown_variant_is_an_error():
    with pytest.raises(ValueError, match="celo2_base"):
        param_groups(nn.Linear(2, 2), 1e-3, 2e-2, variant="celo2_base")
