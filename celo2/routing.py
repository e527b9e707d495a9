"""Routing: which parameters of a model the learned rule updates (hidden matrices), and which AdamW updates (all others).

`param_groups` assigns every trainable parameter to exactly one group. `celo2.boundary` finds input and output layers,
`celo2.fused` finds the matrices in the weight of a layer, and `celo2.bare` decides by name where no layer explains a parameter.
docs/routing.md gives the order of these decisions. `routing_table` prints the result.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from celo2.bare import kind_of
from celo2.boundary import EMBEDDINGS, Found, boundary_of
from celo2.distributed.shard import ShardingError, refuse_fsdp1
from celo2.fused import CONVOLUTIONS, is_experts, matrices_of
from celo2.groups import UPDATES, ParamGroups, names_of
from celo2.holders import WRAPPERS, Parents, base_of, class_names, owner_of
from celo2.layout import Layout, matrix_count, stacked_shape
from celo2.rule_files import VARIANTS

LAYERS = (nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, *CONVOLUTIONS)
NOT_KNOWN = "kind not recognized, so AdamW; override with rules="
OVERRULED = "overruled"


class Claim(NamedTuple):
    """How one module classifies a parameter that it holds."""

    kind: str  # "hidden", "input", "output", "vector"
    layout: Layout | None = None
    note: str = ""

    @property
    def update(self) -> str:
        """The update under a rule of the variant celo2; a rule of celo2-base updates every parameter."""
        return "celo2" if self.kind == "hidden" else "adamw"


def param_groups(
    model: nn.Module,
    lr: float | Tensor,
    adamw_lr: float | Tensor,
    weight_decay: float = 0.0,
    *,
    variant: str = "celo2",
    decay_vectors: bool = False,
    rules: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Make the parameter groups of a whole model, for `Celo2` or any optimizer that reads `update`.

    The rule updates hidden matrices. AdamW updates embeddings, position tables, the output projection (tied or not),
    classification heads and all vectors (biases, norm scales, depthwise convolutions, state-space parameters). The rule sees
    fused projections, transposed weights, expert weights and convolutions as the matrices that they consist of. Frozen
    parameters are left out. docs/routing.md says how this is decided; `routing_table` prints the result.

    Args:
        model: the whole model, any module. A part of a model is routed as if it were a whole model.
        lr: learning rate of the rule, a number or a tensor of one element; every group has a copy of the tensor.
        adamw_lr: learning rate of AdamW, likewise.
        weight_decay: decoupled weight decay of everything that is not a vector, including embeddings and output projection.
        variant: the variant of the rule; with "celo2-base" the rule updates every parameter, at `lr`.
        decay_vectors: also apply weight decay to vectors.
        rules: exceptions to the above: {pattern: "celo2" or "adamw"}. A pattern is the name of a parameter or a module, with `*`
            for anything: {"lm_head": "adamw", "*.mlp.gate": "adamw"}. The last pattern that matches decides.

    Raises:
        ValueError: two modules classify a parameter differently, a parameter is not a real float, several layers could be the
            output projection, or a pattern matches nothing.
        ShardingError: a wrapper such as FSDP1 has flattened the parameters.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant '{variant}', expected one of {', '.join(VARIANTS)}")
    refuse_fsdp1(model.parameters())
    refuse_flattened(model)
    overruled = overruled_parameters(model, rules or {})
    groups: dict[tuple, dict[str, Any]] = {}
    for name, (p, claims) in claimed_parameters(model, overruled).items():
        claim = single_claim(name, p, claims)
        update = overruled.get(p) or ("celo2" if variant == "celo2-base" else claim.update)
        decays = decay_vectors or not (claim.kind == "vector" or is_vector(p))
        decay = weight_decay if decays else 0.0
        group = groups.setdefault(
            (update, claim.layout, decay),
            {
                "params": [],
                "param_names": [],
                "update": update,
                "lr": own_rate(lr if update == "celo2" else adamw_lr),
                "weight_decay": decay,
                "matrices": claim.layout,
            },
        )
        group["params"].append(p)
        group["param_names"].append(name)
        if claim.note and (claim.note == OVERRULED or update == claim.update):
            group.setdefault("notes", {})[name] = claim.note
    if not groups:
        warnings.warn("this model has no trainable parameter", stacklevel=2)
    elif all(group["update"] != "celo2" for group in groups.values()):
        warnings.warn("no trainable parameter of this model takes the rule: AdamW updates them all", stacklevel=2)
    return ParamGroups(sorted(groups.values(), key=lambda group: group["update"] != "celo2"), variant)


def own_rate(lr: float | Tensor) -> float | Tensor:
    """The learning rate for one group: a tensor is copied, because schedulers fill the tensor of each group in place."""
    return lr.detach().clone() if isinstance(lr, Tensor) else lr


def is_vector(p: Tensor) -> bool:
    """Whether at most one axis of `p` is longer than one: a bias, a norm scale, a class token. An empty tensor counts too."""
    return p.numel() == max(p.shape, default=1) or not p.numel()


def refuse_flattened(model: nn.Module) -> None:
    """Raise ShardingError for weights that lost their layer's axes, as under FSDP1, and ValueError for those of lazy modules."""
    for prefix, module in model.named_modules():
        kernel = len(module.kernel_size) + 2 if isinstance(module, CONVOLUTIONS) else 2
        layer = isinstance(module, (nn.Linear, *EMBEDDINGS, *CONVOLUTIONS))
        for attribute, p in module.named_parameters(recurse=False):
            name = f"{prefix}.{attribute}" if prefix else attribute
            if nn.parameter.is_lazy(p):
                raise ValueError(f"'{name}' has no shape yet: run one batch through the model before param_groups")
            if layer and attribute == "weight" and p.requires_grad and p.ndim < kernel:
                raise ShardingError(
                    f"'{name}' has the shape {tuple(p.shape)}, which is not that of the weights of a "
                    f"{type(module).__name__}: a wrapper has flattened it, so that its matrices are lost. Instead of FSDP1 use "
                    "FSDP2 (torch.distributed.fsdp.fully_shard); for DeepSpeed ZeRO call param_groups before deepspeed.initialize"
                )


