"""GPT-3 as a transformers model, any other causal language model by its configuration, and their loss in chunks.

    model = build_model(size="gpt3-125m", vocab_size=50257)
    loss = CausalLMLoss(model)(input_ids, targets)      # a sum over tokens, in nats

Importing this package registers "gpt3" with transformers' Auto classes.
"""

from models.build import ModelError, build_model
from models.flops import flops_per_token, peak_flops
from models.loss import CausalLMLoss, LossMismatch, check_matches_logits, chunked_cross_entropy
from models.sizes import SIZES

__all__ = [
    "SIZES",
    "CausalLMLoss",
    "LossMismatch",
    "ModelError",
    "build_model",
    "check_matches_logits",
    "chunked_cross_entropy",
    "flops_per_token",
    "peak_flops",
]
