"""Cross-entropy of a language model without ever holding all of its logits, and the loss module that train.py wraps.

At a vocabulary of 50,257 the float32 logits of 16 sequences of 2,048 tokens are 6.6 GB, and naive cross-entropy holds
several such arrays. `chunked_cross_entropy` goes through the tokens in chunks and computes the gradients at once. So it
holds one chunk of logits, and the gradients, which have the sizes of its inputs. (The idea is Liger Kernel's fused linear
cross-entropy, arXiv 2410.10989; this is plain torch.)

Shapes: N tokens, C tokens of one chunk, D width, V vocabulary, B batch, T time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

IGNORE_INDEX = -100  # the target of a token that does not count
# 1,024 rows are enough to fill a GPU's matmul units; the two float32 arrays of 1,024 x 50,257 are 0.4 GB.
CHUNK_TOKENS = 1024
CHUNKS = 8  # of fewer tokens: an eighth at a time is 0.13 of the naive loss's memory, and faster (docs/benchmarks.md)
# With fewer rows adding to the weight's gradient costs more than the products: 64 took 1.32 of the naive loss's time, 128 0.99.
LEAST_CHUNK_TOKENS = 128


class LossMismatch(ValueError):
    """The loss module and the model's own logits disagree: the architecture does something unknown to the loss."""


def chunk_size(tokens: int) -> int:
    """Tokens C of a chunk by default: an eighth of N, from `LEAST_CHUNK_TOKENS` to `CHUNK_TOKENS`."""
    return min(CHUNK_TOKENS, max(LEAST_CHUNK_TOKENS, -(-tokens // CHUNKS)))


def cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """What `chunked_cross_entropy` must equal, with all (N, V) logits at once and torch's own gradients."""
    logits = F.linear(hidden, weight, bias)  # (N, D), (V, D) -> (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """hidden (N, D), weight (V, D), targets (N,) int64 -> float32 SUM over tokens of -log softmax(z)[target], in nats.

    z = softcap * tanh(s / softcap), s = scale * (hidden @ weight.T + bias (V,)). Tokens with the target -100 do not count.
    Matmuls run in autocast's dtype where autocast is on, else in hidden's. The softmax is in float32, and the weight's
    gradient is accumulated in float32. Gradients have their inputs' dtypes; they are computed in the forward pass, only
    where they are wanted, and held until backward. (float64 stays float64.) `chunk_tokens` is by default `chunk_size(N)`.
    ValueError on wrong shapes.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or targets.shape != hidden.shape[:1]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}"
        raise ValueError(f"expected hidden (N, D), weight (V, D) and targets (N,), got {shapes}")
    if chunk_tokens is None:
        chunk_tokens = chunk_size(len(targets))
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    # Inside a Function gradients are always off and needs_input_grad ignores no_grad, so it is asked here.
    wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias))
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, targets, scale, softcap, chunk_tokens, wanted)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, softcap, chunk_tokens, wanted):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype  # of matmuls
        accumulator = torch.promote_types(dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=accumulator) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=accumulator) if wanted[2] else None
        loss = hidden.new_zeros((), dtype=accumulator)
        with torch.autocast(device, enabled=False):
            w = weight.to(dtype)
            b = None if bias is None else bias.to(dtype)
            for start in range(0, len(hidden), chunk_tokens):
                chunk = slice(start, start + chunk_tokens)
                h = hidden[chunk].to(dtype)  # (C, D)
                chunk_loss, dz = _logits_loss(F.linear(h, w, b), targets[chunk], scale, softcap, any(wanted))
                loss += chunk_loss
                if dz is None:
                    continue
                if grad_bias is not None:
                    grad_bias += dz.sum(0)  # (C, V) -> (V,)
                dz = dz.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[chunk] = dz @ w  # (C, V), (V, D) -> (C, D)
                if grad_weight is not None:
                    grad_weight += dz.T @ h  # (V, C), (C, D) -> (V, D)
                del dz  # or it would live beside the next chunk's logits
        pairs = zip((grad_hidden, grad_weight, grad_bias), (hidden, weight, bias), strict=True)
        ctx.save_for_backward(*(None if grad is None else grad.to(x.dtype) for grad, x in pairs))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        # Not in place: backward may run again on the same graph.
        grads = (None if grad is None else grad * grad_loss.to(grad.dtype) for grad in ctx.saved_tensors)
        return *grads, None, None, None, None, None


def _logits_loss(z, targets, scale, softcap, want_gradient):
    """z = hidden @ weight.T + bias (C, V), targets (C,) -> loss (), its gradient in z (C, V) or None, float32."""
    accumulator = torch.promote_types(z.dtype, torch.float32)
    if scale != 1.0:
        z = z.to(accumulator) * scale
    if softcap is not None:
        z = torch.tanh(z.to(accumulator) / softcap) * softcap
    log_p = F.log_softmax(z, dim=1, dtype=accumulator)  # (C, V)
    valid = targets != IGNORE_INDEX  # (C,)
    target = torch.where(valid, targets, 0).unsqueeze(1)  # (C, 1)
    loss = -torch.where(valid, log_p.gather(1, target).squeeze(1), 0).sum()
    if not want_gradient:
        return loss, None
    # softmax - onehot(target), zero in ignored rows; then back through the softcap and the scale. In place: one (C, V).
    dz = log_p.exp_()
    dz.scatter_add_(1, target, dz.new_full((), -1.0).expand_as(target))
    dz.mul_(valid.unsqueeze(1) * scale)
    if softcap is not None:
        dz.mul_(1 - (z / softcap).square())
    return loss, dz