def overruled_parameters(model: nn.Module, rules: Mapping[str, str]) -> dict[Tensor, str]:
    """The update that `rules` give to parameters, under any of their names. Raises ValueError if a pattern matches nothing."""
    named = [(plain_name(name), p) for name, p in model.named_parameters(remove_duplicate=False)]
    found: dict[Tensor, str] = {}
    for pattern, update in rules.items():
        if update not in UPDATES:
            raise ValueError(f"rules['{pattern}'] must be one of {', '.join(UPDATES)}, not {update!r}")
        own = plain_name(pattern)
        fitting = [p for name, p in named if fnmatch.fnmatchcase(name, own) or fnmatch.fnmatchcase(name, f"{own}.*")]
        if not fitting:
            names = [name for name, _ in named] + [plain_name(name) for name, _ in model.named_modules() if name]
            near = difflib.get_close_matches(own, names, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"rules: no parameter or module of the model matches '{pattern}'{hint}")
        if not any(p.requires_grad for p in fitting):
            warnings.warn(f"rules: '{pattern}' matches only frozen parameters", stacklevel=3)
        found |= dict.fromkeys(fitting, update)
    return found


def plain_name(name: str) -> str:
    """A name without the parts that wrappers add: `module.`, `_orig_mod.`."""
    parts = name.split(".")
    if len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(part for part in parts if part not in WRAPPERS)


def claimed_parameters(model: nn.Module, overruled: Mapping[Tensor, str]) -> dict[str, tuple[Tensor, list[Claim]]]:
    """Every trainable parameter by its first name, with one claim from each module that holds it."""
    inputs, outputs = boundary_of(model, overruled)
    found: dict[int, tuple[str, Tensor, list[Claim]]] = {}
    parents = {child: (module, name) for module in model.modules() for name, child in module.named_children()}
    for prefix, module in model.named_modules():
        for attribute, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if not p.requires_grad:
                continue
            name = f"{prefix}.{attribute}" if prefix else attribute
            claims = found.setdefault(id(p), (name, p, []))[2]
            if not p.is_floating_point():
                continue
            owner, plain = owner_of(module, attribute, parents)
            claim = claim_of(owner, plain, p, name, inputs, outputs, parents)
            if p in overruled:
                by_rule = overruled[p] == "celo2" and not is_vector(p)
                claim = Claim(claim.kind, hidden_claim(owner, plain, p, parents).layout if by_rule else None, OVERRULED)
            claims.append(claim)
    return {name: (p, claims) for name, p, claims in found.values()}


