"""Routing of low-rank factors (LoRA) and of layers that a user's own module wraps."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.parametrize as parametrize
import transformers as T
from routed_models import GROUPED, by_name, gpt2, stacked, star, update_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from celo2 import Celo2, param_groups
from celo2.fused import IN_UNITS, NOT_SPLIT


def phi3() -> nn.Module:
    return T.Phi3ForCausalLM(T.Phi3Config(**GROUPED))  # q has 16 outputs, k and v have 8


class Beside(nn.Module):
    """A wrapper that holds a frozen layer and two factors as parameters, (rank, inputs) and (outputs, rank)."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.zeros(outputs, rank))


class Turned(nn.Module):
    """The same with the factors (inputs, rank) and (rank, outputs), for `x @ A @ B`."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(inputs, rank)), nn.Parameter(torch.zeros(rank, outputs))


class Layers(nn.Module):
    """The same with linear layers as factors, whose names do not say that they are factors."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A, self.B = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)


class Peft(nn.Module):
    """The modules of PEFT's LoRA."""

    def __init__(self, base: nn.Module, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, outputs, bias=False)})


class Change(nn.Module):
    """LoRA as a parametrization."""

    def __init__(self, outputs: int, inputs: int, rank: int = 3) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.lora_B @ self.lora_A


def subclass(cls: type[nn.Module]) -> Callable[[nn.Module, int, int, int], nn.Module]:
    """A layer of a subclass of `cls` that holds the factors beside its own frozen weight, as in loralib."""

    def make(base: nn.Module, inputs: int, outputs: int, rank: int) -> nn.Module:
        layer = type("Lora", (cls,), {})(*([outputs, inputs] if cls is Conv1D else [inputs, outputs]))
        layer.requires_grad_(False)
        layer.lora_A, layer.lora_B = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.zeros(outputs, rank))
        return layer

    return make


