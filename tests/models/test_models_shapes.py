"""Odd but legal sizes: they train, or one line says which numbers do not fit each other."""

import pytest
import torch

from models import CausalLMLoss, ModelError, build_model
from models.loss import choose_loss

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
QWEN = SMALL | {
    "model_type": "qwen3_moe",
    "hidden_size": 40,
    "moe_intermediate_size": 32,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
MIXTRAL = SMALL | {"model_type": "mixtral", "hidden_size": 40, "intermediate_size": 56, "num_local_experts": 5}
DEEPSEEK = SMALL | {
    **{"model_type": "deepseek_v3", "hidden_size": 40, "intermediate_size": 56, "moe_intermediate_size": 32},
    **{"num_key_value_heads": 4, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
    "first_k_dense_replace": 1,
    **{"q_lora_rank": 24, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10},
}
STABLELM = SMALL | {"model_type": "stablelm", "hidden_size": 64, "intermediate_size": 75}


@pytest.mark.parametrize(
    "hf",
    [
        QWEN | {"head_dim": 12},
        QWEN | {"hidden_size": 36, "moe_intermediate_size": 20, "head_dim": 10},
        QWEN | {"moe_intermediate_size": 33},
        DEEPSEEK,
        DEEPSEEK | {"hidden_size": 33, "moe_intermediate_size": 7},
        STABLELM,
        MIXTRAL | {"intermediate_size": 30},
    ],
    ids=["qwen3_moe-head_dim", "qwen3_moe-36", "qwen3_moe-33", "deepseek_v3", "deepseek_v3-33", "stablelm", "mixtral-30"],
)
def test_odd_sizes_train(hf):
    model = build_model(hf=hf, vocab_size=99)
    choose_loss(model)
    tokens = torch.randint(99, (2, 32), generator=torch.Generator().manual_seed(0))
    CausalLMLoss(model)(tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_experts_one_after_the_other_equal_the_grouped_product():
    """Sizes that both can compute; those of a multiple of 8 keep the grouped product."""
    tokens = torch.randint(99, (2, 16), generator=torch.Generator().manual_seed(0))
    model = build_model(hf=QWEN, vocab_size=99).eval()
    assert model.config._experts_implementation == "grouped_mm"
    assert build_model(hf=QWEN | {"hidden_size": 36}, vocab_size=99).config._experts_implementation == "eager"
    logits = []
    for implementation in ("grouped_mm", "eager"):
        model.set_experts_implementation(implementation)
        logits.append(model(tokens).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-5 * logits[0].abs().max()  # measured 0


@pytest.mark.parametrize(
    ("hf", "hint"),
    [
        (STABLELM | {"hidden_size": 48}, "of which rotary positions take 3: that must be even"),
        (MIXTRAL | {"hidden_size": 36}, "a head has 9 dimensions, of which rotary positions take 9: that must be even"),
        (QWEN | {"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide num_attention_heads, 4"),
        (DEEPSEEK | {"head_dim": 24}, "head_dim is 24, which is the rotary part of a head here and must be qk_rope_head_dim, 8"),
        (DEEPSEEK | {"topk_group": 3}, "topk_group is 3, but must be at most n_group, 2"),
        (QWEN | {"num_experts_per_tok": 7}, "num_experts_per_tok is 7, but must be at most num_experts, 6"),
        (DEEPSEEK | {"n_group": 4, "n_routed_experts": 6}, "n_group is 4, which does not divide n_routed_experts, 6"),
    ],
)
def test_numbers_that_do_not_fit_are_named(hf, hint):
    with pytest.raises(ModelError) as found:
        choose_loss(build_model(hf=hf, vocab_size=99))
    assert hint in str(found.value) and "\n" not in str(found.value)
