"""Which configurations are the same function, and a GPT-2 as a GPT-3."""

import json

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from models import build_model
from models.function import changes_function, function_differences
from models.gpt2 import from_gpt2, gpt3_config, to_gpt2

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}


def config_of(model_type="qwen3", **keys):
    return build_model(hf={"model_type": model_type, **SMALL, **keys}, vocab_size=99, device="meta").config


def saved(config, **changes):
    """As a config.json holds it; a change to None leaves the key out."""
    tree = json.loads(config.to_json_string(use_diff=False)) | changes
    return {key: value for key, value in tree.items() if key not in changes or changes[key] is not None}


@pytest.mark.parametrize(
    ("keys", "changed"),
    [
        ({"rope_theta": 5e4}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_parameters.rope_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"num_attention_heads": 8, "head_dim": 4}, "num_attention_heads"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "layer_types"),
        ({"pad_token_id": 3}, "pad_token_id"),  # freezes a row of the embedding
    ],
)
def test_what_changes_the_function_is_named(keys, changed):
    old = saved(config_of())
    assert function_differences(old, config_of()) == {}
    assert changed in function_differences(old, config_of(**keys))
    assert function_differences(saved(config_of(**keys)), config_of(**keys)) == {}


def test_what_does_not_change_the_function_is_not():
    free = {"attention_dropout": 0.1, "initializer_range": 0.1, "use_cache": False, "eos_token_id": 5, "_name_or_path": "x"}
    old = saved(config_of(), **free, transformers_version="4.0.0", dtype="bfloat16", architectures=["X"], id2label={"0": "a"})
    assert function_differences(old, config_of()) == {}
    for key in ("resid_pdrop", "hidden_dropout_prob", "layerdrop", "text_config.attention_dropout", "torch_dtype"):
        assert not changes_function(key)


def test_keys_that_versions_of_transformers_add_or_drop_do_not_count():
    """A key that the checkpoint lacks has today's default; one that today's class does not know counts if a user gave it."""
    here = config_of()
    assert function_differences(saved(here, attention_bias=None, max_window_layers=None), here) == {}
    assert function_differences(saved(here, attention_bias=None), config_of(attention_bias=True)) == {
        "attention_bias": (False, True)
    }
    dropped = saved(here, key_of_another_version=7)
    assert function_differences(dropped, here) == {}
    assert function_differences(dropped, here, given={"key_of_another_version"}) == {"key_of_another_version": (7, "not set")}
    # Where RoPE's base stood before transformers 5.
    old = saved(config_of(rope_theta=7e4), rope_parameters=None) | {"rope_theta": 7e4, "rope_scaling": None}
    assert function_differences(old, config_of(rope_theta=7e4)) == {}
    assert "rope_parameters.rope_theta" in function_differences(old, here)


def test_another_architecture_and_texts_for_numbers():
    assert function_differences(saved(config_of()), config_of("llama")) == {"model_type": ("qwen3", "llama")}
    assert function_differences(saved(config_of(rms_norm_eps=1e-5), rms_norm_eps=0.00001), config_of(rms_norm_eps=1e-5)) == {}


def gpt2(**keys):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=99, n_positions=16, n_embd=32, n_layer=2, n_head=4, **keys)).eval()


@pytest.mark.parametrize("tied", [True, False])
def test_a_gpt2_becomes_a_gpt3_and_comes_back(tied):
    model = gpt2(tie_word_embeddings=tied)
    ours = from_gpt2(model, gpt3_config(model.config, dropout=0.1))
    ids = torch.randint(99, (2, 16))
    assert ours.config.dropout == 0.1
    torch.testing.assert_close(ours(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)  # worst measured 6e-7
    back = to_gpt2(ours).state_dict()
    assert all(torch.equal(value, back[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "keys",
    [
        {"activation_function": "relu"},
        {"layer_norm_epsilon": 1e-6},
        {"n_inner": 64},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
)
def test_a_gpt2_that_is_another_function_does_not(keys):
    assert gpt3_config(GPT2Config(n_embd=32, n_head=4, **keys), 0.0) is None
