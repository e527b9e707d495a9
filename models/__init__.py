"""GPT-3 as a transformers model, any other causal language model by its configuration, and their loss in chunks.

    model = build_model(size="gpt3-125m", vocab_size=50257)
    loss = CausalLMLoss(model)(input_ids, targets)      # a sum over tokens, in nats

Importing this package registers "gpt3" with transformers' Auto classes.
"""

from models.build import ModelError, build_model, longest_context, one_line
from models.flops import flops_per_token, peak_flops
from models.loss import CausalLMLoss, LossMismatch, choose_loss, chunked_cross_entropy, unused_parameters
from models.sizes import SIZES

__all__ = [
    "SIZES",
    "CausalLMLoss",
    "LossMismatch",
    "ModelError",
    "build_model",
    "choose_loss",
    "chunked_cross_entropy",
    "flops_per_token",
    "longest_context",
    "one_line",
    "peak_flops",
    "unused_parameters",
]
