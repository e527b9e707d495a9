"""Find the input layers and the output layers of a model.

Their weights have two axes like those of hidden matrices, but their rows are tokens, positions or classes. If a model names these
layers itself (transformers, timm), that counts. Otherwise the output layer is, in this order, the linear layer that is tied to
an embedding, that has the shape of the largest embedding and feeds no later layer, or that ends the model. Layers of repeated
blocks are never output layers. Low-rank factors (LoRA) are no layers: they go with the layer whose weight they change.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from celo2.fused import CONVOLUTIONS
from celo2.holders import HELD, class_names, factors_of, owner_of

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
BLOCKS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.RNNBase)  # blocks, also alone
HEADS = re.compile("heads?|lm_head|cls_head|classifier|score|logits|to_logits|unembed|unembedding|output_projection|qa_outputs")
MODULATION = re.compile("adaln.*|.*modulation.*", re.IGNORECASE)  # makes scales and shifts from a condition (DiT): never a head
PADDED = 1.1  # a head may have up to 10 % more rows than the vocabulary: padding to a number that suits GPUs
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

Found = set[Any]  # modules and single parameters


class Layer(NamedTuple):
    """A linear layer, or a convolution whose kernel is a single point."""

    name: str
    module: nn.Module
    inputs: int
    outputs: int


def boundary_of(model: nn.Module, overruled: Mapping[Tensor, str]) -> tuple[Found, Found]:
    """The input layers and the output layers of a model: modules, or parameters that are layers by themselves.

    `overruled` holds the parameters whose update the user has set.

    Raises:
        ValueError: several layers that could be the output projection.
    """
    inputs: Found = {module for module in model.modules() if isinstance(module, EMBEDDINGS)}
    outputs: Found = {
        m for module in model.modules() if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss) for m in module.modules()
    }
    parents = {child: module for module in model.modules() for child in module.children()}
    known = [module for module in model.modules() if hasattr(module, "get_input_embeddings") or hasattr(module, "get_classifier")]
    for module in known:
        embedding = asked(module, "get_input_embeddings")
        inputs.update(parts(embedding))
        if embedding in parents and parents[embedding] is not model:
            inputs.add(parents[embedding])  # it may hold class tokens and position embeddings as bare parameters
        named = [*parts(asked(module, "get_output_embeddings")), *parts(asked(module, "get_classifier"))]
        outputs.update(named)
        base = getattr(module, "base_model", module)
        if base is not module:
            outputs.update(set(module.modules()) - set(base.modules()) - {module})
        elif not named and any(re.search("For[A-Z]", name) for name in class_names(module)):
            outputs.update(heads_after_bodies(module))
    if unwrapped(model) not in known:
        outputs.update(heads_of_plain(model, known, overruled))
    return inputs, outputs


def asked(module: nn.Module, method: str) -> Any:
    """The result of a method of a transformers or timm module; None if it is missing or not implemented."""
    try:
        return getattr(module, method)()
    except (NotImplementedError, AttributeError, TypeError):  # TypeError: a user's method of that name that needs arguments
        return None


def parts(layer: Any) -> Iterator[Any]:
    """All modules within a layer or within each of several layers, or the parameter that is a layer by itself."""
    if isinstance(layer, nn.Module):
        yield from layer.modules()
    elif isinstance(layer, (tuple, list)):
        yield from itertools.chain.from_iterable(parts(one) for one in layer)
    elif isinstance(layer, Tensor):
        yield layer


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without wrappers such as DistributedDataParallel and `torch.compile`."""
    children = dict(model.named_children())
    while len(children) == 1 and next(iter(children)) in HELD and not list(model.parameters(recurse=False)):
        model = next(iter(children.values()))
        children = dict(model.named_children())
    return model


# --- transformers' models that are their own base model ---------------------------------------------------------------------


def heads_after_bodies(model: nn.Module) -> Found:
    """The modules after the last part of a model that has blocks, as `classifier` after `encoder`."""
    blocks, children = repeated_blocks(model), list(model.children())
    bodies = [i for i, child in enumerate(children) if not blocks.isdisjoint(child.modules())]
    behind = children[bodies[-1] + 1 :] if bodies else []
    return {module for child in behind for module in child.modules()}


