"""Routing of whole models: which parameter takes which update, claimed once, as which matrices, with which decay."""

import re
from collections import Counter

import pytest
import torch
from routed_models import BOUNDARY, BY_RULE, MODELS, by_name, gpt2, llama, stacked, star, update_of
from torch import nn

from celo2 import Celo2, param_groups, routing_table


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_claimed_once(name):
    model = MODELS[name]()
    groups = param_groups(model, 1e-3, 2e-2, 0.1)
    claimed = Counter(id(p) for group in groups for p in group["params"])
    assert claimed == Counter(id(p) for p in model.parameters())
    for parameter_name, (p, _) in by_name(groups).items():
        assert model.get_parameter(parameter_name) is p


@pytest.mark.parametrize("name", MODELS)
def test_what_takes_the_rule_as_which_matrices(name):
    groups = param_groups(MODELS[name](), 1e-3, 2e-2, 0.1)
    found = {star(n): stacked(p, group) for n, (p, group) in by_name(groups).items() if group["update"] == "celo2"}
    assert found == BY_RULE[name]


@pytest.mark.parametrize("decay_vectors", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_lr_and_decay(name, decay_vectors):
    """Hidden matrices and boundary weights decay; vectors (and the bias of each expert) do not, unless asked."""
    groups = param_groups(MODELS[name](), 1e-3, 2e-2, 0.1, decay_vectors=decay_vectors)
    boundary = set()
    for n, (_, group) in by_name(groups).items():
        by_rule = star(n) in BY_RULE[name]
        assert group["update"] == ("celo2" if by_rule else "adamw")
        assert group["lr"] == (1e-3 if by_rule else 2e-2)
        if by_rule:
            assert group["weight_decay"] == 0.1
        elif n in BOUNDARY[name]:
            boundary.add(n)
            assert group["weight_decay"] == 0.1
        else:
            assert n.endswith(("bias", "sinks", "cls_token")) or "norm" in n or "ln_" in n
            assert group["weight_decay"] == (0.1 if decay_vectors else 0.0)
    assert boundary == BOUNDARY[name]


@pytest.mark.parametrize("name", MODELS)
def test_base_variant_gives_everything_to_the_rule(name):
    model = MODELS[name]()
    groups = param_groups(model, 1e-3, 2e-2, 0.1, variant="celo2-base")
    assert {group["update"] for group in groups} == {"celo2"}
    assert {group["lr"] for group in groups} == {1e-3}
    assert Counter(id(p) for group in groups for p in group["params"]) == Counter(id(p) for p in model.parameters())


@pytest.mark.parametrize("rule", ["celo2", "celo2-base"])
@pytest.mark.parametrize("name", MODELS)
def test_groups_are_what_the_optimizer_takes(name, rule):
    """One step moves every parameter of every model, by finite amounts."""
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer = Celo2(param_groups(model, 1e-3, 2e-2, 0.1, variant=rule), lr=0.0, rule=rule)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for n, p in model.named_parameters():
        assert p.isfinite().all()
        assert (p != before[n]).any(), n


def test_tied_weight_is_claimed_once_under_its_first_name():
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    groups = by_name(param_groups(model, 1e-3, 2e-2, 0.1))
    assert "lm_head.weight" not in groups
    assert groups["transformer.wte.weight"][1]["update"] == "adamw"


def test_frozen_parameters_are_left_out():
    model = llama()
    frozen = {n for n, p in model.named_parameters() if "layers.0" in n or "embed" in n}
    for n, p in model.named_parameters():
        p.requires_grad_(n not in frozen)
    expected = {n for n, _ in model.named_parameters()} - frozen
    assert by_name(param_groups(model, 1e-3, 2e-2, 0.1)).keys() == expected


def test_frozen_bias_of_a_trainable_layer():
    model = gpt2()
    model.transformer.h[0].attn.c_attn.bias.requires_grad_(False)
    names = by_name(param_groups(model, 1e-3, 2e-2, 0.1))
    assert "transformer.h.0.attn.c_attn.bias" not in names
    assert "transformer.h.0.attn.c_attn.weight" in names


class Wrapper(nn.Module):
    """What DistributedDataParallel and torch.compile look like from outside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("name", MODELS)
def test_wrapped_model_is_routed_as_itself(name):
    model = MODELS[name]()
    plain, wrapped = (param_groups(m, 1e-3, 2e-2, 0.1) for m in (model, Wrapper(model)))
    assert len(plain) == len(wrapped)
    for one, other in zip(plain, wrapped, strict=True):
        assert other["param_names"] == [f"module.{n}" for n in one["param_names"]]
        assert {k: one[k] for k in one if "param" not in k} == {k: other[k] for k in other if "param" not in k}


def test_embeddings_are_found_by_module_not_by_name():
    """A hidden layer may be called lm_head, and an embedding anything."""
    model = llama()
    model.model.layers[0].mlp.embed_tokens = nn.Linear(16, 16)
    model.model.layers[0].mlp.lm_head = nn.Linear(16, 24)
    model.model.rows = nn.Embedding(5, 16)
    updates = update_of(param_groups(model, 1e-3, 2e-2, 0.1))
    assert updates["model.layers.0.mlp.embed_tokens.weight"] == "celo2"
    assert updates["model.layers.0.mlp.lm_head.weight"] == "celo2"
    assert updates["model.rows.weight"] == "adamw"


# --- the printed table ------------------------------------------------------------------------------------------------------


def test_table_of_gpt2():
    table = routing_table(param_groups(gpt2(), 1e-3, 2e-2, 0.1))
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    assert rows[0] == ["parameter", "shape", "update", "lr", "decay", "matrices", "count"]
    assert rows[1:7] == [
        ["transformer.h.*.attn.c_attn.weight", "16 × 48", "celo2", "0.001", "0.1", "3 of 16 × 16", "2"],
        ["transformer.h.*.attn.c_proj.weight", "16 × 16", "celo2", "0.001", "0.1", "1 of 16 × 16", "2"],
        ["transformer.h.*.mlp.c_fc.weight", "16 × 64", "celo2", "0.001", "0.1", "1 of 64 × 16", "2"],
        ["transformer.h.*.mlp.c_proj.weight", "64 × 16", "celo2", "0.001", "0.1", "1 of 16 × 64", "2"],
        ["transformer.wte.weight", "97 × 16", "adamw", "0.02", "0.1", "–", "1"],
        ["transformer.wpe.weight", "32 × 16", "adamw", "0.02", "0.1", "–", "1"],
    ]
    assert ["transformer.h.*.attn.c_attn.bias", "48", "adamw", "0.02", "0", "–", "2"] in rows
    assert ["transformer.ln_f.weight", "16", "adamw", "0.02", "0", "–", "1"] in rows
    assert sum(int(row[-1]) for row in rows[1:]) == len(list(gpt2().parameters()))


@pytest.mark.parametrize("name", MODELS)
def test_table_has_every_parameter(name):
    """Also from the groups of an optimizer, whose lr a scheduler has changed."""
    model = MODELS[name]()
    optimizer = Celo2(param_groups(model, 1e-3, 2e-2, 0.1), lr=0.0)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    lines = routing_table(optimizer.param_groups).splitlines()[1:]
    assert sum(int(line.split()[-1]) for line in lines) == len(list(model.parameters()))
    assert {line.split()[0] for line in lines} == {star(n) for n, _ in model.named_parameters()}
    assert "0.5" in lines[0]


# --- training ---------------------------------------------------------------------------------------------------------------


class Separate(nn.Module):
    """GPT-2's c_attn as three linear layers."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        width = fused.weight.shape[0]
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        for i, layer in enumerate((self.q, self.k, self.v)):
            layer.weight.data.copy_(fused.weight[:, i * width : (i + 1) * width].T)
            layer.bias.data.copy_(fused.bias[i * width : (i + 1) * width])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def untransposed(layer: nn.Module) -> nn.Linear:
    linear = nn.Linear(*layer.weight.shape)
    linear.weight.data.copy_(layer.weight.T)
    linear.bias.data.copy_(layer.bias)
    return linear


def test_gpt2_trains_as_its_twin_of_separate_linear_layers():
    """Ten steps on one batch: stock GPT-2, and the same function made of plain (outputs, inputs) matrices."""
    torch.manual_seed(0)
    model = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    twin = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    twin.load_state_dict(model.state_dict())
    for block in twin.transformer.h:
        block.attn.c_attn = Separate(block.attn.c_attn)
        for parent, name in ((block.attn, "c_proj"), (block.mlp, "c_fc"), (block.mlp, "c_proj")):
            setattr(parent, name, untransposed(getattr(parent, name)))
    tokens = torch.randint(1, 97, (4, 32))
    losses = []
    for one in (model, twin):
        optimizer = Celo2(param_groups(one, 3e-3, 1e-2, 0.1), lr=0.0)
        losses.append([])
        for _ in range(10):
            loss = one(tokens, labels=tokens).loss
            losses[-1].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0][-1] < losses[0][0] - 0.5
    # Products of other shapes round otherwise, and ten steps carry it on: worst measured 4.8e-7.
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=0, atol=1e-5)
    for block, other in zip(model.transformer.h, twin.transformer.h, strict=True):
        separate = torch.cat([layer.weight.T for layer in (other.attn.c_attn.q, other.attn.c_attn.k, other.attn.c_attn.v)], 1)
        torch.testing.assert_close(block.attn.c_attn.weight, separate, rtol=0, atol=1e-5)  # worst measured 1.6e-7
