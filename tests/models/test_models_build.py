"""Building models: GPT-3 by name and number, any architecture by its configuration, every error; FLOPs."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from models import SIZES, CausalLMLoss, ModelError, build_model, flops_per_token, longest_context, peak_flops
from models.gpt3 import GPT3LMHeadModel

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA3 = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32}
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def test_numbers_override_the_named_size():
    config = build_model(size="gpt3-tiny", layers=3, context=32, vocab_size=99, dropout=0.1).config
    assert (config.layers, config.width, config.heads, config.context) == (3, 64, 4, 32)
    assert (config.vocab_size, config.dropout) == (99, 0.1)
    assert SIZES["gpt3-tiny"].layers == 2


def test_any_architecture_by_its_configuration():
    model = build_model(hf=LLAMA, vocab_size=99, gradient_checkpointing=True)
    assert type(model).__name__ == "LlamaForCausalLM" and model.training
    assert model.config.vocab_size == 99 and model.model.layers[0].gradient_checkpointing
    assert model.config.bos_token_id is None and model.config.eos_token_id is None
    assert build_model(hf={**LLAMA, "vocab_size": 128, "eos_token_id": 5}, vocab_size=99).config.vocab_size == 128
    assert build_model(hf={**LLAMA, "eos_token_id": 5}, vocab_size=99).config.eos_token_id == 5
    # Gemma's own padding id, 0, would keep the embedding of token 0 at zero.
    gemma = build_model(hf={**LLAMA, "model_type": "gemma", "head_dim": 16}, vocab_size=99)
    assert gemma.get_input_embeddings().padding_idx is None and gemma.get_input_embeddings().weight[0].any()
    assert build_model(hf={**LLAMA, "rope_theta": 5000.0}, vocab_size=99).config.rope_parameters["rope_theta"] == 5000.0


def test_keys_that_only_the_modelling_code_reads():
    for model_type in ("qwen3_moe", "glm4_moe"):
        small = {**LLAMA, "model_type": model_type, "moe_intermediate_size": 16, "num_hidden_layers": 1}
        model = build_model(hf={**small, "head_dim": 32}, vocab_size=99, device="meta")
        assert model.model.layers[0].self_attn.q_proj.weight.shape == (4 * 32, 64)
        assert type(model.config)(**model.config.to_dict()).head_dim == 32  # config.json keeps it
    nested = {"kv_n_heads": 1, "clip_qkv": 8.0, "rope_theta": 1e4}  # the last is not declared
    dbrx = {"model_type": "dbrx", "d_model": 32, "n_heads": 2, "n_layers": 1, "attn_config": nested}
    assert build_model(hf=dbrx, vocab_size=99, device="meta").config.attn_config.rope_theta == 1e4


def test_a_composite_stands_for_its_text_model():
    model = build_model(hf={"model_type": "gemma3", "text_config": {**GEMMA3, "hidden_size": 48}}, vocab_size=99, device="meta")
    assert model.config.model_type == "gemma3_text" and model.config.hidden_size == 48


def test_special_tokens_that_a_class_insists_on_keep_its_default():
    config = build_model(hf={**LLAMA, "model_type": "cwm", "layer_types": None}, vocab_size=99, device="meta").config
    assert config.pad_token_id is None and isinstance(config.bos_token_id, int)


def test_the_longest_context_has_many_names():
    lengths = {"llama": "max_position_embeddings", "mpt": "max_seq_len", "gpt2": "n_positions", "kimi_linear": "model_max_length"}
    for model_type, name in lengths.items():
        assert longest_context(AutoConfig.for_model(model_type, **{name: 77})) == 77
    assert longest_context(AutoConfig.for_model("bloom")) is None and longest_context(AutoConfig.for_model("mamba")) is None


def test_the_same_seed_gives_the_same_weights():
    for hf in (None, LLAMA):
        size = "gpt3-tiny" if hf is None else None
        weights = []
        for _ in range(2):
            torch.manual_seed(11)
            weights.append(build_model(size=size, hf=hf, vocab_size=99).state_dict())
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_callers_dictionary_is_left_alone():
    hf = dict(LLAMA)
    build_model(hf=hf, vocab_size=99, device="meta")
    assert hf == LLAMA


GOOD = {"layers": 2, "width": 32, "heads": 4, "context": 16, "vocab_size": 99}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "gpt3-125M", "vocab_size": 9}, r"unknown size 'gpt3-125M'; did you mean 'gpt3-125m'\? Sizes are gpt3-125m, "),
        ({"size": "banana", "vocab_size": 9}, "unknown size 'banana'; sizes are gpt3-125m, "),
        ({"vocab_size": 9}, "give a size, or all of .*: layers, width, heads, context missing"),
        ({"layers": 2, "width": 32, "vocab_size": 9}, "heads, context missing"),
        ({**GOOD, "heads": 5}, "5 heads do not divide the width 32"),
        ({**GOOD, "layers": 0}, "layers must be a positive integer, got 0"),
        ({**GOOD, "width": 32.0}, r"width must be a positive integer, got 32\.0"),
        ({**GOOD, "heads": True}, "heads must be a positive integer, got True"),
        ({**GOOD, "vocab_size": -1}, "vocab_size must be a positive integer, got -1"),
        ({**GOOD, "vocab_size": None}, "vocab_size must be a positive integer, got None"),
        ({**GOOD, "dropout": 1.0}, r"dropout must be a probability, 0 <= dropout < 1, got 1\.0"),
        ({**GOOD, "dropout": "0.1"}, "dropout must be a probability"),
        ({"hf": LLAMA, "size": "gpt3-tiny", "vocab_size": 9}, "hf and size exclude each other"),
        ({"hf": LLAMA, **GOOD, "dropout": 0.1}, "hf and layers, width, heads, context, dropout exclude each other"),
        ({"hf": {}, "vocab_size": 9}, "hf needs a model_type"),
        (
            {"hf": {"model_type": "qwen33"}, "vocab_size": 9},
            "no causal language model of model_type 'qwen33'; did you mean",
        ),
        ({"hf": {"model_type": "vit"}, "vocab_size": 9}, "'vit' is a model of transformers, but not a causal language model"),
        ({"hf": {"model_type": "t5"}, "vocab_size": 9}, "'t5' is a model of transformers, but not a causal language model"),
        ({"hf": {"model_type": ["llama"]}, "vocab_size": 9}, r"hf\.model_type must be a name, such as qwen3, got \['llama'\]$"),
        ({"hf": {"model_type": {"a": 1}}, "vocab_size": 9}, r"hf\.model_type must be a name, such as qwen3, got {'a': 1}$"),
        (
            {"hf": {**LLAMA, "attention_dropout": 2.0}, "vocab_size": 9},
            r"^llama: attention_dropout must be .*, 0 <= .* < 1, got 2\.0$",
        ),
        (
            {"hf": {"model_type": "gpt2", "n_head": 2, "resid_pdrop": -0.5}, "vocab_size": 9},
            r"^gpt2: resid_pdrop must .* got -0\.5$",
        ),
        ({"hf": {"model_type": "banana"}, "vocab_size": 9}, "no causal language model of model_type 'banana'$"),
        ({"hf": {**LLAMA, "model_type": "gemma3"}, "vocab_size": 9}, "'gemma3' is a composite.*keys alone, in hf.text_config"),
        (
            {"hf": {"model_type": "gemma3", "text_config": {"hiden_size": 64}}, "vocab_size": 9},
            "gemma3_text has no configuration key 'hiden_size'; did you mean 'hidden_size'?",
        ),
        ({"hf": {"model_type": "musicgen"}, "vocab_size": 9}, "'musicgen' is a composite.* does not offer by itself"),
        (
            {"hf": {**LLAMA, "model_type": "qwen3_moe", "hed_dim": 32}, "vocab_size": 9},
            "qwen3_moe has no configuration key 'hed_dim'; did you mean 'head_dim'?",
        ),
        (
            {"hf": {"model_type": "mpt", "attn_config": {"alibbi": True}}, "vocab_size": 9},
            "mpt.attn_config has no configuration key 'alibbi'; did you mean 'alibi'?",
        ),
        ({"hf": {**LLAMA, "trust_remote_code": True}, "vocab_size": 9}, "llama has no configuration key 'trust_remote_code'$"),
        ({"hf": {**LLAMA, "attn_implementation": "flash_attention_2"}, "vocab_size": 9}, "^llama: .*FlashAttention2"),
        (
            {"hf": {**LLAMA, "model_type": "ministral"}, "vocab_size": 9},
            "^ministral: unsupported operand .*; keys without a value are head_dim",
        ),
        ({"hf": {"model_type": "gemma3"}, "vocab_size": 9}, "'gemma3' is a composite.*did you mean 'gemma3_text'"),
        (
            {"hf": {"model_type": "llama", "hiden_size": 64}, "vocab_size": 9},
            "llama has no configuration key 'hiden_size'; did you mean 'hidden_size'?",
        ),
        ({"hf": {**LLAMA, "vocab_size": 50}, "vocab_size": 99}, "hf.vocab_size 50 is smaller than the tokenizer's 99"),
        ({"hf": {**LLAMA, "vocab_size": "50"}, "vocab_size": 9}, "vocab_size must be a positive integer, got '50'"),
        ({"hf": {**LLAMA, "hidden_size": "wide"}, "vocab_size": 9}, "^llama: .*hidden_size"),
        ({"hf": {**LLAMA, "num_attention_heads": 5}, "vocab_size": 9}, "^llama: .*64.*5"),
        ({"hf": {**LLAMA, "pad_token_id": 12}, "vocab_size": 9}, "^llama: "),
    ],
)
def test_every_user_error_is_one_clear_line(arguments, message):
    with pytest.raises(ModelError, match=message) as caught:
        build_model(**arguments)
    assert "\n" not in str(caught.value)


def counted(model, vocab_size=99, tokens=(2, 32)):
    """-> (matmul, attention) FLOPs a token of one forward and backward pass, as torch counts what it runs."""
    ids = torch.randint(vocab_size, (tokens[0], tokens[1] + 1), generator=torch.Generator().manual_seed(0))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # attention as two plain matmuls
        CausalLMLoss(model)(ids[:, :-1], ids[:, 1:]).backward()
    count = {str(operation): flops for operation, flops in counter.get_flop_counts()["Global"].items()}
    attention = count.pop("aten.bmm", 0)
    return sum(count.values()) / (tokens[0] * tokens[1]), attention / (tokens[0] * tokens[1])


@pytest.mark.parametrize("hf", [None, {**LLAMA, "model_type": "qwen3", "head_dim": 32}], ids=["gpt3", "qwen3"])
def test_flops_per_token_are_what_torch_counts(hf):
    model = build_model(size=None if hf else "gpt3-tiny", hf=hf, vocab_size=99)
    matmuls, attention = counted(model)
    assert flops_per_token(model, context=0) == matmuls
    # Transformers 5.17 computes rotary angles by bmm too, 16 FLOPs of these 98,320; 5.23 does not.
    assert flops_per_token(model, context=32) - flops_per_token(model, context=0) == pytest.approx(attention, rel=2e-4)
    own_context = 64 if hf else 128
    assert flops_per_token(model) == flops_per_token(model, context=own_context)


ARIA = {**LLAMA, "model_type": "aria_text", "moe_num_experts": 4, "moe_num_shared_experts": 1}
GEMMA4 = {
    **{**GEMMA3, "model_type": "gemma4_text", "hidden_size": 64, "num_hidden_layers": 2, "global_head_dim": 16},
    **{"enable_moe_block": True, "num_experts": 4, "moe_intermediate_size": 96},
    **{"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
}
DBRX = {"model_type": "dbrx", "d_model": 64, "n_heads": 4, "n_layers": 2, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}}
LONGCAT = {
    **{"model_type": "longcat_flash", "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "n_routed_experts": 4},
    **{"zero_expert_num": 2, "expert_ffn_hidden_size": 96, "ffn_hidden_size": 96, "q_lora_rank": 16, "kv_lora_rank": 16},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
}


def with_experts(visited, name):
    """A model with two layers of four experts of 64 x 96 of which a token visits so many."""
    if name == "dbrx":
        return {**DBRX, "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": visited}}
    models = {
        "mixtral": (MIXTRAL, "num_experts_per_tok"),
        "aria_text": (ARIA, "moe_topk"),
        "gemma4_text": (GEMMA4, "top_k_experts"),
        "longcat_flash": (LONGCAT, "moe_topk"),
    }
    hf, key = models[name]
    return {**hf, key: visited}


@pytest.mark.parametrize("name", ["mixtral", "aria_text", "gemma4_text", "dbrx", "longcat_flash"])
def test_flops_of_experts_count_only_the_visited(name):
    all_four = flops_per_token(build_model(hf=with_experts(4, name), vocab_size=99, device="meta"), 0)
    two = flops_per_token(build_model(hf=with_experts(2, name), vocab_size=99, device="meta"), 0)
    assert all_four - two == 6 * 2 * 2 * 3 * 64 * 96  # layers x experts x (gate, up, down) matrices


def test_flops_of_the_largest_size_need_no_memory():
    # 6 x 174.0e9 matmul parameters + 12 x 96 x 12288 x 2048
    flops = flops_per_token(build_model(size="gpt3-175b", vocab_size=50257, device="meta"))
    assert flops == 6 * (96 * 12 * 12288**2 + 50257 * 12288) + 12 * 96 * 12288 * 2048


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("A100-PCIE-40GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA RTX A6000", None),
        ("AMD Instinct MI300X", 1307e12),
        ("AMD Instinct MI250X", None),
        ("Intel(R) Xeon(R) CPU", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_peak_flops(name, expected):
    assert peak_flops(name, torch.bfloat16) == peak_flops(name, torch.float16) == expected
    assert peak_flops(name, torch.float32) is None


def test_importing_registers_gpt3_with_transformers():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("gpt3", layers=1, width=8, heads=2, context=4, vocab_size=5)
    assert type(AutoModelForCausalLM.from_config(config)) is GPT3LMHeadModel
