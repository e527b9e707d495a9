"""Small networks of several kinds, written with nn.Linear alone, so that every optimizer sees plain matrices.

Legend: B batch, T positions, D width, V vocabulary (256 bytes).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 256


class Network(nn.Module):
    """What the evaluation needs of a network: its input and output layers, which AdamW trains, and the mean loss of a batch."""

    boundary: list[nn.Module]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        raise NotImplementedError


class Block(nn.Module):
    """A pre-norm transformer block: attention with separate q, k, v, o, then a GELU MLP four times as wide."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))  # (B, nh, T, hs)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.o(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(Network):
    """Blocks on embedded bytes (a GPT) or on embedded image patches (a vision transformer, averaged over positions)."""

    def __init__(
        self, width: int, layers: int, heads: int, positions: int, patch: int | None = None, classes: int = BYTES
    ) -> None:
        super().__init__()
        self.is_gpt = patch is None
        self.embedding = nn.Embedding(BYTES, width) if patch is None else nn.Linear(patch, width)
        self.position = nn.Embedding(positions, width)
        blocks = [Block(width, heads, causal=self.is_gpt) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes, bias=False)
        self.boundary = [self.embedding, self.position, self.head]
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 if self.is_gpt else p.shape[1] ** -0.5)
        for block in blocks:
            nn.init.normal_(block.o.weight, std=block.o.in_features**-0.5 / (2 * layers) ** 0.5)
            nn.init.normal_(block.down.weight, std=block.down.in_features**-0.5 / (2 * layers) ** 0.5)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy: bytes x, y (B, T), or patches x (B, T, pixels) and classes y (B,)."""
        h = self.embedding(x) + self.position.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        logits = self.head(h if self.is_gpt else h.mean(1))
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())


class Convolutional(Network):
    """Three 3 × 3 convolutions with a residual around the last two, as products with unfolded patches; then the mean."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(9, channels)
        self.second, self.third = nn.Linear(9 * channels, channels), nn.Linear(9 * channels, channels)
        self.head = nn.Linear(channels, classes)
        self.boundary = [self.first, self.head]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of images x (B, 64) and classes y (B,)."""
        h = self.convolve(self.first, x.view(-1, 1, 8, 8))
        h = h + self.convolve(self.third, self.convolve(self.second, h))
        return F.cross_entropy(self.head(h.mean((2, 3))), y)

    @staticmethod
    def convolve(layer: nn.Linear, x: Tensor) -> Tensor:
        """ReLU of a 3 × 3 convolution of x (B, C, 8, 8)."""
        patches = F.unfold(x, 3, padding=1).mT  # (B, 64, 9C)
        return F.relu(layer(patches)).mT.unflatten(-1, (8, 8))


class Autoencoder(Network):
    """64-128-64-16-64-128-64 with GELU; the loss is the mean squared error of pixels with variance 1."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (64, 128, 64, 16, 64, 128, 64)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.boundary = [self.layers[0], self.layers[-1]]

    def loss(self, x: Tensor, _: Tensor) -> Tensor:
        """Mean squared error of images x (B, 64)."""
        h = x
        for i, layer in enumerate(self.layers):
            h = layer(h if i in (0, 3) else F.gelu(h))
        return F.mse_loss(h, x)


class Recurrent(Network):
    """A two-layer recurrent language model on bytes: h = tanh(W x + U h)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(BYTES, width), nn.Linear(width, BYTES, bias=False)
        self.inputs = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.recurrent = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.boundary = [self.embedding, self.head]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of bytes x, y (B, T)."""
        h = self.embedding(x)
        for inputs, recurrent in zip(self.inputs, self.recurrent, strict=True):
            driven, state, outputs = inputs(h), torch.zeros_like(h[:, 0]), []
            for t in range(x.shape[1]):
                state = torch.tanh(driven[:, t] + recurrent(state))
                outputs.append(state)
            h = torch.stack(outputs, 1)
        return F.cross_entropy(self.head(h).flatten(0, -2), y.flatten())
