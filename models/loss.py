"""Cross-entropy of a language model without ever holding all of its logits, and the loss module that train.py wraps.

At a vocabulary of 50,257 the float32 logits of 16 sequences of 2,048 tokens are 6.6 GB, and naive cross-entropy holds
several such arrays. `chunked_cross_entropy` goes through the tokens in chunks and computes the gradients at once. So it
holds one chunk of logits, and the gradients, which have the sizes of its inputs. (The idea is Liger Kernel's fused linear
cross-entropy, arXiv 2410.10989; this is plain torch.)

Shapes: N tokens, C tokens of one chunk, D width, V vocabulary, B batch, T time.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from models.build import ModelError, one_line, without_value
from models.gpt3 import GPT3LMHeadModel
from models.misfit import misfit

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
    for divisor in ("logits_scaling", "logits_mup_width_multiplier"):  # Granite, Inkling
        if getattr(config, divisor, None) is not None:
            scale /= getattr(config, divisor)
    for multiplier in ("logit_scale", "lm_head_multiplier"):  # Cohere, Falcon-H1
        if getattr(config, multiplier, None) is not None:
            scale *= getattr(config, multiplier)
    softcaps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma 2, RecurrentGemma, xLSTM
    return scale, next((cap for name in softcaps if (cap := getattr(config, name, None)) is not None), None)


def base_of(model: PreTrainedModel) -> Any:
    """The model without its output projection: transformers' `base_model`, or the one child that is a model itself; or None."""
    if model.base_model is not model:
        return model.base_model
    children = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return children[0] if len(children) == 1 else None


