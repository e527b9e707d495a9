"""Which parameter of a model takes which update: the rule for hidden matrices, AdamW for everything else.

The input and output layers are found by module, never by name: they have two axes like a hidden matrix, but their rows are
tokens, positions or classes. `param_groups` claims every trainable parameter exactly once and prints as `routing_table`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from celo2.distributed.shard import refuse_fsdp1
from celo2.layout import Layout, matrix_count, stacked_shape
from celo2.rule_files import VARIANTS

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Projections of transformers that hold several matrices in one weight, by (class of the parent module, its attribute).
# "concatenated": [q; k; v] along the outputs; "per head": each head's q, k and v lie together.
FUSED = {
    ("GPT2Attention", "c_attn"): "concatenated",
    ("GPTNeoXAttention", "query_key_value"): "per head",
    ("BloomAttention", "query_key_value"): "per head",
    ("Phi3MLP", "gate_up_proj"): "concatenated",
}


class Claim(NamedTuple):
    """What one module says of a parameter that it holds."""

    role: str  # "hidden", "input", "output", "vector"
    layout: Layout | None = None

    @property
    def update(self) -> str:
        """The update of a rule that is not for every parameter."""
        return "celo2" if self.role == "hidden" else "adamw"


def param_groups(
    model: nn.Module,
    lr: float,
    adamw_lr: float,
    weight_decay: float = 0.0,
    *,
    variant: str = "celo2",
    decay_vectors: bool = False,
    also_adamw: Sequence[nn.Module] = (),
) -> list[dict[str, Any]]:
    """Parameter groups for a whole model, for `Celo2` or any optimizer that reads `update`.

    Hidden matrices take the rule. Token and position embeddings, the output projection (tied or not), classification heads
    and everything that is a vector (biases, norm scales) take AdamW. Fused projections, transposed and expert weights of
    transformers and convolutions are given to the rule as the matrices they stand for (`celo2.layout`). Frozen parameters
    are left out.

    Args:
        model: any module; models of transformers name their own input and output layers. In other modules embeddings are
            found as `nn.Embedding`, and the output projection as the one `nn.Linear` that is tied to the largest embedding
            or has its shape.
        lr: learning rate of the rule.
        adamw_lr: learning rate of AdamW.
        weight_decay: decoupled decay of everything with two axes, embeddings and output projection included.
        variant: a rule's variant; for "celo2-base" every parameter takes the rule, with `lr`.
        decay_vectors: decay vectors as well.
        also_adamw: more modules whose parameters take AdamW (an output layer that nothing marks as one).

    Raises:
        ValueError: a parameter that two modules claim differently or that nothing claims, or no single output projection.
    """
    refuse_fsdp1(model.parameters())
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant '{variant}', expected one of {', '.join(VARIANTS)}")
    input_layers, output_layers = boundary_modules(model, also_adamw)
    groups: dict[tuple, dict[str, Any]] = {}
    for name, (p, claims) in claimed_parameters(model, input_layers, output_layers).items():
        claim = single_claim(name, p, claims)
        update = "celo2" if variant == "celo2-base" else claim.update
        decays = decay_vectors or not (claim.role == "vector" or is_vector(p))
        decay = weight_decay if decays else 0.0
        group = groups.setdefault(
            (update, claim.layout, decay),
            {
                "params": [],
                "param_names": [],
                "update": update,
                "lr": lr if update == "celo2" else adamw_lr,
                "weight_decay": decay,
                "matrices": claim.layout,
            },
        )
        group["params"].append(p)
        group["param_names"].append(name)
    return sorted(groups.values(), key=lambda group: group["update"] != "celo2")


def is_vector(p: Tensor) -> bool:
    """Whether at most one axis of `p` is longer than one: a bias, a norm scale, a class token."""
    return p.numel() == max(p.shape, default=1)


def boundary_modules(model: nn.Module, also_adamw: Sequence[nn.Module]) -> tuple[set[nn.Module], set[nn.Module]]:
    """The modules that are input layers and those that are output layers."""
    inputs: set[nn.Module] = {module for module in model.modules() if isinstance(module, EMBEDDINGS)}
    outputs = {inner for module in also_adamw for inner in module.modules()}
    parents = {child: module for module in model.modules() for child in module.children()}
    knows_itself = False
    for module in model.modules():
        if not hasattr(module, "get_input_embeddings"):
            continue
        knows_itself = True
        embedding = call_or_none(module.get_input_embeddings)
        if embedding is not None:
            inputs.update(embedding.modules())
            if embedding in parents and parents[embedding] is not model:
                inputs.add(parents[embedding])  # holds class tokens and position embeddings that are bare parameters
        head = call_or_none(module.get_output_embeddings)
        if head is not None:
            outputs.update(head.modules())
        base = getattr(module, "base_model", module)
        if base is not module:
            outputs.update(set(module.modules()) - set(base.modules()) - {module})
    if not knows_itself:
        outputs.update(plain_output(model, outputs))
    return inputs, outputs


def call_or_none(method: Any) -> nn.Module | None:
    """The module that a transformers accessor names, or None where the model does not implement it."""
    try:
        return method()
    except (NotImplementedError, AttributeError):
        return None


def plain_output(model: nn.Module, claimed: set[nn.Module]) -> set[nn.Module]:
    """The output projection of a module that does not name it: tied to an embedding, or else of the shape of one."""
    embeddings = [module.weight for module in model.modules() if isinstance(module, EMBEDDINGS)]
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    tied: set[nn.Module] = {module for _, module in linears if any(module.weight is weight for weight in embeddings)}
    alike = [(name, module) for name, module in linears if any(module.weight.shape == w.shape for w in embeddings)]
    if tied or any(module in claimed for _, module in alike):
        return tied
    if len(alike) > 1:
        names = ", ".join(name for name, _ in alike)
        raise ValueError(f"which of {names} is the output projection? Name it with also_adamw=[...]")
    return {module for _, module in alike}


def claimed_parameters(
    model: nn.Module, inputs: set[nn.Module], outputs: set[nn.Module]
) -> dict[str, tuple[Tensor, list[Claim]]]:
    """Every trainable parameter under its first name, with the claim of each module that holds it."""
    found: dict[int, tuple[str, Tensor, list[Claim]]] = {}
    parents = {child: (module, name) for module in model.modules() for name, child in module.named_children()}
    for prefix, module in model.named_modules():
        for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if not p.requires_grad:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            claims = found.setdefault(id(p), (name, p, []))[2]
            if not p.is_floating_point() or not p.numel():
                continue
            if module in inputs or module in outputs:
                claims.append(Claim("input" if module in inputs else "output"))
            elif is_vector(p) or is_depthwise(module) or (is_experts(module) and p.ndim == 2):  # a bias an expert
                claims.append(Claim("vector"))
            else:
                claims.append(Claim("hidden", hidden_layout(module, attribute, p, *parents.get(module, (None, "")))))
    return {name: (p, claims) for name, p, claims in found.values()}


def single_claim(name: str, p: Tensor, claims: list[Claim]) -> Claim:
    """The one claim on a parameter; a tied weight may be claimed as input and as output."""
    if not claims:
        raise ValueError(f"nothing claims parameter '{name}' ({p.dtype}, shape {tuple(p.shape)})")
    if len({(claim.update, claim.layout) for claim in claims}) > 1:
        roles = " and as ".join(dict.fromkeys(f"{claim.role} ({claim.update})" for claim in claims))
        raise ValueError(f"parameter '{name}' is claimed more than once: as {roles}")
    return claims[0]


def is_depthwise(module: nn.Module) -> bool:
    """A convolution with one filter a channel: a vector a channel, no matrix."""
    return isinstance(module, CONVOLUTIONS) and module.groups == module.in_channels > 1


def is_experts(module: nn.Module) -> bool:
    """Whether a module of transformers holds the weights of several experts in each parameter."""
    return hasattr(module, "is_transposed") and hasattr(module, "is_concatenated")


def hidden_layout(module: nn.Module, attribute: str, p: Tensor, parent: Any, name: str) -> Layout | None:
    """How a hidden weight is a stack of (outputs, inputs) matrices; None where it is one matrix as it stands."""
    shape = tuple(p.shape)
    fused = FUSED.get((type(parent).__name__, name))
    if type(module).__name__ == "Conv1D" and len(shape) == 2:  # transformers' transposed linear layer of GPT-2
        inputs, outputs = shape
        n = outputs // parent.split_size if fused else 1
        return (inputs, n, outputs // n), (1, 2, 0), (n, outputs // n, inputs)
    if isinstance(module, CONVOLUTIONS):
        return shape, tuple(range(len(shape))), (1, shape[0], p.numel() // shape[0])
    if is_experts(module) and len(shape) == 3:
        return expert_layout(module, attribute, shape)
    if fused == "concatenated":
        n = 2 if "gate_up" in name else 3
        return (n, shape[0] // n, shape[1]), (0, 1, 2), (n, shape[0] // n, shape[1])
    if fused == "per head":
        heads = getattr(parent, "num_heads", None) or parent.config.num_attention_heads
        width = shape[0] // (3 * heads)
        return (heads, 3, width, shape[1]), (1, 0, 2, 3), (3, heads * width, shape[1])
    return None


def expert_layout(module: Any, attribute: str, shape: tuple[int, ...]) -> Layout:
    """Expert weights (E, outputs, inputs) of transformers, or (E, inputs, outputs), with gate and up projection fused."""
    experts, *sides = shape
    outputs, inputs = reversed(sides) if module.is_transposed else sides
    n = 2 if attribute.startswith("gate_up") else 1
    fused = (n, outputs // n) if module.is_concatenated else (outputs // n, n)  # [gate; up], or gate and up in turns
    dims = (experts, inputs, *fused) if module.is_transposed else (experts, *fused, inputs)
    first = 2 if module.is_transposed else 1  # the axis of `dims` where the outputs begin
    of_outputs = (first, first + 1) if module.is_concatenated else (first + 1, first)
    return dims, (0, *of_outputs, 1 if module.is_transposed else 3), (experts * n, outputs // n, inputs)


def routing_table(groups: Sequence[dict[str, Any]]) -> str:
    """The routing as text: name, shape, update, lr, decay and matrices, a line for all that differ only in a layer number."""
    lines: dict[tuple, int] = {}
    for cells in routing_rows(groups):
        lines[cells] = lines.get(cells, 0) + 1
    header = ("parameter", "shape", "update", "lr", "decay", "matrices", "count")
    table = [header] + [(*cells, str(count)) for cells, count in lines.items()]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)


def routing_rows(groups: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The cells of `routing_table` for each parameter."""
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            stacked = stacked_shape(p.shape, group["matrices"])
            count = matrix_count(stacked) if group["update"] == "celo2" else 0
            yield (
                re.sub(r"(?<=\.)\d+(?=\.)", "*", name),
                " × ".join(map(str, p.shape)) or "scalar",
                group["update"],
                f"{float(group['lr']):g}",
                f"{float(group['weight_decay']):g}",
                f"{count} of {stacked[-2]} × {stacked[-1]}" if count else "–",
            )
