"""Routes every class of transformers' auto mappings on the meta device, and prints everything unusual about it, a line each:

bare CLASS.attribute: kind                 a parameter that no layer explains, and what its name says it is
fused CLASS.projection: matrices           one weight that holds several matrices, or looks as if it did
heads MODEL: modules                       output layers of models that are their own base model

PYTHONPATH=. python tests/celo2/route_all.py > tests/celo2/routing_snapshot.txt   # 10 minutes; then review what changed
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from celo2.bare import kind_of
from celo2.boundary import boundary_of, heads_after_bodies
from celo2.fused import is_experts
from celo2.holders import holder_of, owner_of
from celo2.routing import claimed_parameters, is_depthwise, is_layer, is_vector, single_claim

LAYERS = re.compile("num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|num_(en|de)coder_layers")
DOZEN = (
    "BloomForCausalLM", "CLIPForImageClassification", "DeepseekV3ForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel",
    "MambaForCausalLM", "ModernBertForMaskedLM", "Phi3ForCausalLM", "RecurrentGemmaForCausalLM", "SwinForImageClassification",
    "T5ForQuestionAnswering", "Wav2Vec2ForCTC",
)  # fmt: skip


def class_names() -> list[str]:
    """All classes that the auto mappings name."""
    mappings = [getattr(modeling_auto, name) for name in dir(modeling_auto) if re.fullmatch("MODEL_.*MAPPING_NAMES", name)]
    values = [value for mapping in mappings for value in mapping.values()]
    return sorted({name for value in values for name in (value if isinstance(value, (tuple, list)) else [value])})


def shrink(config: transformers.PretrainedConfig, depth: int = 0) -> None:
    """At most four layers of each kind, in `config` and what it holds."""
    for key, value in list(vars(config).items()):
        if LAYERS.fullmatch(key) and isinstance(value, int) and value > 4:
            with contextlib.suppress(Exception):  # what the configuration derives from others
                setattr(config, key, 4)
        if isinstance(value, transformers.PretrainedConfig) and depth < 3:
            shrink(value, depth + 1)


def built(name: str) -> nn.Module | None:
    """The model with its default configuration and few layers, or with all of them, or None where neither can be built."""
    cls: Any = getattr(transformers, name, None)
    for smaller in (shrink, lambda config: None):
        with contextlib.suppress(Exception):  # optional packages, configurations without defaults
            config = cls.config_class()
            smaller(config)
            with torch.device("meta"):
                return cls(config)
    return None


def odd_ones(model: nn.Module) -> Iterator[str]:
    """What is unusual about the routing of a model. Raises ValueError where it cannot be routed."""
    parents = {child: (module, name) for module in model.modules() for name, child in module.named_children()}
    inputs, outputs = boundary_of(model, {})
    claims = {id(p): single_claim(name, p, claims) for name, (p, claims) in claimed_parameters(model, {}).items()}
    for prefix, module in model.named_modules():
        for attribute, p in module.named_parameters(recurse=False):
            owner, plain = owner_of(module, attribute, parents)
            boundary = owner in inputs or owner in outputs or p in inputs or p in outputs
            if boundary or is_vector(p) or is_depthwise(owner, p) or (is_experts(owner) and p.ndim == 2) or id(p) not in claims:
                continue
            claim = claims[id(p)]
            if not is_layer(owner, plain):
                yield f"bare {type(owner).__name__}.{plain}: {kind_of(owner, plain, p, f'{prefix}.{attribute}')}"
            elif claim.note or (claim.layout and claim.layout[2][0] > 1 and not is_experts(owner)):
                holder, name = holder_of(owner, parents)
                where = (
                    f"{type(owner).__name__}.{plain}"
                    if plain != "weight" or name.isdigit()
                    else f"{type(holder).__name__}.{name}"
                )
                yield f"fused {where}: {claim.note or f'{claim.layout[2][0]} matrices'}"
    if getattr(model, "base_model", model) is model:
        heads = heads_after_bodies(model) & outputs
        names = {
            re.sub(r"\d+", "*", name)
            for name, module in model.named_modules()
            if module in heads and list(module.parameters(False))
        }
        if names:
            yield f"heads {type(model).__name__}: {', '.join(sorted(names))}"


def route_all(names: list[str]) -> tuple[list[str], collections.Counter]:
    """The unusual, once each, and how many classes were routed, were not built, or raised which error."""
    found: set[str] = set()
    counts: collections.Counter = collections.Counter()
    for name in names:
        model = built(name)
        if model is None:
            counts["not built"] += 1
            continue
        try:
            found.update(odd_ones(model))
            counts["routed"] += 1
        except (ValueError, AttributeError, RuntimeError) as error:
            counts[f"{name}: {error}"] += 1
    return sorted(found), counts


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    lines, counts = route_all(sys.argv[1:] or class_names())
    print("\n".join(lines))
    print(dict(counts), file=sys.stderr)
