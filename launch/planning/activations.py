"""Estimates of what forward and backward passes hold beside weights and gradients, in elements."""

from __future__ import annotations

from transformers import PreTrainedModel

from models.loss import chunk_size
from models.recompute import OPERATIONS, every

# In units of the model's width, a block of a GPT keeps for each token: two norms and their inputs (4); q, k, v and the output of
# attention, which is also the input of its projection (4); the feed-forward part (4 + 4). Of these, matrix products and attention
# make 10: q, k, v, the output of attention, the outputs of both projections, and 4. With the block's input that is 11.
OF_A_BLOCK, OF_OPERATIONS = 16, 11
OF_THE_END = 4  # what the last norm reads and writes, and the gradients of both


def activation_elements(model: PreTrainedModel, micro_batch: int, context: int, choice: bool | str) -> int:
    """About how many elements the forward pass keeps for the backward pass; `choice` is `model.gradient_checkpointing`.

    A block that is recomputed keeps its input until the backward pass reaches it. The last one is the first to be recomputed,
    when the blocks behind it are done.
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
