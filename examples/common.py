"""What the examples train: a GPT-2 that a laptop can train, on the bytes of this project's documents."""

from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def text_sequences(length: int = 64) -> torch.Tensor:
    """docs/*.md as bytes, in a fixed random order: token ids (sequences, length)."""
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parents[1].glob("docs/*.md")))
    rows = torch.tensor(list(text[: len(text) // length * length])).view(-1, length)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def small_gpt2() -> GPT2LMHeadModel:
    """2 layers of width 64 over bytes, without dropout; always the same weights."""
    torch.manual_seed(0)
    size = {"vocab_size": 256, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**size, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0))
