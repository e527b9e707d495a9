"""The two families of inner problems: networks 64-32-10 on images, and small transformers on text.

A family names the weights of its network, and says how they start and how they are trained. Its loss in plain torch serves all
unrolls at once. The transformer's weights are (out, in), as `nn.Linear` holds them, because the rule treats the two axes of a
square matrix differently: it must meet them as in large models.

Legend: U unrolls, B images or sequences, T positions of a sequence, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from celo2.metatrain.config import Config
from celo2.metatrain.tasks import CLASSES, CONTEXT, SIDE, VOCABULARY, Images, Texts

HIDDEN = 32  # of the image network
WIDTH, SEQUENCES = 32, 8  # of the transformer, and of a batch
EMBEDDING_STD = 0.02  # and of every matrix that does not write into the residual stream
NORM_EPS = 1e-6

Shape = tuple[int, ...]
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Family:
    """A kind of inner problem: its network, its data, and how it is trained.

    Attributes:
        name: "images" or "text".
        data, arrays: the tasks, and the arrays of them that `losses` reads.
        shapes: of each weight, by name.
        boundary: names of the weights that take Adam in Celo2.
        batch: examples per step.
        lr, adam_lr: inner learning rates of the rule and of Adam.
        scales: smallest and largest s of the reparametrization.
        uniform_loss: cross-entropy of a uniform guess.
        draw: the initial value of a weight from (random numbers, name, shape).
        losses: mean cross-entropies (U,) of weights (U, *shape) on the `arrays`' examples (U, B), differentiable.
    """

    name: str
    data: Images | Texts
    arrays: tuple[np.ndarray, ...]
    shapes: Mapping[str, Shape]
    boundary: frozenset[str]
    batch: int
    lr: float
    adam_lr: float
    scales: tuple[float, float]
    uniform_loss: float
    draw: Callable[[np.random.Generator, str, Shape], np.ndarray]
    losses: Callable[[Mapping[str, Tensor], Batch, Tensor], Tensor]


def family_of(config: Config, data: Images | Texts) -> Family:
    """The family that learns from `data`."""
    return image_family(config, data) if isinstance(data, Images) else text_family(config, data)


def image_family(config: Config, data: Images) -> Family:
    """64-32-10 with ReLU and biases."""
    return Family(
        "images",
        data,
        arrays=(data.pixels, data.labels),
        shapes={"w1": (SIDE * SIDE, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, CLASSES), "b2": (CLASSES,)},
        boundary=frozenset({"b1", "b2"}),
        batch=config.images.batch_size,
        lr=config.images.lr,
        adam_lr=config.images.adam_lr,
        scales=(config.images.min_scale, config.images.max_scale),
        uniform_loss=math.log(CLASSES),
        draw=draw_image_weight,
        losses=image_losses,
    )


def text_family(config: Config, data: Texts) -> Family:
    """A pre-norm transformer on bytes: one head, ReLU² MLP four times as wide, RMS norms without weights, no biases."""
    block = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "o": (WIDTH, WIDTH)}
    block |= {"up": (4 * WIDTH, WIDTH), "down": (WIDTH, 4 * WIDTH)}
    boundary = {"embedding": (VOCABULARY, WIDTH), "position": (CONTEXT, WIDTH), "head": (VOCABULARY, WIDTH)}
    blocks = {f"{name}{i}": shape for i in range(config.text.layers) for name, shape in block.items()}
    residual = 1 / math.sqrt(2 * config.text.layers)

    def draw(rng: np.random.Generator, name: str, shape: Shape) -> np.ndarray:
        """As GPT-2: small, and what is added to the residual stream the smaller the deeper the network."""
        std = residual / math.sqrt(shape[1]) if name.startswith(("o", "down")) else EMBEDDING_STD
        return std * rng.standard_normal(shape)

    return Family(
        "text",
        data,
        arrays=(data.tokens,),
        shapes=boundary | blocks,
        boundary=frozenset(boundary),
        batch=SEQUENCES,
        lr=config.text.lr,
        adam_lr=config.text.adam_lr,
        scales=(config.text.min_scale, config.text.max_scale),
        uniform_loss=math.log(VOCABULARY),
        draw=draw,
        losses=text_losses,
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


def text_losses(weights: Mapping[str, Tensor], arrays: Batch, rows: Tensor) -> Tensor:
    """Mean cross-entropies (U,) of the transformers on the sequences that start at bytes `rows` (U, B)."""
    positions = torch.arange(CONTEXT, device=rows.device)
    window = arrays[0][rows[..., None] + torch.arange(CONTEXT + 1, device=rows.device)].long()  # (U, B, T + 1)
    tokens, targets = window[..., :-1], window[..., 1:]
    future = positions > positions[:, None]  # (T, T)
    w = {name: x[:, None] for name, x in weights.items()}  # (U, 1, out, in), against (U, B, T, in)

    # A product with one-hot rows: its gradient is the same from run to run on a GPU, an index's is not.
    one_hot = (tokens[..., None] == torch.arange(VOCABULARY, device=rows.device)).float()
    x = one_hot @ w["embedding"] + w["position"]  # (U, B, T, D)
    for i in range(sum(name.startswith("q") for name in weights)):
        h = F.rms_norm(x, (WIDTH,), eps=NORM_EPS)
        q, k, v = (h @ w[f"{name}{i}"].mT for name in "qkv")
        scores = (q @ k.mT / math.sqrt(WIDTH)).masked_fill(future, -math.inf)
        x = x + scores.softmax(-1) @ v @ w[f"o{i}"].mT
        h = F.rms_norm(x, (WIDTH,), eps=NORM_EPS)
        x = x + torch.relu(h @ w[f"up{i}"].mT).square() @ w[f"down{i}"].mT
    logits = F.rms_norm(x, (WIDTH,), eps=NORM_EPS) @ w["head"].mT  # (U, B, T, V)
    return F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(len(rows), -1).mean(1)
