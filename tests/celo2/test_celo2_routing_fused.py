"""Every way in which modules cut a fused weight, proven by their own forward pass.

Scaling all queries by 2 and all keys by 1/2 leaves a model's output as it is, and so does scaling the values by 2 and the output
projection by 1/2, or the up projection and the down projection. A stack that mixes the parts breaks this.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as T
from routed_models import BASE, EXPERTS, GROUPED, TOKENS, by_name, gpt2, gpt_oss
from torch import Tensor, nn

from celo2 import param_groups, routing_table
from celo2.fused import FUSED, IN_UNITS, NOT_SPLIT, Split, projection
from celo2.layout import to_stack

MLP = {"intermediate_size": 24}
FOUR = {**BASE, "hidden_size": 32, "num_attention_heads": 4}
MLA = {**BASE, **MLP, "kv_lora_rank": 8, "q_lora_rank": None, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
FALCON = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "bias": False}


def causal(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(T, f"{name}ForCausalLM")(getattr(T, f"{name}Config")(**options))


def modern_bert() -> nn.Module:
    config = T.ModernBertConfig(**{**BASE, **MLP, "cls_token_id": 0, "sep_token_id": 0}, attn_implementation="eager")
    return T.ModernBertForMaskedLM(config)


def openai() -> nn.Module:
    return T.OpenAIGPTLMHeadModel(T.OpenAIGPTConfig(vocab_size=97, n_positions=32, n_embd=16, n_layer=2, n_head=2))


def jet_moe() -> nn.Module:
    sizes = {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 2, "kv_channels": 8, "num_key_value_heads": 2}
    return T.JetMoeForCausalLM(T.JetMoeConfig(**sizes))


def deberta() -> nn.Module:
    return T.DebertaForMaskedLM(T.DebertaConfig(**FOUR, **MLP, max_position_embeddings=32))


def lfm2() -> nn.Module:
    return T.Lfm2ForCausalLM(T.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]))


def qwen3_next() -> nn.Module:
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4}
    sizes = {**GROUPED, **heads, "head_dim": 8, "mlp_only_layers": [0, 1], "layer_types": ["full_attention", "linear_attention"]}
    return T.Qwen3NextForCausalLM(T.Qwen3NextConfig(**sizes))


def dbrx() -> nn.Module:
    attention, experts = (
        {"kv_n_heads": 1, "clip_qkv": 1e6, "rope_theta": 1e4},
        {"ffn_hidden_size": 24, "moe_num_experts": 2, "moe_top_k": 2},
    )
    sizes = {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32, "hidden_size": 32}
    return T.DbrxForCausalLM(T.DbrxConfig(**sizes, attn_config=attention, ffn_config=experts))


def codegen() -> nn.Module:
    return T.CodeGenForCausalLM(T.CodeGenConfig(**TOKENS, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=32))


def big_code(multi_query: bool) -> Callable[[], nn.Module]:
    sizes = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    return lambda: T.GPTBigCodeForCausalLM(T.GPTBigCodeConfig(**sizes, multi_query=multi_query))


def mpt() -> nn.Module:
    return T.MptForCausalLM(T.MptConfig(vocab_size=97, d_model=32, n_heads=4, n_layers=2, max_seq_len=32))


def timesformer() -> nn.Module:
    return T.TimesformerModel(T.TimesformerConfig(**SEEN, **MLP, num_frames=2))


def sam() -> nn.Module:
    return T.SamVisionModel(
        T.SamVisionConfig(**SEEN, output_channels=8, mlp_dim=24, global_attn_indexes=[0], window_size=0, use_rel_pos=False)
    )


SEEN = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
PHI3 = {**MLP, "original_max_position_embeddings": 32, "max_position_embeddings": 32}
# The fused weight, its parts in the order of the stack (q, k, v; n: q with a norm; u: up, g: gate), and what scales v or u back.
CASES: dict[str, tuple[Callable[[], nn.Module], str, str, str]] = {
    "gpt2": (gpt2, "0.attn.c_attn.weight", "qkv", "0.attn.c_proj.weight"),
    "openai": (openai, "0.attn.c_attn.weight", "qkv", "0.attn.c_proj.weight"),
    "gpt_neox": (causal("GPTNeoX", **FOUR, **MLP), "0.attention.query_key_value.weight", "qkv", "0.attention.dense.weight"),
    "gpt_neox_japanese": (
        causal("GPTNeoXJapanese", **FOUR),
        "0.attention.query_key_value.weight",
        "qkv",
        "0.attention.dense.weight",
    ),
    "bloom": (
        causal("Bloom", vocab_size=97, hidden_size=32, n_layer=2, n_head=4),
        "0.self_attention.query_key_value.weight",
        "qkv",
        "0.self_attention.dense.weight",
    ),
    "persimmon": (
        causal("Persimmon", **FOUR, **MLP, qk_layernorm=False),
        "0.self_attn.query_key_value.weight",
        "qkv",
        "0.self_attn.dense.weight",
    ),
    "falcon, multi-query": (
        causal("Falcon", **FALCON, multi_query=True, new_decoder_architecture=False),
        "0.self_attention.query_key_value.weight",
        "qqqqkv",
        "0.self_attention.dense.weight",
    ),
    "falcon, grouped": (
        causal("Falcon", **FALCON, num_kv_heads=2, new_decoder_architecture=True),
        "0.self_attention.query_key_value.weight",
        "qqkv",
        "0.self_attention.dense.weight",
    ),
    "falcon, per head": (
        causal("Falcon", **FALCON, multi_query=False, new_decoder_architecture=False),
        "0.self_attention.query_key_value.weight",
        "qkv",
        "0.self_attention.dense.weight",
    ),
    "mpt": (mpt, "0.attn.Wqkv.weight", "qkv", "0.attn.out_proj.weight"),
    "codegen": (codegen, "0.attn.qkv_proj.weight", "qvk", "0.attn.out_proj.weight"),
    "big code, multi-query": (big_code(True), "0.attn.c_attn.weight", "qqqqkv", "0.attn.c_proj.weight"),
    "big code, per head": (big_code(False), "0.attn.c_attn.weight", "qkv", "0.attn.c_proj.weight"),
    "phi3": (causal("Phi3", **FOUR, **PHI3), "0.self_attn.qkv_proj.weight", "qkv", "0.self_attn.o_proj.weight"),
    "phi3, grouped": (
        causal("Phi3", **FOUR, **PHI3, num_key_value_heads=2),
        "0.self_attn.qkv_proj.weight",
        "qqkv",
        "0.self_attn.o_proj.weight",
    ),
    "phi3, mlp": (causal("Phi3", **FOUR, **PHI3), "0.mlp.gate_up_proj.weight", "gu", "0.mlp.down_proj.weight"),
    "glm": (causal("Glm", **GROUPED, head_dim=8), "0.mlp.gate_up_proj.weight", "gu", "0.mlp.down_proj.weight"),
    "modern bert": (modern_bert, "0.attn.Wqkv.weight", "qkv", "0.attn.Wo.weight"),
    "modern bert, mlp": (modern_bert, "0.mlp.Wi.weight", "gu", "0.mlp.Wo.weight"),
    "dbrx": (dbrx, "0.norm_attn_norm.attn.Wqkv.weight", "qqqqkv", "0.norm_attn_norm.attn.out_proj.weight"),
    "dbrx, experts": (dbrx, "0.ffn.experts.mlp.v1", "uu", "0.ffn.experts.mlp.w2"),
    "mixtral, experts": (
        causal("Mixtral", **EXPERTS, experts_implementation="eager"),
        "0.mlp.experts.gate_up_proj",
        "gu" * 4,
        "0.mlp.experts.down_proj",
    ),
    "jet moe, attention": (jet_moe, "0.self_attention.kv_proj.weight", "-v", "0.self_attention.experts.output_linear.weight"),
    "granite": (
        causal("GraniteMoeShared", **EXPERTS, shared_intermediate_size=24, experts_implementation="eager"),
        "0.shared_mlp.input_linear.weight",
        "gu",
        "0.shared_mlp.output_linear.weight",
    ),
    "deberta": (deberta, "0.attention.self.in_proj.weight", "qkv", "0.attention.output.dense.weight"),
    "lfm2, first and last": (lfm2, "0.conv.in_proj.weight", "q-k", "0.conv.out_proj.weight"),  # three factors of a product
    "lfm2, first two": (lfm2, "0.conv.in_proj.weight", "qk-", "0.conv.out_proj.weight"),
    "qwen3 next": (qwen3_next, "0.self_attn.q_proj.weight", "ng", "0.self_attn.o_proj.weight"),
    "jet moe": (jet_moe, "0.mlp.input_linear.weight", "gugu", "0.mlp.output_linear.weight"),
    "latent attention": (
        causal("DeepseekV3", **MLA, first_k_dense_replace=2),
        "0.self_attn.kv_b_proj.weight",
        "-v",
        "0.self_attn.o_proj.weight",
    ),
    "blip": (
        lambda: T.BlipVisionModel(T.BlipVisionConfig(**SEEN, **MLP)),
        "0.self_attn.qkv.weight",
        "qkv",
        "0.self_attn.projection.weight",
    ),
    "timesformer": (timesformer, "0.attention.attention.qkv.weight", "qkv", "0.attention.output.dense.weight"),
    "vit det": (
        lambda: T.VitDetModel(T.VitDetConfig(**SEEN, pretrain_image_size=8)),
        "0.attention.qkv.weight",
        "qkv",
        "0.attention.proj.weight",
    ),
    "sam": (sam, "0.attn.qkv.weight", "qkv", "0.attn.proj.weight"),
    "image gpt": (
        lambda: T.ImageGPTForCausalImageModeling(T.ImageGPTConfig(vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=32)),
        "0.attn.c_attn.weight",
        "qkv",
        "0.attn.c_proj.weight",
    ),
}


def randomized(model: nn.Module) -> nn.Module:
    """In double precision, with weights that are not small and without biases."""
    torch.manual_seed(0)
    model.double().eval().requires_grad_(True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn_like(p) / math.sqrt(p.shape[-1]))
            if "bias" in name:
                p.zero_()
    return model


def output_of(model: nn.Module) -> Tensor:
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            return model(images[:, None].repeat(1, 2, 1, 1, 1) if "Timesformer" in type(model).__name__ else images)[0]
        return model(input_ids=torch.arange(1, 13)[None]).logits


def scale_(p: Tensor, group: dict, factors: list[float]) -> None:
    """Multiply each matrix of the stack with its factor, in the parameter as it lies."""
    dims, order, shape = group["matrices"] or ((1, *p.shape), (0, 1, 2), (1, *p.shape))
    stack = torch.tensor(factors, dtype=p.dtype)[:, None, None].expand(shape)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    p.data.mul_(stack.reshape([dims[i] for i in order]).permute(inverse).reshape(p.shape))


@pytest.mark.parametrize("case", CASES)
def test_split_as_the_module_computes(case):
    make, suffix, parts, partner = CASES[case]
    model = randomized(make())
    groups = by_name(param_groups(model, 1e-3, 2e-2))
    (p, group), (other, _) = (next(v for n, v in groups.items() if n.endswith(s)) for s in (suffix, partner))
    assert group["update"] == "celo2"
    assert len(parts) == (group["matrices"][2][0] if group["matrices"] else 1)
    before, change, kept = output_of(model), {}, {name: q.detach().clone() for name, q in model.named_parameters()}
    for one, back, wholly in (("q", "k", (False, True)), ("v", "", (False, True)), ("u", "", (False, True)), ("n", "", (True,))):
        for compensated in wholly if one in parts else ():
            scale_(p, group, [2.0 if c == one else 0.5 if c == back and compensated else 1.0 for c in parts])
            if compensated and one in "vu":
                other.data.mul_(0.5)
            change[one, compensated] = (output_of(model) - before).abs().max().item()
            model.load_state_dict(kept, strict=False)
    for (one, compensated), difference in change.items():
        # Powers of two are exact: measured 0, and 1.5e-5 through the ε of a norm ("n"); not scaled back at least 0.035.
        assert difference <= (1e-4 if one == "n" else 1e-12) if compensated else difference > 1e-2, change


# --- layers whose outputs are computed again from the split matrices ---------------------------------------------------------


def split(model: nn.Module, name: str) -> Tensor:
    """The matrices (N, outputs, inputs) of one weight."""
    p, group = by_name(param_groups(model, 1e-3, 2e-2))[name]
    assert group["update"] == "celo2"
    return to_stack(p.detach(), tuple(p.shape), group["matrices"])


def test_qwen3_next_reads_the_two_numbers_of_each_value_head():
    """`in_proj_ba`: b and a of each key head, one after the other."""
    model = qwen3_next()
    (name, layer), *_ = ((n, m) for n, m in model.named_modules() if hasattr(m, "in_proj_ba"))
    p, group = by_name(param_groups(model, 1e-3, 2e-2, 0.1))[f"{name}.in_proj_ba.weight"]
    b, a = to_stack(p, tuple(p.shape), group["matrices"])
    x = torch.randn(2, 3, 16)
    *_, own_b, own_a = layer.fix_query_key_value_ordering(layer.in_proj_qkvz(x), layer.in_proj_ba(x))
    torch.testing.assert_close(x @ b.T, own_b)
    torch.testing.assert_close(x @ a.T, own_a)


def test_multihead_attention():
    layer = randomized(nn.MultiheadAttention(16, 2, batch_first=True))
    x = torch.randn(1, 5, 16, dtype=torch.float64)
    q, k, v = (x @ m.T for m in split(layer, "in_proj_weight"))
    q, k, v = (t.view(1, 5, 2, 8).transpose(1, 2) for t in (q, k, v))
    attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 5, 16)
    torch.testing.assert_close(layer(x, x, x)[0], attended @ layer.out_proj.weight.T)


@pytest.mark.parametrize("prefix", ["", "bidirectional"])
def test_lstm(prefix):
    layer = randomized(nn.LSTM(8, 6, bidirectional=bool(prefix)))
    x = torch.randn(1, 8, dtype=torch.float64)
    i, _, g, o = (x @ m.T for m in split(layer, "weight_ih_l0"))  # from a hidden state of zeros
    expected = o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()
    torch.testing.assert_close(layer(x)[0][:, :6], expected)
    assert split(layer, "weight_hh_l0").shape == (4, 6, 6)


def test_gru_and_plain_rnn():
    layer = randomized(nn.GRU(8, 6))
    x = torch.randn(1, 8, dtype=torch.float64)
    _, z, n = (x @ m.T for m in split(layer, "weight_ih_l0"))
    torch.testing.assert_close(layer(x)[0], (1 - z.sigmoid()) * n.tanh())
    assert split(nn.RNN(8, 6), "weight_ih_l0").shape == (6, 8)
    assert split(nn.GRUCell(8, 6), "weight_hh").shape == (3, 6, 6)
    assert split(nn.LSTM(8, 6, proj_size=4), "weight_hr_l0").shape == (4, 6)


@pytest.mark.parametrize("cls", [nn.Conv1d, nn.ConvTranspose1d])
def test_grouped_convolution(cls):
    layer = randomized(cls(8, 12, 3, groups=4, bias=False))
    x = torch.randn(1, 8, 5, dtype=torch.float64)
    outputs = []
    for matrix, part in zip(split(layer, "weight"), x.chunk(4, dim=1), strict=True):
        one = cls(2, 3, 3, bias=False).double()
        one.weight.data.copy_(matrix.view(one.weight.shape))
        outputs.append(one(part))
    torch.testing.assert_close(layer(x), torch.cat(outputs, dim=1))


def experts_of(name: str) -> tuple[nn.Module, int]:
    """A module of experts, and how many there are."""
    if name == "GptOss":
        model = gpt_oss()
        model.set_experts_implementation("eager")
        return model.model.layers[0].mlp.experts, 4
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    sizes = {
        "num_local_experts": 2,
        "intermediate_size": 24,
        "hidden_size": 16,
        "hidden_act": "silu",
        "moe_intermediate_size": 24,
    }
    sizes |= {"n_routed_experts": 2, "zero_expert_num": 0, "expert_ffn_hidden_size": 24}
    return {"Llama4": Llama4TextExperts, "LongcatFlash": LongcatFlashExperts, "Step3p7": Step3p7Experts}[name](
        SimpleNamespace(**sizes)
    ), 2


@pytest.mark.parametrize("name", ["GptOss", "Llama4", "LongcatFlash", "Step3p7"])
def test_experts(name):
    """Each expert's gate, up and down projection, whichever way they are stored."""
    module, n = experts_of(name)
    randomized(module)
    gate_up, down = split(module, "gate_up_proj"), split(module, "down_proj")
    x = torch.randn(n, 16, dtype=torch.float64) / 4
    if name == "Llama4":
        found = module(x)
    else:
        experts = torch.stack([torch.arange(n), torch.arange(n).roll(1)], dim=1)
        found = module(x, experts, torch.tensor([[1.0, 0.0]] * n, dtype=torch.float64))  # token i to expert i
    for i in range(n):
        gate, up = x[i] @ gate_up[2 * i].T, x[i] @ gate_up[2 * i + 1].T
        inner = (up + 1) * gate * torch.sigmoid(1.702 * gate) if name == "GptOss" else nn.functional.silu(gate) * up
        torch.testing.assert_close(found[i], inner @ down[i].T)