class CausalLMLoss(nn.Module):
    """A causal LM and its loss as one module: forward(input_ids (B, T), targets (B, T)) -> float32 scalar, in nats.

    The SUM, over the targets that are not -100, of -log p(targets[:, t] | input_ids[:, :t + 1]): the targets are shifted
    already. Wrap this module with DDP or FSDP, not the model inside: it reads the output projection's weight itself.

    The loss is computed in chunks if the logits are the output projection of the base model's hidden states, with a factor and a
    softcap. If `choose_loss` has found that they are not, it is computed from the model's own logits (B, T, V), which takes the
    memory of all of them.

    Mixture of experts: the router's load-balancing loss is added in training mode, and only if the configuration's
    `output_router_logits` is true; the sum then grows by router_aux_loss_coef x that loss x the number of targets, as
    the model's own (mean) loss would. Evaluation is cross-entropy alone.
    """

    def __init__(self, model: PreTrainedModel, chunk_tokens: int | None = None):
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        self.scale, self.softcap = logit_scale_and_softcap(model.config)
        self.balance_experts = getattr(model.config, "output_router_logits", False)
        self.chunked = getattr(model, "chunked_loss", True)

    def forward(self, input_ids: Tensor, targets: Tensor, by_row: bool = False) -> Tensor:
        """`by_row`: the scores (B, 2) of `scores_by_row` instead."""
        if by_row:
            return self.scores_by_row(input_ids, targets)
        balance = self.balance_experts and self.training
        options = {"use_cache": False} | ({"output_router_logits": True} if balance else {})
        loss, outputs = (self.in_chunks if self.chunked else self.from_logits)(input_ids, targets, options)
        if balance:
            loss = loss + self.router_loss(outputs) * (targets != IGNORE_INDEX).sum()
        return loss

    def in_chunks(self, input_ids: Tensor, targets: Tensor, options: dict) -> tuple[Tensor, ModelOutput]:
        """The cross-entropy, and what the base model returned."""
        outputs = base_of(self.model)(input_ids=input_ids, **options)
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
        return loss, outputs

    def from_logits(self, input_ids: Tensor, targets: Tensor, options: dict) -> tuple[Tensor, ModelOutput]:
        """The cross-entropy, and what the model returned."""
        outputs = self.model(input_ids=input_ids, **options)
        z = outputs.logits.flatten(0, 1)  # (B, T, V) -> (BT, V)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return F.cross_entropy(z, targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum"), outputs

    def scores_by_row(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """For each row (T,), the log-probability of its targets that are not -100, in nats, and whether each of them is the
        likeliest token: (B, 2), float32. Without gradients. A row's scores depend on no other rank and no other row."""
        if self.chunked:
            states = base_of(self.model)(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, D)
        else:
            states = self.model(input_ids=input_ids, use_cache=False).logits  # (B, T, V)
        scores = states.new_zeros((len(states), 2), dtype=torch.float32)
        for row, (of_row, wanted) in enumerate(zip(states, targets, strict=True)):
            counted = wanted != IGNORE_INDEX
            likeliest = True
            for part, tokens in zip(of_row[counted].split(CHUNK_TOKENS), wanted[counted].split(CHUNK_TOKENS), strict=True):
                log_p = F.log_softmax(self.logits(part) if self.chunked else part.float(), dim=1, dtype=torch.float32)  # (C, V)
                scores[row, 0] += log_p.gather(1, tokens[:, None]).sum()
                likeliest = likeliest & (log_p.argmax(1) == tokens).all()
            scores[row, 1] = likeliest
        return scores

    def logits(self, hidden: Tensor) -> Tensor:
        """(C, D) -> (C, V), with factor and softcap, float32."""
        head = self.model.get_output_embeddings()
        z = F.linear(hidden, head.weight, getattr(head, "bias", None)).float() * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap

    def router_loss(self, outputs: ModelOutput) -> Tensor:
        """The router's load-balancing loss, with its coefficient."""
        model, routed = self.model, getattr(outputs, "router_logits", None)
        if not routed or not hasattr(model, "router_aux_loss_coef"):
            name = type(model).__name__
            raise LossMismatch(f"{name} has no router loss that models/loss.py knows: set output_router_logits to false")
        return model.router_aux_loss_coef * load_balancing_loss_func(routed, model.num_experts, model.num_experts_per_tok)


def choose_loss(model: PreTrainedModel) -> None:
    """Set `model.chunked_loss`: whether the chunks give the cross-entropy of the model's own logits. Call it before sharding.

    They are compared on a few random tokens in evaluation mode, with a random stand-in for the output projection: a fresh
    model's logits are near zero, where a forgotten bias, factor or softcap would not show.

    Raises:
        ModelError: a model whose forward pass fails on tokens alone, or that is not causal.
        LossMismatch: a router loss that is not the model's own.
    """
    training, architecture = model.training, type(model).__name__
    random = torch.Generator(device_of(model)).manual_seed(0)
    tokens = few_tokens(model, random)
    input_ids, targets = tokens[:, :-1], tokens[:, 1:]
    other_end = torch.cat([input_ids[:, :-1], (input_ids[:, -1:] + 1) % tokens.max()], dim=1)
    head = model.get_output_embeddings()
    model.chunked_loss = base_of(model) is not None and isinstance(getattr(head, "weight", None), Tensor)
    weights = stand_ins(model, head, random) if model.chunked_loss else {}
    loss = CausalLMLoss(model.eval())

    def logits(input_ids: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        inputs = {"input_ids": input_ids, "use_cache": False}
        return functional_call(model, weights, kwargs=inputs, tie_weights=False).logits.float()

    try:
        with torch.no_grad():
            z, z_other_end = logits(input_ids), logits(other_end)
            expected = F.cross_entropy(z.flatten(0, 1), targets.flatten(), reduction="sum").item()
            if model.chunked_loss:
                of_loss = {f"model.{name}": value for name, value in weights.items()}
                try:
                    actual = functional_call(loss, of_loss, (input_ids, targets), tie_weights=False).item()
                except ValueError:  # the output layer reads another width than the base model gives
                    actual = math.nan
                # Worst of those that agree: 2e-7 in float32, 4e-4 in bfloat16 (Mamba); Gemma 2 without its softcap: 0.2.
                model.chunked_loss = math.isclose(actual, expected, rel_tol=1e-3)
            if loss.balance_experts:
                check_router_loss(model, input_ids)
    except (torch.OutOfMemoryError, LossMismatch):
        raise
    except Exception as error:
        raise ModelError(
            f"{architecture}: its forward pass fails: {one_line(error)}"
            f"{without_value(model.config, error) or misfit(model.config)}"
        ) from error
    finally:
        model.train(training)
    # Causal: 0, or 1.4e-7 where a mixture of experts batches its tokens otherwise. XLNet, bidirectional: 1.7e-3 in
    # float32 and 6.0e-3 in bfloat16, the least of 4 seeds.
    slack = 1e-5 if model.dtype == torch.float32 else 5e-3
    if (z - z_other_end)[:, :-1].abs().max() > slack * z.abs().max():
        said = getattr(model.config, "is_decoder", True)
        remedy = "" if said else "; set is_decoder to true, in model.hf or, for weights of a folder, in its config.json"
        raise ModelError(f"{architecture} is not causal as configured: a token changes the logits before it{remedy}")


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model computes; blocks that are not in use may be without memory."""
    return next((p.device for p in model.parameters() if not p.is_meta), model.device)


def few_tokens(model: PreTrainedModel, random: torch.Generator) -> Tensor:
    """Random tokens (2, 17)."""
    return torch.randint(model.config.get_text_config().vocab_size, (2, 17), generator=random, device=random.device)


def stand_ins(model: PreTrainedModel, head: Any, random: torch.Generator) -> dict[str, Tensor]:
    """Random weights for the output projection by name, which make logits of about the size of 10."""
    name = next(name for name, module in model.named_modules() if module is head)
    std = 10 / head.weight.shape[1] ** 0.5
    return {f"{name}.{key}": torch.empty_like(p).normal_(std=std, generator=random) for key, p in head.named_parameters()}


def check_router_loss(model: PreTrainedModel, input_ids: Tensor) -> None:
    """Raise LossMismatch unless the router loss is what the model's own loss adds for `output_router_logits`."""
    options = {"input_ids": input_ids, "use_cache": False, "output_router_logits": True}
    with_router = model(**options, labels=input_ids).loss
    expected = with_router - model(**options | {"output_router_logits": False}, labels=input_ids).loss
    actual = CausalLMLoss(model).router_loss(base_of(model)(**options))
    # The difference of two losses of about 6 nats in float32: its rounding is 1e-6.
    if not math.isclose(actual.item(), expected.item(), rel_tol=1e-2, abs_tol=1e-5):
        raise LossMismatch(
            f"the router loss of {type(model).__name__} would be {actual.item():.6f} where its own is {expected.item():.6f}: "
            "set output_router_logits to false"
        )


def uses_all_parameters(model: PreTrainedModel) -> bool:
    """Whether every parameter is known to get a gradient, so that nothing has to be computed to find out."""
    return isinstance(model, GPT3LMHeadModel)


def unused_parameters(loss: CausalLMLoss) -> set[Tensor]:
    """The trainable parameters of the model that get no gradient from its loss. Call it before sharding."""
    if uses_all_parameters(loss.model):
        return set()
    training = loss.training
    tokens = few_tokens(loss.model, torch.Generator(loss.model.device).manual_seed(0))
    trainable = [p for p in loss.eval().parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(tokens[:, :-1], tokens[:, 1:]), trainable, allow_unused=True)
    loss.train(training)
    return {p for p, gradient in zip(trainable, gradients, strict=True) if gradient is None}
