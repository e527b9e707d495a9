"""The two families of inner problems: networks 64-32-10 on images, and small transformers on text.

A family names the weights of its network, and says how they start, how they are trained and with what state. Its loss in plain
torch serves all unrolls at once. The transformer's weights are (out, in), as `nn.Linear` holds them: the rule treats the two axes
of a square matrix differently, and must see them as in large models.

Legend: U unrolls, B images or sequences, T positions of a sequence, D width, A heads, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from celo2 import rule as rules
from celo2.metatrain.config import Config, Images, Text, text_sizes, whitening
from celo2.metatrain.tasks import CLASSES, SIDE, VOCABULARY, Data

HIDDEN = 32  # of the image network
EMBEDDING_STD = 0.02  # and of every matrix that does not write into the residual stream
NORM_EPS = 1e-6
ADAM_BETAS, ADAM_EPS = (0.9, 0.95), 1e-8
TINY = 1e-30  # added to the product of the norms of two steps before their cosine is taken

Arrays = dict[str, np.ndarray]
Shape = tuple[int, ...]
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Family:
    """A kind of inner problem: its network, its data, and how it is trained.

    Attributes:
        name: differs from those of all other families.
        label: distinguishes its tasks from those of another size; may be empty.
        data: the tasks.
        options: inner learning rates, the smallest and largest s of the reparametrization, and the sizes of a text network.
        shapes: of each weight, by name.
        by_adam: names of the weights that Adam trains: in Celo2 biases, embeddings and a head, in Celo2-base none.
        whitened: whether the matrices that the rule trains have whiteners.
        batch: examples per step.
        uniform_loss: cross-entropy of a uniform guess.
        draw: the initial value of a weight from (random numbers, name, shape).
        losses: mean cross-entropies (U,) of weights (U, *shape) on examples (U, B) of the data's arrays, differentiable.
    """

    name: str
    label: str
    data: Data
    options: Images | Text
    shapes: Mapping[str, Shape]
    by_adam: frozenset[str]
    whitened: bool
    batch: int
    uniform_loss: float
    draw: Callable[[np.random.Generator, str, Shape], np.ndarray]
    losses: Callable[[Mapping[str, Tensor], Batch, Tensor], Tensor]

    def accumulator_shapes(self, name: str) -> dict[str, Shape]:
        """Accumulators of one weight of one unroll."""
        shape = self.shapes[name]
        if name in self.by_adam:
            return {"m": shape, "v": shape}
        return rules.accumulator_shapes(shape, rules.factored_axes(shape) if len(shape) > 1 else None, self.whitened)

    def initial_state(self, weights: Arrays, copies: int = 2) -> Arrays:
        """`copies` unrolls of each problem with weights (N, *shape): `NAME.weight` (U, *shape), and zero accumulators."""
        state = {}
        for name, w in weights.items():
            state[f"{name}.weight"] = np.repeat(w, copies, axis=0)
            for key, shape in self.accumulator_shapes(name).items():
                state[f"{name}.{key}"] = np.zeros((copies * len(w), *shape), np.float32)
        return state


def families_of(config: Config, data: Data) -> list[Family]:
    """The families that learn from `data`: one for images; for texts, one for each size."""
    if data.kind == "images":
        return [image_family(config, data)]
    return [text_family(config, data, n) for n in range(len(text_sizes(config)))]


def family_of(config: Config, data: Data) -> Family:
    """The first one of `families_of`."""
    return families_of(config, data)[0]


def image_family(config: Config, data: Data) -> Family:
    """64-32-10 with ReLU and biases."""
    return Family(
        "images",
        "",
        data,
        config.images,
        shapes={"w1": (SIDE * SIDE, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, CLASSES), "b2": (CLASSES,)},
        by_adam=frozenset({"b1", "b2"} if config.rule.variant == "celo2" else ()),
        whitened=whitening(config) > 0,
        batch=config.images.batch_size,
        uniform_loss=math.log(CLASSES),
        draw=draw_image_weight,
        losses=image_losses,
    )


def text_family(config: Config, data: Data, n: int = 0) -> Family:
    """A pre-norm transformer of size `n` on bytes: ReLU² MLP four times as wide, RMS norms without weights, no biases."""
    size = text_sizes(config)[n]
    width = size.width
    block = dict.fromkeys("qkvo", (width, width)) | {"up": (4 * width, width), "down": (width, 4 * width)}
    boundary = {"embedding": (VOCABULARY, width), "position": (size.context, width), "head": (VOCABULARY, width)}
    blocks = {f"{name}{i}": shape for i in range(size.layers) for name, shape in block.items()}
    residual = 1 / math.sqrt(2 * size.layers)

    def draw(rng: np.random.Generator, name: str, shape: Shape) -> np.ndarray:
        """As in GPT-2: small; weights that write into the residual stream are the smaller the deeper the network."""
        std = residual / math.sqrt(shape[1]) if name.startswith(("o", "down")) else EMBEDDING_STD
        return std * rng.standard_normal(shape)

    return Family(
        f"text{n or ''}",
        f" {config.text.also[n - 1]}" if n else "",
        data,
        size,
        shapes=boundary | blocks,
        by_adam=frozenset(boundary if config.rule.variant == "celo2" else ()),
        whitened=whitening(config) > 0,
        batch=size.sequences,
        uniform_loss=math.log(VOCABULARY),
        draw=draw,
        losses=functools.partial(text_losses, heads=size.heads),
    )


def draw_image_weight(rng: np.random.Generator, name: str, shape: Shape) -> np.ndarray:
    """Normal with deviation 1 / sqrt(fan-in), within two deviations; biases zero."""
    return truncated_normal(rng, shape) / math.sqrt(shape[0]) if len(shape) == 2 else np.zeros(shape)


def truncated_normal(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """Standard normal samples, drawn again while beyond two standard deviations."""
    x = rng.standard_normal(shape)
    while (far := np.abs(x) > 2).any():
        x[far] = rng.standard_normal(int(far.sum()))
    return x


def image_losses(weights: Mapping[str, Tensor], arrays: Batch, rows: Tensor) -> Tensor:
    """Mean cross-entropies (U,) of the networks on images `rows` (U, B)."""
    pixels, labels = arrays
    h = torch.relu(pixels[rows] @ weights["w1"] + weights["b1"][:, None])  # (U, B, 32)
    logits = h @ weights["w2"] + weights["b2"][:, None]  # (U, B, 10)
    return F.cross_entropy(logits.mT, labels[rows], reduction="none").mean(1)


def text_losses(weights: Mapping[str, Tensor], arrays: Batch, rows: Tensor, heads: int) -> Tensor:
    """Mean cross-entropies (U,) of the transformers on the sequences that start at bytes `rows` (U, B)."""
    context, width = weights["position"].shape[1:]
    positions = torch.arange(context, device=rows.device)
    window = arrays[0][rows[..., None] + torch.arange(context + 1, device=rows.device)].long()  # (U, B, T + 1)
    tokens, targets = window[..., :-1], window[..., 1:]
    future = positions > positions[:, None]  # (T, T)
    w = {name: x[:, None] for name, x in weights.items()}  # (U, 1, out, in), against (U, B, T, in)

    # A product with one-hot rows: its gradient is the same from run to run on a GPU, an index's is not.
    one_hot = (tokens[..., None] == torch.arange(VOCABULARY, device=rows.device)).float()
    x = one_hot @ w["embedding"] + w["position"]  # (U, B, T, D)
    for i in range(sum(name.startswith("q") for name in weights)):
        h = F.rms_norm(x, (width,), eps=NORM_EPS)
        q, k, v = ((h @ w[f"{name}{i}"].mT).unflatten(-1, (heads, -1)).transpose(-2, -3) for name in "qkv")  # (U, B, A, T, D / A)
        scores = (q @ k.mT / math.sqrt(width / heads)).masked_fill(future, -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(-2, -3).flatten(-2) @ w[f"o{i}"].mT
        h = F.rms_norm(x, (width,), eps=NORM_EPS)
        x = x + torch.relu(h @ w[f"up{i}"].mT).square() @ w[f"down{i}"].mT
    logits = F.rms_norm(x, (width,), eps=NORM_EPS) @ w["head"].mT  # (U, B, T, V)
    return F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(len(rows), -1).mean(1)