def test_grouped_linear():
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

    model = nn.ModuleDict({"layer": randomized(DeepseekV4GroupedLinear(8, 12, 4)), "after": nn.Linear(12, 3)})
    x = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    expected = torch.stack([x[..., i, :] @ m.T for i, m in enumerate(split(model, "layer.weight"))], dim=-2)
    torch.testing.assert_close(model["layer"](x).flatten(2), expected.flatten(2))


def mamba() -> nn.Module:
    sizes = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    return randomized(T.MambaForCausalLM(T.MambaConfig(**sizes)))


def test_mamba_reads_its_input_and_its_gate():
    """With the gate's matrix zero the mixer returns nothing; the other one is convolved."""
    model = mamba()
    matrices = split(model, "backbone.layers.0.mixer.in_proj.weight")
    mixer, x = model.backbone.layers[0].mixer, torch.randn(1, 5, 16, dtype=torch.float64)
    assert mixer(x).abs().max() > 1e-3
    for kept in (0, 1):
        mixer.in_proj.weight.data.copy_(torch.cat([matrices[i] if i == kept else torch.zeros_like(matrices[i]) for i in (0, 1)]))
        assert mixer(x).abs().max() == 0


def test_xlnet_by_heads():
    layer = nn.ModuleList(
        [T.XLNetModel(T.XLNetConfig(vocab_size=97, d_model=16, n_layer=1, n_head=2, d_inner=24)).layer[0].rel_attn]
    )
    randomized(layer)
    x = torch.randn(5, 1, 16, dtype=torch.float64)
    expected = torch.einsum("ibh,hnd->ibnd", x, layer[0].q).flatten(2)
    torch.testing.assert_close(expected, x @ split(layer, "0.q")[0].T)
    heads = torch.randn(5, 1, 2, 8, dtype=torch.float64)
    torch.testing.assert_close(torch.einsum("ibnd,hnd->ibh", heads, layer[0].o), heads.flatten(2) @ split(layer, "0.o")[0].T)


