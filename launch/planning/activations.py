"""What forward and backward passes hold beside weights and gradients, in elements."""

from __future__ import annotations

from transformers import PreTrainedModel

from models.loss import chunk_size
from models.recompute import OPERATIONS, every

# Widths that a block of a GPT keeps for a token: two norms and what they read (4), q, k, v, attention's output, its projection's
# input (5, the last two are one), 4 + 4 in the feed-forward part. Of these, matrix products and attention make q, k, v,
# attention's output, both outputs of the projections and 4; and the block's input is kept.
OF_A_BLOCK, OF_OPERATIONS = 16, 11
OF_THE_END = 4  # what the last norm reads and writes, and the gradients of both


def activation_elements(model: PreTrainedModel, micro_batch: int, context: int, choice: bool | str) -> int:
    """Elements that the forward pass keeps for the backward pass, about, with the choice of `model.gradient_checkpointing`.

    A block that is computed again keeps its input, until its turn comes: the last first, when those behind it are done.
    """
    config = model.config.get_text_config()
    blocks, interval = config.num_hidden_layers, every(choice)
    again, behind = (-(-blocks // interval), (blocks - 1) % interval) if interval else (0, blocks)
    kept = OF_OPERATIONS if str(choice).lower() == OPERATIONS else 1
    widths = (blocks - again) * OF_A_BLOCK + again * kept + max(0, OF_A_BLOCK - kept - behind * OF_A_BLOCK)
    widths += OF_THE_END
    return micro_batch * context * config.hidden_size * widths


def recomputed_share(choice: bool | str) -> float:
    """The part of the forward pass's FLOPs that the backward pass repeats; matrix products are nearly all of them."""
    interval = every(choice)
    return 1 / interval if interval and str(choice).lower() != OPERATIONS else 0.0


def loss_elements(model: PreTrainedModel, tokens: int) -> int:
    """Float32 elements that the loss of a micro-batch holds: three chunks of logits and the gradient of the output projection."""
    vocabulary, width = model.get_output_embeddings().weight.shape
    return 3 * min(tokens, chunk_size(tokens)) * vocabulary + vocabulary * width
