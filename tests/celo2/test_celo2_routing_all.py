"""All classes of transformers' auto mappings, on the meta device: each is routed, and what is unusual is as reviewed."""

from pathlib import Path

import pytest
import torch
import transformers
from route_all import DOZEN, built, class_names, odd_ones, route_all
from torch import nn

from celo2 import param_groups
from celo2.bare import kind_of

SNAPSHOT = Path(__file__).parent / "routing_snapshot.txt"


@pytest.mark.parametrize("name", DOZEN)
def test_a_dozen_is_routed_as_reviewed(name):
    assert set(odd_ones(built(name))) <= set(SNAPSHOT.read_text(encoding="utf-8").splitlines())


@pytest.mark.slow
def test_all_are_routed_as_reviewed():
    """After a change of the tables, or of transformers: write the snapshot again (route_all.py) and review the difference."""
    lines, counts = route_all(class_names())
    assert counts.keys() <= {"routed", "not built"}, counts
    assert counts["routed"] > 1400, counts
    assert lines == SNAPSHOT.read_text(encoding="utf-8").splitlines()


class Layer(nn.Module):
    """Holds one bare parameter."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("names", "shape", "kind"),
    [
        (
            "A_log A_logs log_A_real D Ds dt dt_bias gate_bias relative_position_bias_table attention_biases r_w_bias pos_bias_u",
            (8, 4),
            "vector",
        ),
        ("gate attn_gate input_gate_weight layer_scale gamma temperature time_decay", (8, 4), "vector"),
        ("conv_kernel conv1d_weight", (8, 1, 4), "vector"),
        ("input_gate_weight recurrent_gate_weight gates_weights", (2, 8, 8), "matrix"),  # RecurrentGemma: what makes the gates
        ("gate input_gate_bias layer_scale_weight norm_weight", (2, 8, 8), "vector"),
        ("layer_gate_weight gate_weights", (4, 1, 16), "vector"),  # multiplies
        (
            "pos_embed position_embeddings token_type_embed rel_pos_h query_tokens latents register_tokens mask_token",
            (8, 4),
            "table",
        ),
        (
            "cls_tokens prompt level_embed codebook_weights embedding positional_encoding lm_head classifier_weight",
            (8, 4),
            "table",
        ),
        ("b_Q b_K b_in b_up b_down scale_q norm_q gain_out layer_gain", (8, 4), "vector"),
        (
            "weight W w1 W_q wo A_q B_q B_up expert_b_up q_proj mm_input_projection_weight kernel lora_A lora_B qkv up down",
            (8, 4),
            "matrix",
        ),
        ("W_Q W_in gate_up time_decay_w1 w_b_q attn_out W_U", (8, 4), "matrix"),
        ("thing fn S A B freqs h0_in init_hidden decay_out mix_q W_E", (8, 4), "unknown"),
    ],
)
def test_kinds_of_bare_parameters(names, shape, kind):
    for name in names.split():
        layer = Layer(name, shape)
        assert kind_of(layer, name, getattr(layer, name), f"model.layers.0.{name}") == kind, name


@pytest.mark.parametrize("prefix", ["", "model."])
def test_embedding_and_unembedding_of_transformer_lens(prefix):
    """`W_E` and `W_U` of the model itself, not of what stands in repeated blocks."""
    for name in ("W_E", "W_U"):
        layer = Layer(name, (8, 4))
        assert kind_of(layer, name, getattr(layer, name), prefix + name) == "table"
    layer = Layer("W_U", (8, 4))  # an up-projection of an MLP that stands once
    assert kind_of(layer, "W_U", layer.W_U, f"{prefix}block_0.mlp.W_U") == "matrix"


def test_what_holds_a_list_or_a_parameter_says_its_kind():
    tables = nn.ParameterList([torch.zeros(8, 4)])
    assert kind_of(tables, "0", tables[0], "model.position_embeddings.weights.0") == "table"
    assert kind_of(tables, "0", tables[0], "model.mixing.0") == "unknown"
    embedding = type("QuantEmbedding", (Layer,), {})("weight", (8, 4))
    assert kind_of(embedding, "weight", embedding.weight, "model.words.weight") == "table"
    layer = Layer("weight", (8, 4))  # of a class that says nothing
    held = {"pos_embed": "table", "positions": "table", "query": "matrix", "router": "matrix", "up_proj": "matrix"}
    assert {name: kind_of(layer, "weight", layer.weight, f"model.{name}.weight") for name in held} == held


def test_a_module_that_holds_a_table_as_its_weight_says_so():
    """By its name or by its class, with the words that name a table itself; what says that it is a layer is none."""
    names = "queries prompt latents registers cls_tokens memory token_table vocab anchors type_embed"
    for name in names.split():
        layer = Layer("weight", (8, 4))
        assert kind_of(layer, "weight", layer.weight, f"model.{name}.weight") == "table", name
        linear = type("QuantLinear", (Layer,), {})("weight", (8, 4))
        expected = "table" if name == "type_embed" else "matrix"
        assert kind_of(linear, "weight", linear.weight, f"model.{name}.weight") == expected, name
    for cls in ("TokenLookup", "Queries", "Prompt", "PositionTable"):
        table = type(cls, (Layer,), {})("weight", (8, 4))
        assert kind_of(table, "weight", table.weight, "model.learned.weight") == "table", cls
    model = nn.ModuleList(nn.ModuleDict({"memory": nn.Linear(8, 8), "queries": nn.Linear(8, 8)}) for _ in range(2))
    assert {group["update"] for group in param_groups(model, 1, 1) if group["params"][0].ndim == 2} == {"celo2"}


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm])
def test_norms_of_two_axes_are_vectors(make):
    """As of queries and keys, with a scale for each head."""
    model = nn.ModuleDict({"scale": make((4, 8)), "fc": nn.Linear(4, 4)})
    found = {name: group for group in param_groups(model, 1, 1, 0.1) for name in group["param_names"]}
    for name in {"scale.weight", "scale.bias"} & found.keys():
        assert (found[name]["update"], found[name]["weight_decay"]) == ("adamw", 0.0), name


@pytest.mark.parametrize(
    ("cls", "holder"), [("MyLayerNorm", "a"), ("MyRMSNorm", "a"), ("Norm", "a"), ("Layer", "q_norm"), ("Layer", "k_layernorm")]
)
def test_a_norm_is_known_by_its_class_or_by_its_name(cls, holder):
    norm = type(cls, (Layer,), {})("weight", (4, 8))
    assert kind_of(norm, "weight", norm.weight, f"model.layers.0.{holder}.weight") == "vector"
    for cls, holder in (
        ("LinearNorm", "out"),
        ("WeightNorm", "out"),
        ("CastedLinear", "after_norm"),
        ("CastedLinear", "spectral_norm"),
    ):
        layer = type(cls, (Layer,), {})("weight", (4, 8))
        assert kind_of(layer, "weight", layer.weight, f"model.layers.0.{holder}.weight") == "matrix"
    linear = type("NormProjection", (Layer,), {})("weight", (4, 8))
    assert kind_of(linear, "weight", linear.weight, "model.layers.0.norm_out.weight") == "matrix"


def test_norms_of_queries_and_keys_in_cohere():
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    model = transformers.CohereForCausalLM(transformers.CohereConfig(**sizes, use_qk_norm=True, pad_token_id=0))
    groups = param_groups(model, 1, 1, 0.1)
    found = {name: (group["update"], group["weight_decay"]) for group in groups for name in group["param_names"]}
    for part in ("q_norm", "k_norm"):
        assert found[f"model.layers.0.self_attn.{part}.weight"] == ("adamw", 0.0)
    assert found["model.layers.0.self_attn.q_proj.weight"] == ("celo2", 0.1)


def test_parameter_that_says_it_does_not_decay():
    layer = Layer("proj", (8, 4))
    layer.proj._no_weight_decay = True
    group = next(g for g in param_groups(nn.ModuleDict({"a": layer}), 1, 1, 0.1) if "a.proj" in g["param_names"])
    assert (group["update"], group["weight_decay"]) == ("adamw", 0.0)
