"""Routing of whole models: which parameter takes which update, claimed once, as which matrices, with which decay."""

import re
from collections import Counter

import pytest
import torch
import transformers
from torch import nn

from celo2 import Celo2, param_groups, routing_table

TOKENS = {"vocab_size": 97, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
BASE = {**TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**BASE, "num_key_value_heads": 1, "intermediate_size": 40}
EXPERTS = {**GROUPED, "num_local_experts": 4, "intermediate_size": 24}
T = transformers


def gpt2(cls=T.GPT2LMHeadModel, **options) -> nn.Module:
    return cls(T.GPT2Config(**TOKENS, n_embd=16, n_layer=2, n_head=2, n_positions=32, **options))


def llama(**options) -> nn.Module:
    return T.LlamaForCausalLM(T.LlamaConfig(**GROUPED, **options))


def gpt_oss() -> nn.Module:
    layers = ["full_attention", "sliding_attention"]
    return T.GptOssForCausalLM(T.GptOssConfig(**EXPERTS, head_dim=8, layer_types=layers))


def vit(cls=T.ViTForImageClassification) -> nn.Module:
    sizes = {k: BASE[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    return cls(T.ViTConfig(**sizes, intermediate_size=40, image_size=16, patch_size=8, num_labels=5))


MODELS = {
    "gpt2": gpt2,
    "gpt2, untied": lambda: gpt2(tie_word_embeddings=False),
    "gpt2, cross-attention": lambda: gpt2(add_cross_attention=True),
    "gpt2, no head": lambda: gpt2(T.GPT2Model),
    "gpt2, classifier": lambda: gpt2(T.GPT2ForSequenceClassification, num_labels=16),
    "gpt_neox": lambda: T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**BASE, intermediate_size=32)),
    "llama": llama,
    "qwen3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**GROUPED, head_dim=8, tie_word_embeddings=True)),
    "olmo2": lambda: T.Olmo2ForCausalLM(T.Olmo2Config(**GROUPED)),
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**EXPERTS)),
    "gpt_oss": gpt_oss,
    "vit": vit,
    "vit, no head": lambda: vit(T.ViTModel),
}

GPT2_BLOCK = {
    "transformer.h.*.attn.c_attn.weight": (3, 16, 16),
    "transformer.h.*.attn.c_proj.weight": (1, 16, 16),
    "transformer.h.*.mlp.c_fc.weight": (1, 64, 16),
    "transformer.h.*.mlp.c_proj.weight": (1, 16, 64),
}
LLAMA_ATTENTION = {
    "model.layers.*.self_attn.q_proj.weight": (1, 16, 16),
    "model.layers.*.self_attn.k_proj.weight": (1, 8, 16),
    "model.layers.*.self_attn.v_proj.weight": (1, 8, 16),
    "model.layers.*.self_attn.o_proj.weight": (1, 16, 16),
}
LLAMA_BLOCK = LLAMA_ATTENTION | {
    "model.layers.*.mlp.gate_proj.weight": (1, 40, 16),
    "model.layers.*.mlp.up_proj.weight": (1, 40, 16),
    "model.layers.*.mlp.down_proj.weight": (1, 16, 40),
}
EXPERT_WEIGHTS = {
    "model.layers.*.mlp.experts.gate_up_proj": (8, 24, 16),
    "model.layers.*.mlp.experts.down_proj": (4, 16, 24),
}
VIT_BLOCK = {
    **{f"vit.layers.*.attention.{name}_proj.weight": (1, 16, 16) for name in "qkvo"},
    "vit.layers.*.mlp.fc1.weight": (1, 40, 16),
    "vit.layers.*.mlp.fc2.weight": (1, 16, 40),
}


def without(prefix: str, names: dict) -> dict:
    return {name.removeprefix(prefix): value for name, value in names.items()}


# What takes the rule, as (matrices, outputs, inputs); everything else takes AdamW.
BY_RULE = {
    "gpt2": GPT2_BLOCK,
    "gpt2, untied": GPT2_BLOCK,
    "gpt2, cross-attention": GPT2_BLOCK
    | {
        "transformer.h.*.crossattention.c_attn.weight": (2, 16, 16),
        "transformer.h.*.crossattention.q_attn.weight": (1, 16, 16),
        "transformer.h.*.crossattention.c_proj.weight": (1, 16, 16),
    },
    "gpt2, no head": without("transformer.", GPT2_BLOCK),
    "gpt2, classifier": GPT2_BLOCK,
    "gpt_neox": {
        "gpt_neox.layers.*.attention.query_key_value.weight": (3, 16, 16),
        "gpt_neox.layers.*.attention.dense.weight": (1, 16, 16),
        "gpt_neox.layers.*.mlp.dense_h_to_4h.weight": (1, 32, 16),
        "gpt_neox.layers.*.mlp.dense_4h_to_h.weight": (1, 16, 32),
    },
    "llama": LLAMA_BLOCK,
    "qwen3": LLAMA_BLOCK,
    "olmo2": LLAMA_BLOCK,
    "mixtral": LLAMA_ATTENTION | EXPERT_WEIGHTS | {"model.layers.*.mlp.gate.weight": (1, 4, 16)},
    "gpt_oss": LLAMA_ATTENTION | EXPERT_WEIGHTS | {"model.layers.*.mlp.router.weight": (1, 4, 16)},
    "vit": VIT_BLOCK,
    "vit, no head": without("vit.", VIT_BLOCK) | {"pooler.dense.weight": (1, 16, 16)},
}

# Weights of more than one axis that take AdamW with decay: embeddings, positions, the output layer.
BOUNDARY = {
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "gpt2, untied": {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"},
    "gpt2, cross-attention": {"transformer.wte.weight", "transformer.wpe.weight"},
    "gpt2, no head": {"wte.weight", "wpe.weight"},
    "gpt2, classifier": {"transformer.wte.weight", "transformer.wpe.weight", "score.weight"},
    "gpt_neox": {"gpt_neox.embed_in.weight", "lm_head.weight"},
    "llama": {"model.embed_tokens.weight", "lm_head.weight"},
    "qwen3": {"model.embed_tokens.weight"},
    "olmo2": {"model.embed_tokens.weight", "lm_head.weight"},
    "mixtral": {"model.embed_tokens.weight", "lm_head.weight"},
    "gpt_oss": {"model.embed_tokens.weight", "lm_head.weight"},
    "vit": {"vit.embeddings.position_embeddings", "vit.embeddings.patch_embeddings.projection.weight", "classifier.weight"},
    "vit, no head": {"embeddings.position_embeddings", "embeddings.patch_embeddings.projection.weight"},
}


def by_name(groups: list[dict]) -> dict[str, tuple[torch.Tensor, dict]]:
    """Every grouped parameter, with its group, under its name; a name that appears twice is an error."""
    names = [name for group in groups for name in group["param_names"]]
    assert len(names) == len(set(names))
    return {name: (p, group) for group in groups for name, p in zip(group["param_names"], group["params"], strict=True)}


def star(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def stacked(p: torch.Tensor, group: dict) -> tuple[int, ...]:
    return group["matrices"][2] if group["matrices"] else (1, *p.shape) if p.ndim == 2 else tuple(p.shape)


def update_of(groups: list[dict]) -> dict[str, str]:
    return {name: group["update"] for name, (_, group) in by_name(groups).items()}


# --- models of transformers -------------------------------------------------------------------------------------------------


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