# --- any other module -------------------------------------------------------------------------------------------------------


def heads_of_plain(model: nn.Module, known: Iterable[nn.Module], overruled: Mapping[Tensor, str]) -> Found:
    """The output layers of a module that does not name them; `known` holds the parts of it that name theirs."""
    inside = {inner for module in known for inner in module.modules()}
    if inside:  # the user's own layers around a pretrained model
        first = [module for module in known if not any(module in other.modules() for other in known if other is not module)]
        outside = list(layers_outside_blocks(model, inside))
        behind = outside if len(first) == 1 else [layer for layer in outside if comes_after(model, layer.module, first[-1])]
        return {layer.module for layer in (*behind, *called_heads(outside), *alike(model, outside))}
    outside = list(layers_outside_blocks(model, set()))
    named = called_heads(outside)
    marked = [*ending(model, outside), *named]
    embeddings = {id(p) for module in model.modules() if isinstance(module, EMBEDDINGS) for p in module.parameters()}
    if any(id(p) in embeddings for layer in outside for p in layer.module.parameters()):
        return {layer.module for layer in marked}  # besides the tied layer, which counts as an embedding
    said = {layer: overruled.get(p) for layer in outside for p in layer.module.parameters() if p.ndim > 1}
    candidates = [layer for layer in alike(model, outside) if said[layer] != "celo2"]
    chosen = [layer for layer in candidates if layer in marked or said[layer] == "adamw"]
    if marked and not chosen:  # a hidden layer may have the shape of an embedding, too
        candidates = [layer for layer in candidates if not feeds_another(model, layer)]
    if len(candidates) > 1 and not chosen:
        names, example = ", ".join(layer.name for layer in candidates), candidates[-1].name
        raise ValueError(f"""which of {names} is the output projection? Say it with rules={{"{example}": "adamw"}}""")
    return {layer.module for layer in (*(chosen or candidates or marked), *named)}


def layers_outside_blocks(model: nn.Module, skipped: set[nn.Module]) -> Iterator[Layer]:
    """Linear layers and point convolutions in model order, without those in repeated blocks, in `skipped` or for modulation."""
    blocks, factors = repeated_blocks(model), factors_of(model)
    for name, module in model.named_modules():
        size = linear_size(module)
        own = set(module.parameters(recurse=False))
        is_factor = bool(own) and own <= factors
        if size is not None and not is_factor and module not in blocks and module not in skipped and not modulates(name):
            yield Layer(name, module, *size)


def modulates(name: str) -> bool:
    """Whether the name of a module says that it makes scales and shifts from a condition (MODULATION)."""
    return any(MODULATION.fullmatch(part) for part in name.split("."))


def linear_size(module: Any) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear layer, including GPT-2's Conv1D, or of a point convolution; None for any other module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, CONVOLUTIONS) and module.groups == 1 and set(module.kernel_size) == {1}:
        return module.in_channels, module.out_channels
    if "transformers.Conv1D" in class_names(module):
        return module.nx, module.nf
    return None


def repeated_blocks(model: nn.Module) -> set[nn.Module]:
    """All modules within blocks. Blocks are modules of one class and one parent that hold several matrices each; also BLOCKS."""
    found: set[nn.Module] = set()
    factors = factors_of(model)
    for module in model.modules():
        if module in found:
            continue
        if isinstance(module, BLOCKS):
            found.update(module.modules())
        listed = isinstance(module, nn.ModuleList)
        blocks = [child for child in module.children() if has_several_matrices(child, factors)]
        for child in blocks if listed else [child for child in blocks if not isinstance(child, CONTAINERS)]:
            if (listed and len(blocks) == 1) or sum(type(child) is type(other) for other in blocks) > 1:
                found.update(child.modules())
    return found


def has_several_matrices(module: nn.Module, factors: set[Tensor]) -> bool:
    """Whether a module holds two or more weights of two or more axes, without low-rank factors."""
    return sum(p.ndim > 1 and p not in factors for p in module.parameters()) > 1