def logit_scale_and_softcap(config) -> tuple[float, float | None]:
    """The factor on the logits and the softcap, or None, that a transformers configuration asks for."""
    scale = 1.0
    if getattr(config, "logits_scaling", None) is not None:  # Granite divides
        scale /= config.logits_scaling
    for multiplier in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
        if getattr(config, multiplier, None) is not None:
            scale *= getattr(config, multiplier)
    return scale, getattr(config, "final_logit_softcapping", None)  # Gemma 2


class CausalLMLoss(nn.Module):
    """A causal LM and its loss as one module: forward(input_ids (B, T), targets (B, T)) -> float32 scalar, in nats.

    The SUM, over the targets that are not -100, of -log p(targets[:, t] | input_ids[:, :t + 1]): the targets are shifted
    already. Wrap this module with DDP or FSDP, not the model inside: it reads the output projection's weight itself.

    Mixture of experts: the router's load-balancing loss is added in training mode, and only if the configuration's
    `output_router_logits` is true; the sum then grows by router_aux_loss_coef x that loss x the number of targets, as
    the model's own (mean) loss would. Evaluation is cross-entropy alone.

    LossMismatch for a model without a base model or an output projection. `check_matches_logits` finds other causes.
    """

    def __init__(self, model: PreTrainedModel, chunk_tokens: int | None = None):
        super().__init__()
        name = type(model).__name__
        if model.base_model is model or getattr(model.get_output_embeddings(), "weight", None) is None:
            raise LossMismatch(f"{name} has no base model and output projection: the loss cannot compute its logits")
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.scale, self.softcap = logit_scale_and_softcap(model.config)
        self.balance_experts = getattr(model.config, "output_router_logits", False)
        if self.balance_experts and not hasattr(model, "router_aux_loss_coef"):
            raise LossMismatch(f"the loss does not know the router loss of {name}: set output_router_logits to false")

    def forward(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        balance = self.balance_experts and self.training
        routing = {"output_router_logits": True} if balance else {}
        outputs = self.model.base_model(input_ids=input_ids, use_cache=False, **routing)
        head = self.model.get_output_embeddings()
        loss = chunked_cross_entropy(
            outputs.last_hidden_state.flatten(0, 1),  # (B, T, D) -> (BT, D)
            head.weight,
            targets.flatten(),  # (B, T) -> (BT,)
            bias=getattr(head, "bias", None),
            scale=self.scale,
            softcap=self.softcap,
            chunk_tokens=self.chunk_tokens,
        )
        if balance:
            model, routed = self.model, getattr(outputs, "router_logits", None)
            if not routed:
                raise LossMismatch(f"{type(model).__name__} gives no router logits: set output_router_logits to false")
            uneven = load_balancing_loss_func(routed, model.num_experts, model.num_experts_per_tok)
            loss = loss + model.router_aux_loss_coef * uneven * (targets != IGNORE_INDEX).sum()
        return loss


@torch.no_grad()
def check_matches_logits(loss: CausalLMLoss) -> None:
    """LossMismatch unless `loss` is the cross-entropy of the model's own logits, and these are causal.

    Compared on a few random tokens in evaluation mode, with a random stand-in for the output projection: a fresh
    model's logits are near zero, where a forgotten bias, factor or softcap would not show. Call it before sharding.
    """
    model, head = loss.model, loss.model.get_output_embeddings()
    random = torch.Generator(head.weight.device).manual_seed(0)
    name = next(name for name, module in model.named_modules() if module is head)
    stand_ins = {
        f"{name}.{key}": torch.empty_like(value).normal_(std=10 / head.weight.shape[1] ** 0.5, generator=random)
        for key, value in head.named_parameters()
    }
    ours = {f"model.{key}": value for key, value in stand_ins.items()}

    def logits(input_ids):  # (B, T) -> (B, T, V)
        return functional_call(model, stand_ins, kwargs={"input_ids": input_ids}, tie_weights=False).logits.float()

    tokens = torch.randint(model.config.vocab_size, (2, 17), generator=random, device=head.weight.device)
    input_ids, targets = tokens[:, :-1], tokens[:, 1:]
    other_end = torch.cat([input_ids[:, :-1], (input_ids[:, -1:] + 1) % model.config.vocab_size], dim=1)
    training = loss.training
    loss.eval()
    try:
        actual = functional_call(loss, ours, (input_ids, targets), tie_weights=False)
        z, z_other_end = logits(input_ids), logits(other_end)
    finally:
        loss.train(training)
    architecture = type(model).__name__
    expected = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="sum")
    # Ten architectures agree to 2e-7 in float32, 4e-4 in bfloat16 (Mamba, the worst); Gemma 2 without its softcap: 0.2.
    if not torch.isclose(actual, expected, rtol=1e-3):
        raise LossMismatch(
            f"the loss of {architecture} would be {actual.item():.4f} where its own logits give {expected.item():.4f}: "
            "it does something to its logits that models/loss.py does not know"
        )
    # Causal: 0, or 1.4e-7 where a mixture of experts batches its tokens otherwise. XLNet, bidirectional: 1.7e-3 in
    # float32 and 6.0e-3 in bfloat16, the least of 4 seeds.
    slack = 1e-5 if model.dtype == torch.float32 else 5e-3
    if (z - z_other_end)[:, :-1].abs().max() > slack * z.abs().max():
        raise LossMismatch(f"{architecture} is not causal as configured: a token changes the logits before it")
