"""Models without memory: what their architecture writes into a parameter can be had for any of its elements alone."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import logging

from models import ModelError, build_model, initialization
from models.initialization import Held, Initialization, Recorder, outline, without_memory

sys.path.append(str(Path(__file__).parent))
from tiny_models import ALL_TYPES, VOCABULARY, tiny

# Reviewed: their initialization reads what it has written, so that the model is made in memory first.
IN_MEMORY = {"bailing_hybrid", "kimi_linear", "nemotron_h", "rwkv"}
CANNOT_BE_BUILT = {"emu3", "gemma4_assistant", "mllama", "musicgen", "musicgen_melody"}  # see test_launch_any_model.py


class Unusual(nn.Module):
    """One parameter of each kind of initialization."""

    def __init__(self):
        super().__init__()
        self.held = nn.Parameter(torch.arange(12.0).view(3, 4))
        self.ones = nn.Parameter(torch.ones(5, 7))
        self.normal = nn.Parameter(torch.empty(10, 30))
        self.row = nn.Embedding(40, 8, padding_idx=3).weight
        self.truncated = nn.Parameter(torch.empty(20, 20))
        self.halves = nn.Parameter(torch.empty(8, 16))
        self.column = nn.Parameter(torch.zeros(6, 6))
        self.orthogonal = nn.Parameter(torch.empty(6, 6))
        self.eye = nn.Parameter(torch.empty(4, 6))
        self.copied = nn.Parameter(torch.empty(50))
        self.scaled = nn.Parameter(torch.randn(64))
        self.register_buffer("buffer", torch.arange(3.0))
        self.tied = self.normal
        with torch.no_grad():
            self.normal.normal_(std=0.5)
            nn.init.trunc_normal_(self.truncated, std=2.0, a=-3.0, b=3.0)
            self.halves[:4].fill_(2.0)
            self.halves[4:].uniform_(1, 3)
            self.column[:, 2] = 1.0
            nn.init.orthogonal_(self.orthogonal)
            nn.init.eye_(self.eye)
            self.copied.copy_(torch.linspace(0, 1, 50, device=self.copied.device))
            self.scaled.data.mul_(0.0).add_(3.0)


@pytest.mark.parametrize("chunk", [16, 1 << 20])
def test_every_part_is_a_part_of_the_whole(monkeypatch, chunk):
    monkeypatch.setattr(initialization, "CHUNK", chunk)
    torch.manual_seed(0)
    model, weights = outline(Unusual, seed=5)
    assert isinstance(weights, Initialization) and all(p.is_meta for p in model.parameters())
    assert torch.equal(model.buffer, torch.arange(3.0)) and model.tied is model.normal
    found = {}
    for name, p in model.named_parameters():
        found[name] = whole = weights.read(name, 0, p.numel())
        for start, stop in [(0, 1), (5, 9), (15, 17), (p.numel() // 3, p.numel()), (7, 7)]:
            start, stop = min(start, p.numel()), min(stop, p.numel())
            assert torch.equal(weights.read(name, start, stop), whole[start:stop]), name
        found[name] = whole.view(p.shape)
    assert torch.equal(found["held"], torch.arange(12.0).view(3, 4)) and (found["ones"] == 1).all()
    assert not found["row"][3].any() and (found["row"][4:] != 0).all()
    assert found["truncated"].abs().max() <= 3 and 1.0 < found["truncated"].std() < 2.0
    assert (found["halves"][:4] == 2).all() and found["halves"][4:].min() >= 1 and found["halves"][4:].std() > 0.3
    assert (found["column"].sum(0) == torch.tensor([0, 0, 6, 0, 0, 0])).all()
    assert torch.allclose(found["orthogonal"] @ found["orthogonal"].T, torch.eye(6), atol=1e-5)
    assert torch.equal(found["eye"], torch.eye(4, 6)) and torch.equal(found["copied"], torch.linspace(0, 1, 50))
    assert (found["scaled"] == 3).all() and abs(found["normal"].std() - 0.5) < 0.1


def test_a_weight_follows_from_seed_and_name_alone():
    """However many layers there are, and whatever else has drawn random numbers."""
    shape = {"width": 16, "heads": 2, "context": 8, "vocab_size": 20}
    name = "model.layers.1.mlp.up_proj.weight"
    first = outline(lambda: build_model(layers=2, **shape), seed=1)[1].read(name, 0, 1024)
    torch.rand(3)
    assert torch.equal(outline(lambda: build_model(layers=3, **shape), seed=1)[1].read(name, 0, 1024), first)
    assert not torch.equal(outline(lambda: build_model(layers=2, **shape), seed=2)[1].read(name, 0, 1024), first)
    other = outline(lambda: build_model(layers=2, **shape), seed=1)[1].read(name.replace("1", "0"), 0, 1024)
    assert not torch.equal(other, first)


def test_an_initialization_that_reads_its_weights_is_done_in_memory():
    class Reads(nn.Linear):
        def reset_parameters(self):
            super().reset_parameters()
            with torch.no_grad():
                self.weight.copy_(self.weight / 2)

    class Asks(nn.Linear):
        def reset_parameters(self):
            super().reset_parameters()
            assert self.weight.abs().max() < 1  # raises on the meta device

    for kind in (Reads, Asks):
        torch.manual_seed(0)
        expected = kind(8, 4).weight.detach().clone()
        torch.manual_seed(0)
        model, weights = outline(lambda kind=kind: kind(8, 4), seed=1)
        assert isinstance(weights, Held) and model.weight.is_meta
        assert torch.equal(weights.read("weight", 3, 20), expected.flatten()[3:20])
        assert all(p.is_meta for p in without_memory(lambda kind=kind: kind(8, 4))[0].parameters())


def test_what_is_wrong_with_a_model_is_raised_and_nothing_stays_patched():
    before = nn.init.trunc_normal_, nn.init.orthogonal_
    with pytest.raises(ModelError, match="heads do not divide"):
        outline(lambda: build_model(layers=1, width=8, heads=3, context=4, vocab_size=8), seed=0)
    assert (nn.init.trunc_normal_, nn.init.orthogonal_) == before
    assert not nn.Linear(2, 2).weight.is_meta


def test_building_takes_no_memory_for_weights():
    """A model of 175 billion weights."""
    model, weights = outline(lambda: build_model(size="gpt3-175b", vocab_size=50304), seed=0)
    assert model.num_parameters() > 1.7e11
    assert weights.read("model.layers.95.mlp.down_proj.weight", 10**8, 10**8 + 3).std() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ALL_TYPES)
def test_every_type_begins_as_its_architecture_says(model_type):
    """Mean and standard deviation of every parameter are those of the model that transformers makes, and constants are equal."""
    logging.set_verbosity_error()

    def build():
        return build_model(hf=tiny(model_type), vocab_size=VOCABULARY)

    if model_type in CANNOT_BE_BUILT:
        with pytest.raises(ModelError):
            build()
        return
    torch.manual_seed(0)
    real = build()
    torch.manual_seed(0)
    model, weights = outline(build, seed=1)
    assert isinstance(weights, Held) == (model_type in IN_MEMORY)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in real.named_parameters()]
    for name, buffer in real.named_buffers():
        assert torch.equal(buffer.nan_to_num(), model.get_buffer(name).nan_to_num()), name
    for name, p in real.named_parameters():
        found = weights.read(name, 0, p.numel()).view(p.shape)
        assert found.dtype == p.dtype and model.get_parameter(name).requires_grad == p.requires_grad
        if isinstance(weights, Held):
            assert torch.equal(found, p), name
            continue
        third = p.numel() // 3
        assert torch.equal(weights.read(name, third, 2 * third), found.flatten()[third : 2 * third]), name
        assert all(operation.in_parts for operation in weights.recipes[name].operations), name
        here, there = found.double(), p.detach().double()
        slack = 7 * (here.std() + there.std()) / math.sqrt(p.numel()) if p.numel() >= 64 else math.inf  # few: any random number
        assert abs(here.mean() - there.mean()) <= slack + 1e-6, name
        assert abs(here.std() - there.std()) <= slack + 1e-6 or p.numel() < 64, name
        if there.min() == there.max():
            assert torch.equal(here, there), name


def test_what_is_registered_twice_is_one_parameter():
    recorder = Recorder()
    with recorder.watching():
        model = build_model(layers=1, width=8, heads=2, context=4, vocab_size=8)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(recorder.found(model)) == len(list(model.parameters()))