def matrices(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """The matrices of every weight under the rule, with `*` for layer numbers."""
    groups = by_name(param_groups(model, 1e-3, 2e-2, 0.1))
    return {star(n): stacked(p, group) for n, (p, group) in groups.items() if group["update"] == "celo2"}


FORMS = {
    "wrapper": (Beside, ("lora_A", "lora_B")),
    "layers": (Layers, ("A.weight", "B.weight")),
    "PEFT": (Peft, ("lora_A.default.weight", "lora_B.default.weight")),
    "linear layer": (subclass(nn.Linear), ("lora_A", "lora_B")),
    "GPT-2's layer": (subclass(Conv1D), ("lora_A", "lora_B")),
}


@pytest.mark.parametrize("rank", [4, 12, 16, 32, 48])
@pytest.mark.parametrize("form", FORMS)
def test_factors_of_a_fused_projection(form, rank):
    """Whatever the rank, the factor that reads the inputs is one matrix, and the other is split as q, k and v are."""
    make, (a, b) = FORMS[form]
    model = gpt2().requires_grad_(False)
    for block in model.transformer.h:
        block.attn.c_attn = make(block.attn.c_attn, 16, 48, rank)
    place = "transformer.h.*.attn.c_attn"
    assert matrices(model) == {f"{place}.{a}": (1, rank, 16), f"{place}.{b}": (3, 16, rank)}
    optimizer = Celo2(param_groups(model, 1e-3, 2e-2), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()


def test_factors_of_grouped_queries_and_of_gate_and_up():
    model = phi3().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.qkv_proj = Beside(layer.self_attn.qkv_proj, 16, 32, 8)
        layer.mlp.gate_up_proj = Turned(layer.mlp.gate_up_proj, 16, 80, 8)
    assert matrices(model) == {
        "model.layers.*.self_attn.qkv_proj.lora_A": (1, 8, 16),
        "model.layers.*.self_attn.qkv_proj.lora_B": (4, 8, 8),
        "model.layers.*.mlp.gate_up_proj.lora_A": (1, 16, 8),
        "model.layers.*.mlp.gate_up_proj.lora_B": (2, 40, 8),
    }


def test_factors_whose_layer_is_not_known():
    """A module of two factors in place of a projection: the one that may be fused is noted."""
    model = gpt2()
    for block in model.transformer.h:
        block.attn.c_attn = nn.ParameterDict({"lora_A": torch.zeros(6, 16), "lora_B": torch.zeros(48, 6)})
    notes = [group.get("notes", {}) for group in param_groups(model, 1e-3, 2e-2)]
    assert {star(n): note for of_group in notes for n, note in of_group.items()} == {
        "transformer.h.*.attn.c_attn.lora_B": NOT_SPLIT
    }
    assert matrices(model)["transformer.h.*.attn.c_attn.lora_A"] == (1, 6, 16)


@pytest.mark.parametrize("groups", [1, 2])
def test_factors_of_a_convolution(groups):
    """Factors of two axes are no kernels; those of PEFT are kernels."""
    own = type("Lora", (nn.Conv2d,), {})(8, 8, 3, groups=groups)
    own.requires_grad_(False)
    own.lora_A, own.lora_B = nn.Parameter(torch.zeros(12, 24)), nn.Parameter(torch.zeros(24 // groups, 12))
    peft = nn.ModuleDict({"base_layer": nn.Conv2d(8, 8, 3).requires_grad_(False)})
    peft["lora_A"], peft["lora_B"] = nn.ModuleDict({"d": nn.Conv2d(8, 4, 3)}), nn.ModuleDict({"d": nn.Conv2d(4, 8, 1)})
    assert matrices(nn.ModuleDict({"own": own, "peft": peft, "last": nn.Linear(8, 3)})) == {
        "own.lora_A": (1, 12, 24),
        "own.lora_B": (1, 24 // groups, 12),
        "peft.lora_A.d.weight": (1, 4, 72),
        "peft.lora_B.d.weight": (1, 8, 4),
    }


def test_factor_of_gates_and_of_experts_is_one_matrix():
    lstm = nn.LSTM(8, 6)
    lstm.weight_ih_l0_lora_A = nn.Parameter(torch.zeros(4, 8))
    assert matrices(nn.ModuleDict({"lstm": lstm, "last": nn.Linear(6, 3)}))["lstm.weight_ih_l0_lora_A"] == (1, 4, 8)
    config = T.MixtralConfig(**GROUPED, num_local_experts=4)
    model = T.MixtralForCausalLM(config)
    for layer in model.model.layers:
        layer.mlp.experts.gate_up_proj_lora_A = nn.Parameter(torch.zeros(4, 2, 16))
    found = matrices(model)
    assert found["model.layers.*.mlp.experts.gate_up_proj_lora_A"] == (4, 2, 16)
    assert found["model.layers.*.mlp.experts.gate_up_proj"] == (8, 40, 16)


# --- factors of input and output layers ---------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(16, 16), nn.Linear(16, 16)


class Small(nn.Module):
    """A language model that names none of its layers as input or output."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.last = nn.Linear(16, 50, bias=False)


def parametrized() -> nn.Module:
    model = Small().requires_grad_(False)
    for layer, sizes in ((model.emb, (50, 16)), (model.last, (50, 16)), (model.blocks[0].q, (16, 16))):
        parametrize.register_parametrization(layer, "weight", Change(*sizes))
    return model


def wrapped(make: Callable[[nn.Module, int, int, int], nn.Module]) -> nn.Module:
    model = Small().requires_grad_(False)
    model.emb, model.last = make(model.emb, 16, 50, 3), make(model.last, 16, 50, 3)
    model.blocks[0].q = make(model.blocks[0].q, 16, 16, 3)
    return model


@pytest.mark.parametrize("form", ["parametrization", "wrapper", "layers", "PEFT"])
def test_factors_go_with_the_input_or_output_layer(form):
    """Factors of the embedding and of the output layer take AdamW, those of a hidden layer take the rule."""
    model = parametrized() if form == "parametrization" else wrapped(FORMS[form][0])
    updates = update_of(param_groups(model, 1e-3, 2e-2, 0.1))
    assert len(updates) == 6
    assert updates == {n: "celo2" if n.startswith("blocks.") else "adamw" for n in updates}


def test_factors_of_the_layer_that_ends_a_model():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    for i, sizes in ((0, (8, 16)), (2, (16, 16)), (4, (16, 4))):
        model[i] = Layers(model[i], *sizes, 3)
    assert {n for n, u in update_of(param_groups(model, 1, 1)).items() if u == "adamw"} == {"4.A.weight", "4.B.weight"}
    plain = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)).requires_grad_(False)
    for layer in plain:
        parametrize.register_parametrization(layer, "weight", Change(layer.out_features, layer.in_features))
    assert {n.partition(".")[0] for n, u in update_of(param_groups(plain, 1, 1)).items() if u == "adamw"} == {"2"}


def test_layers_that_are_no_factors_keep_their_update():
    """Layers called A and B beside a layer that learns, and a projection beside a frozen embedding, are hidden layers."""
    model = Small()
    model.emb = nn.ModuleDict({"tokens": nn.Embedding(50, 16), "A": nn.Linear(16, 16)})
    assert update_of(param_groups(model, 1, 1))["emb.A.weight"] == "celo2"
    model.emb = nn.ModuleDict({"tokens": nn.Embedding(50, 16).requires_grad_(False), "proj": nn.Linear(16, 16)})
    assert update_of(param_groups(model, 1, 1))["emb.proj.weight"] == "celo2"


# --- wrappers -----------------------------------------------------------------------------------------------------------------


class Wrap(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.linear = layer


@pytest.mark.parametrize("wrap", [Wrap, lambda layer: nn.Sequential(layer, nn.Dropout(0.1)), lambda layer: Wrap(Wrap(layer))])
def test_a_fused_projection_in_a_wrapper_is_split_as_without(wrap):
    model, plain = gpt2(), matrices(gpt2())
    for block in model.transformer.h:
        block.attn.c_attn = wrap(block.attn.c_attn)
    assert sorted(matrices(model).values()) == sorted(plain.values())
    model = phi3()
    for layer in model.model.layers:
        layer.self_attn.qkv_proj, layer.mlp.gate_up_proj = wrap(layer.self_attn.qkv_proj), wrap(layer.mlp.gate_up_proj)
    assert sorted(matrices(model).values()) == sorted(matrices(phi3()).values())
    assert {note for group in param_groups(model, 1, 1) for note in group.get("notes", {}).values()} == {IN_UNITS.format(4)}


def test_a_published_projection_inside_a_layer_that_clips_is_split():
    """Gemma 4 halves the outputs of `linear_start` by a gated linear unit, and holds its linear layer in one that clips."""
    model = T.models.gemma4.modeling_gemma4.Gemma4AudioLightConv1d(T.Gemma4AudioConfig(hidden_size=16))
    groups = by_name(param_groups(nn.ModuleList([nn.ModuleList([model]), nn.Linear(16, 4)]), 1e-3, 2e-2))
    assert groups["0.0.linear_start.linear.weight"][1]["matrices"][2] == (2, 16, 16)
    assert groups["0.0.linear_end.linear.weight"][1]["matrices"] is None


def test_a_projection_that_looks_fused_is_noted_in_a_wrapper_too():
    """Unless the wrapper holds other layers: then the name of the wrapper does not say what each layer computes."""
    blocks = [nn.ModuleDict({"qkv": Wrap(nn.Linear(8, 24)), "out": nn.Linear(8, 8)}) for _ in range(2)]
    groups = param_groups(nn.ModuleList(blocks), 1, 1)
    assert [list(group["notes"].values()) for group in groups if "notes" in group] == [[NOT_SPLIT] * 2]
    blocks[0]["qkv"].other = nn.Linear(8, 8)
    notes = {n: note for group in param_groups(nn.ModuleList(blocks), 1, 1) for n, note in group.get("notes", {}).items()}
    assert notes == {"1.qkv.linear.weight": NOT_SPLIT}


def test_a_projection_with_fewer_outputs_than_a_part_is_noted():
    model = gpt2()
    model.transformer.h[0].attn.c_attn = Conv1D(8, 16)
    notes = {n: note for group in param_groups(model, 1, 1) for n, note in group.get("notes", {}).items()}
    assert notes == {"transformer.h.0.attn.c_attn.weight": NOT_SPLIT}
