"""Who holds a parameter: the layer that uses it, the modules around this layer, and the layer whose weight a LoRA factor changes.

Wrappers of torch.compile, PEFT and users, and parametrizations may stand between a module and the layers that it uses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
HELD = (*WRAPPERS, "module", "base_layer")  # attributes under which wrappers hold the wrapped module; `base_layer` is PEFT's
# Names of low-rank factors. `A` and `B` count only beside a frozen layer, because any layer may have such a name.
FACTOR = re.compile(r"lora.*|.*_lora(_.*)?|[ab]\d*", re.IGNORECASE)
INPUT_FACTOR = re.compile(r"(.*_)?(a|down)\d*(_weight)?", re.IGNORECASE)  # the factor that reads the inputs of the layer

Parents = Mapping[nn.Module, tuple[nn.Module, str]]


class Base(NamedTuple):
    """The layer whose weight a factor changes."""

    layer: nn.Module
    reads_inputs: bool  # whether the factor is the first one, which reads the inputs of the layer


def class_names(module: nn.Module) -> list[str]:
    """Names of a module's class and its base classes, nearest first, each without and with its package."""
    return [name for c in type(module).__mro__ for name in (c.__name__, f"{c.__module__.partition('.')[0]}.{c.__name__}")]


def holder_of(module: nn.Module, parents: Parents) -> tuple[nn.Module | None, str]:
    """The module that uses `module`, and the attribute under which it holds it; skips module lists and wrappers."""
    parent, name = parents.get(module, (None, ""))
    while parent in parents and (name in HELD or isinstance(parent, nn.ModuleList)):
        parent, name = parents[parent]  # type: ignore[index]
    return parent, name


def uses_of(module: nn.Module, parents: Parents) -> Iterator[tuple[nn.Module, str]]:
    """Who uses `module`: the module that holds it, with the attribute, and while that holds no other layer, who uses that one."""
    parent, name = holder_of(module, parents)
    while parent is not None:
        yield parent, name
        if only_layer(parent, parents) is not module:
            return
        parent, name = holder_of(parent, parents)


def owner_of(module: nn.Module, attribute: str, parents: Parents) -> tuple[nn.Module, str]:
    """The layer that uses a parameter, and the attribute that the parameter represents, also under a parametrization.

    `parametrizations.weight.original1` and `weight_v` are the `weight` of the layer that they parametrize.
    """
    if isinstance(module, ParametrizationList):
        container, name = parents[module]
        return parents[container][0], name
    plain = re.sub(r"_(orig|v)$", "", attribute)
    if plain != attribute and isinstance(getattr(module, plain, None), Tensor):
        own = {name for name, _ in module.named_parameters(recurse=False)}
        return module, attribute if plain in own else plain
    return module, attribute


def is_called_factor(name: str) -> bool:
    """Whether a part of the full name of a module or parameter is that of a low-rank factor."""
    return any(FACTOR.fullmatch(part) for part in name.split("."))


def only_layer(holder: nn.Module, parents: Parents) -> nn.Module | None:
    """The module within `holder` that has weights of two or more axes, without low-rank factors; None if several modules do."""
    found: set[nn.Module] = set()
    for name, module in holder.named_modules():
        if not is_called_factor(name):
            own = [attribute for attribute, p in module.named_parameters(recurse=False) if p.ndim > 1]
            found.update(owner_of(module, attribute, parents)[0] for attribute in own if not FACTOR.fullmatch(attribute))
        if len(found) > 1:
            return None
    return found.pop() if found else None


def base_of(module: nn.Module, attribute: str, parents: Parents) -> Base | None:
    """The layer whose weight the parameter `attribute` of `module` changes, as LoRA's factors do; None for any other parameter.

    This is the layer that is parametrized, or the only other layer in the module that holds the factor.
    """
    holder: nn.Module | None = module
    names = [attribute]  # the path from `holder` to the parameter
    while holder is not None:
        layer = None
        if isinstance(holder, ParametrizationList) and holder is not module:
            layer = parents[parents[holder][0]][0]
        elif FACTOR.fullmatch(names[0]):
            layer = only_layer(holder, parents)
            if layer is not None and "lora" not in ".".join(names).lower() and learns(layer):
                layer = None
        if layer is not None:
            return Base(layer, any(map(INPUT_FACTOR.fullmatch, names)))
        holder, name = parents.get(holder, (None, ""))
        names.insert(0, name)
    return None


def learns(layer: nn.Module) -> bool:
    """Whether a weight of `layer`, apart from low-rank factors, is trainable."""
    return any(p.requires_grad and p.ndim > 1 and not is_called_factor(name) for name, p in layer.named_parameters())


def factors_of(model: nn.Module) -> set[Tensor]:
    """The parameters of a model that have a `Base`."""
    parents = {child: (module, name) for module in model.modules() for name, child in module.named_children()}
    owned = ((module, attribute, p) for module in model.modules() for attribute, p in module.named_parameters(recurse=False))
    return {p for module, attribute, p in owned if base_of(module, attribute, parents) is not None}