# --- what the table knows, and what it does not -------------------------------------------------------------------------------


@pytest.mark.slow  # 3 s: it reads all models of transformers
def test_the_table_and_the_code_of_transformers_agree():
    """Each class in the table is in the installed version and uses the attribute; each that has a fused linear layer is there."""
    folder = Path(T.__file__).parent / "models"
    code = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*/modeling_*.py")))
    bodies: dict[str, str] = defaultdict(str)  # of all classes of a name
    for name, body in re.findall(r"^class (\w+)\b.*?:\n(.*?)(?=^(?:class|def|@)|\Z)", code, re.MULTILINE | re.DOTALL):
        bodies[name] += body
    named = [(name.rpartition("."), attribute) for attribute, _, classes in FUSED for name in classes.split()]
    missing = [
        (name, used) for (package, _, name), used in named if package != "timm" and f"self.{used}" not in bodies.get(name, "")
    ]
    assert not missing
    known = {(name, used) for (_, _, name), used in named}
    fused = re.compile(
        r"self\.(qkv|qkv_proj|qkv_linear|query_key_value|Wqkv|c_attn|gate_up_proj) = (?:nn\.Linear|Conv1D|FalconLinear)\("
    )
    assert not {(name, used) for name, body in bodies.items() for used in fused.findall(body)} - known