def claim_of(module: nn.Module, attribute: str, p: Tensor, name: str, inputs: Found, outputs: Found, parents: Parents) -> Claim:
    """The claim of `module` on its parameter `p`. A low-rank factor of an input or output layer goes with this layer."""
    base = base_of(module, attribute, parents)
    holders = {module, p} | ({base.layer} if base else set())
    if not holders.isdisjoint(inputs):
        return Claim("input")
    if not holders.isdisjoint(outputs):
        return Claim("output")
    if is_vector(p) or is_depthwise(module, p) or (is_experts(module) and p.ndim == 2):  # one bias per expert
        return Claim("vector")
    if is_layer(module, attribute):
        return hidden_claim(module, attribute, p, parents)
    kind = kind_of(module, attribute, p, name)
    if kind == "matrix":
        return hidden_claim(module, attribute, p, parents)
    return {"vector": Claim("vector"), "table": Claim("input"), "unknown": Claim("input", None, NOT_KNOWN)}[kind]


def hidden_claim(module: nn.Module, attribute: str, p: Tensor, parents: Parents) -> Claim:
    """The claim on a hidden weight."""
    return Claim("hidden", *matrices_of(module, attribute, tuple(p.shape), parents))


def is_layer(module: nn.Module, attribute: str) -> bool:
    """Whether `attribute` is a weight of a layer of torch, or of a class that this file or `celo2.fused` lists."""
    if is_experts(module):
        return True
    names = class_names(module)
    known = isinstance(module, LAYERS) or "Conv1D" in names
    return "DbrxExpertGLU" in names or (known and (attribute.startswith("weight") or attribute.endswith("_weight")))


def is_depthwise(module: nn.Module, p: Tensor) -> bool:
    """Whether `p` is the kernel of a depthwise convolution: one filter for each channel, not a matrix."""
    return isinstance(module, CONVOLUTIONS) and p.ndim > 2 and module.in_channels == module.groups


def single_claim(name: str, p: Tensor, claims: list[Claim]) -> Claim:
    """The claim that decides for a parameter. If several modules share it, an embedding or output layer has priority."""
    if not claims:
        raise ValueError(
            f"parameter '{name}', shape {tuple(p.shape)}, is {p.dtype}, and only real floats can learn here: hold it as real "
            "numbers (torch.view_as_real), or freeze it with requires_grad_(False)"
        )
    claims = [claim for claim in claims if claim.kind in ("input", "output")] or claims
    if len({(claim.update, claim.layout) for claim in claims}) > 1:
        kinds = " and as ".join(f"{claim.kind} ({claim.update}, matrices {claim.layout})" for claim in claims)
        raise ValueError(f"parameter '{name}' is claimed more than once: as {kinds}")
    return claims[0]


def routing_table(groups: Sequence[dict[str, Any]]) -> str:
    """The routing as text: name, shape, update, lr, decay, matrices. Parameters that differ only in layer numbers share a line.

    The column `note` appears only if some parameter has a note: a fused weight that is not split, a parameter of unknown kind,
    or an update set by `rules`.
    """
    lines = Counter(routing_rows(groups))
    header = ("parameter", "shape", "update", "lr", "decay", "matrices", "count", "note")
    table = [header] + [(*cells, str(count), note) for (*cells, note), count in lines.items()]
    if not any(note for *_, note in table[1:]):
        table = [row[:-1] for row in table]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table)


def routing_rows(groups: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The cells of `routing_table` for each parameter, without the count."""
    for index, group in enumerate(groups):
        for name, p in zip(names_of(index, group), group["params"], strict=True):
            stacked = stacked_shape(p.shape, group.get("matrices"))
            by_axes = "celo2" if p.ndim > 1 else "adamw (celo2-base: celo2)"
            update = group.get("update") or by_axes
            count = matrix_count(stacked) if update == "celo2" else 0
            yield (
                re.sub(r"(?<=\.)\d+(?=\.)", "*", name),
                " × ".join(map(str, p.shape)) or "scalar",
                update,
                *(f"{float(group[key]):g}" if key in group else "–" for key in ("lr", "weight_decay")),
                f"{count} of {stacked[-2]} × {stacked[-1]}" if count else "–",
                group.get("notes", {}).get(name, ""),
            )