def called_heads(layers: list[Layer]) -> list[Layer]:
    """The layers named like a head (HEADS), and the last layer of each module named so."""
    found = {}
    for layer in layers:
        path = layer.name.split(".")
        if called := [i for i, name in enumerate(path) if HEADS.fullmatch(name)]:
            found[tuple(path[: called[-1] + 1])] = layer
    return list(found.values())


def feeds_another(model: nn.Module, layer: Layer) -> bool:
    """Whether a later layer outside the blocks, or a later recurrent layer, has as many inputs as `layer` has outputs."""
    later = [other for other in layers_outside_blocks(model, set()) if comes_after(model, other.module, layer.module)]
    recurrent = [m for m in model.modules() if isinstance(m, nn.RNNBase) and comes_after(model, m, layer.module)]
    return layer.outputs in {*(other.inputs for other in later), *(m.input_size for m in recurrent)}


def comes_after(model: nn.Module, one: nn.Module, other: nn.Module) -> bool:
    """Whether `one` is registered after `other` in a model."""
    order = list(model.modules())
    return order.index(one) > order.index(other)


def alike(model: nn.Module, layers: list[Layer]) -> list[Layer]:
    """The layers with the shape of the largest embedding; if there are none, those with that shape and padded rows."""
    sizes = [(m.num_embeddings, m.embedding_dim) for m in model.modules() if isinstance(m, EMBEDDINGS)]
    if not sizes:
        return []
    vocabulary, width = max(sizes, key=lambda size: size[0] * size[1])
    fitting = [layer for layer in layers if layer.inputs == width and layer.outputs >= vocabulary]
    exact = [layer for layer in fitting if layer.outputs == vocabulary]
    return exact or [layer for layer in fitting if layer.outputs <= PADDED * vocabulary]


def ending(model: nn.Module, layers: list[Layer]) -> list[Layer]:
    """The layers that end a model: the last one, parallel heads, and the last layers of networks parallel to the last one."""
    parents = {child: (module, name) for module in model.modules() for name, child in module.named_children()}
    factors = factors_of(model)
    found_in: dict[nn.Module, bool] = {}  # layers with parameters, in model order: whether a parameter has several axes
    for module_name, module in model.named_modules():
        for attribute, p in () if modulates(module_name) else module.named_parameters(recurse=False):
            owner, _ = owner_of(module, attribute, parents)
            if p not in factors:
                found_in[owner] = found_in.get(owner, False) or p.ndim > 1
    holders = list(found_in)
    found: list[Layer] = []
    for layer in reversed(layers):
        if layer.module is not holders[len(holders) - 1 - len(found)] or sum(found_in.values()) == 1:
            break
        if found and not are_beside(layer, found[-1]):
            break
        found.append(layer)
    return found + networks_beside(layers) if found else []


def networks_beside(layers: list[Layer]) -> list[Layer]:
    """The last layers of networks parallel to the last network: at least as deep, with as many inputs (an actor and a critic).

    A network is a chain of layers, each with as many inputs as the layer before it has outputs.
    """
    chains: list[list[Layer]] = []
    for layer in layers:
        if chains and chains[-1][-1].outputs == layer.inputs:
            chains[-1].append(layer)
        else:
            chains.append([layer])
    *others, last = chains
    found: list[Layer] = []
    read = {layer.inputs for layer in last}  # the input sizes of all later networks
    for chain in reversed(others):
        beside = len(chain) >= len(last) > 1 and chain[-len(last)].inputs == last[0].inputs
        if not beside or chain[-1].outputs in read:
            break
        found.append(chain[-1])
        read.update(layer.inputs for layer in chain)
    return found


def are_beside(one: Layer, other: Layer) -> bool:
    """Whether two layers of one module have equal inputs and neither can feed the other, as the heads of several tasks."""
    same_module = one.name.rpartition(".")[0] == other.name.rpartition(".")[0]
    return same_module and one.inputs == other.inputs and one.inputs not in (one.outputs, other.outputs)