class Attention(nn.Module):
    """As of timm: [q; k; v], per head where `head_first`, or with values of another width."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.num_heads, self.qkv = 2, nn.Linear(16, 64 if "val_dim" in options else 48)
        self.__dict__.update(options)


Attention.__module__ = "timm.layers.attention"


@pytest.mark.parametrize(
    ("options", "first"),  # the rows of the first matrix
    [
        ({}, range(16)),
        ({"head_first": True}, [*range(8), *range(24, 32)]),
        ({"key_dim": 8, "val_dim": 16}, [*range(8), *range(32, 40)]),
    ],
)
def test_timm(options, first):
    model = nn.ModuleDict({"blocks": nn.ModuleList([Attention(**options) for _ in range(2)]), "head": nn.Linear(16, 5)})
    assert torch.equal(split(model, "blocks.0.qkv.weight")[0], model["blocks"][0].qkv.weight[list(first)])


def test_class_of_the_same_name_elsewhere_is_not_taken_for_it():
    mine = type("Attention", (nn.Module,), {"__module__": "mine"})()
    mine.qkv, mine.out = nn.Linear(16, 48), nn.Linear(16, 16)
    groups = param_groups(nn.ModuleList([mine, nn.LayerNorm(3)]), 1e-3, 2e-2)
    assert by_name(groups)["0.qkv.weight"][1]["notes"] == {"0.qkv.weight": NOT_SPLIT}


def test_unequal_parts():
    """As pieces of the smallest, or in one piece, and both are said."""
    assert projection(16, 4, Split(1, (8, 4, 4)), "") == (((4, 4, 4), (0, 1, 2), (4, 4, 4)), IN_UNITS.format(4))
    assert projection(13, 4, Split(1, (8, 5)), "") == (None, NOT_SPLIT)


@pytest.mark.parametrize("name", ["_orig_mod", "_checkpoint_wrapped_module"])  # torch.compile, activation checkpointing
def test_fused_layer_is_known_inside_of_a_wrapper(name):
    model = gpt2()
    attention = model.transformer.h[0].attn
    attention.c_attn = nn.ModuleDict({name: attention.c_attn})
    p, group = next(
        value
        for name, value in by_name(param_groups(model, 1e-3, 2e-2)).items()
        if "h.0.attn.c_attn" in name and value[0].ndim == 2
    )
    assert group["matrices"][2] == (3, 16, 16) and p.shape == (16, 48)


def test_renamed_class_is_known_by_its_bases():
    """`fully_shard` makes FSDPGPTNeoXAttention of GPTNeoXAttention, and parametrizations rename classes, too."""
    model = CASES["gpt_neox"][0]()
    plain = routing_table(param_groups(model, 1e-3, 2e-2))
    for layer in model.gpt_neox.layers:
        layer.attention.__class__ = type("FSDPGPTNeoXAttention", (type(layer.attention),), {})
    assert routing_table(param_groups(model, 1e-3, 2e-2)) == plain
