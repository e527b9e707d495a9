"""Looking inside a run: statistics of layers, a profile, a snapshot of memory, deterministic algorithms."""

import gzip
import json
import math

import pytest
import torch
from bad_gradients import Poison
from transformers import GPT2Config, GPT2LMHeadModel

from configs.schema import Config
from data.batches import Batches
from data.shards import TokenShards
from launch.checkpoint.load import load_model
from launch.checkpoint.tensors import read_tensors
from launch.run import diagnostics
from launch.run.attention import AttentionLogits, largest_logit
from launch.run.diagnostics import Diagnostics
from launch.run.hooks import Hooks

OPTIONS = [
    "train.steps=4",
    "eval.every=0",
    "checkpoint.every=1",
    "checkpoint.keep=9",
    "log.sample_tokens=0",
    "train.grad_clip=0.2",
]
OPTIONS += ["model.dropout=0.1", "train.micro_batch_size=4"]


def attention_logits(checkpoint, inputs):
    """By hand, from the outputs of the projections of a GPT-3 without a bias of attention."""
    model, found = load_model(checkpoint), []
    with torch.no_grad():
        for block in model.model.layers:
            kept = {}
            for name in ("q_proj", "k_proj"):
                getattr(block.attn, name).register_forward_hook(lambda _, __, out, kept=kept, name=name: kept.update({name: out}))
            found.append(kept)
        model(inputs)
        q, k = ([kept[name].unflatten(-1, (2, -1)).transpose(1, 2) for kept in found] for name in ("q_proj", "k_proj"))
        T = inputs.shape[1]
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        return [
            (a @ b.mT / math.sqrt(a.shape[-1])).masked_fill(future, -math.inf).max().item() for a, b in zip(q, k, strict=True)
        ]


def test_statistics_of_every_layer(run, prepared):
    status, records, _ = run(*OPTIONS, "log.layers=2", "log.every=3", folder="seen")
    assert status == 0
    seen = {r["step"]: r for r in records if "loss" in r}
    assert seen.keys() == {1, 2, 3, 4} and "weight_norm/model.norm.weight" not in seen[3]
    _, plain, _ = run(*OPTIONS, "log.every=1", folder="plain")
    assert [r["step_loss"] for r in plain if "loss" in r] == [seen[step]["step_loss"] for step in range(1, 5)]
    assert not any("/" in key for r in plain for key in r) and not (run.tmp_path / "plain" / "layers.png").exists()

    folders = {step: run.tmp_path / f"seen/checkpoints/step_{step:08}" for step in range(1, 5)}
    for step in (2, 4):
        before, after = (read_tensors(folders[s] / "model.safetensors") for s in (step - 1, step))
        record = seen[step]
        assert {key.partition("/")[2] for key in record if key.startswith("grad_norm/")} == before.keys()
        total = sum(record[f"grad_norm/{name}"] ** 2 for name in before) ** 0.5
        assert total == pytest.approx(record["grad_norm"], rel=1e-6) and total > 0.2  # before clipping
        for name, weight in before.items():
            assert record[f"weight_norm/{name}"] == pytest.approx(weight.norm().item(), rel=1e-5)
            moved = (after[name].double() - weight.double()).norm().item()
            assert record[f"update_norm/{name}"] == pytest.approx(moved, rel=1e-5, abs=1e-12)
        batches = Batches(TokenShards(prepared, "train"), 32, 8, seed=1)
        inputs = batches.micro_batches(step - 1, 0, 1, 8)[0][0]
        logits = [value for key, value in record.items() if key.startswith("attention_logit/")]
        assert logits == pytest.approx(attention_logits(folders[step - 1], inputs), rel=1e-4)
        # Celo2's Newton-Schulz leaves singular values between about 0.7 and 1.2, but for those that were nearly 0.
        for name in {key.split("/")[1] for key in record if key.startswith("singular_after/")}:
            values = [
                record[f"singular_{when}/{name}/{word}"] for when in ("before", "after") for word in ("max", "median", "min")
            ]
            assert 1 >= values[0] > values[1] > values[2] and 0.6 < values[4] <= values[3] < 1.3
    assert sum(key.startswith("singular_after/") for key in seen[4]) == 9
    _, records, _ = run(*OPTIONS, "log.layers=2", hooks=Poison({2}), folder="refused")  # a step that is not finite
    second = next(r for r in records if r["step"] == 2)
    assert all(value is None for key, value in second.items() if key.startswith(("grad_norm/", "singular_")))
    assert all(value == 0 for key, value in second.items() if key.startswith("update_norm/")) and records[-1]["step"] == 4
    assert (run.tmp_path / "seen" / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_a_logit_is_what_the_softmax_gets():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    scores = q @ k.repeat_interleave(2, 1).mT
    mask = torch.rand(2, 1, 5, 5) < 0.5
    assert largest_logit(q, k, v, scale=0.5, enable_gqa=True) == pytest.approx(scores.max().item() / 2)
    masked = scores.masked_fill(~mask, -math.inf).max() / math.sqrt(8)
    assert largest_logit(q, k, v, mask, enable_gqa=True) == pytest.approx(masked.item())
    added = (scores / math.sqrt(8) + mask.float() * 3).max()
    assert largest_logit(q, k, v, mask.float() * 3, enable_gqa=True) == pytest.approx(added.item())
    found = []
    shape = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    for how in ("eager", "sdpa"):
        torch.manual_seed(1)
        model = GPT2LMHeadModel(GPT2Config(**shape, attn_implementation=how)).eval()
        with torch.no_grad(), AttentionLogits(model, torch.device("cpu")) as logits:
            model(torch.arange(8)[None])
        assert logits.names == ["transformer.h.0", "transformer.h.1"]
        found.append(logits.largest.tolist())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


class Observe(Hooks):
    def __init__(self, error=None):
        self.deterministic, self.error = [], error

    def before_step(self, step, strategy):
        self.deterministic.append(torch.are_deterministic_algorithms_enabled())
        if self.error:
            raise self.error


def test_a_profile_and_deterministic_algorithms(run):
    observed = Observe()
    status, _, _ = run(*OPTIONS, "log.profile=[2, 3]", "train.deterministic=true", hooks=observed)
    assert status == 0 and observed.deterministic == [True] * 4 and not torch.are_deterministic_algorithms_enabled()
    folder = run.tmp_path / "run" / "profile"
    with gzip.open(folder / "rank_0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event["name"].startswith("Optimizer.step#") for event in events) >= 2
    assert "aten::" in (folder / "rank_0.txt").read_text()
    for window, steps, note in (([3, 6], 6, ""), ([1, 2], 7, "log.profile is [1, 2], but the run resumes after step 6: nothing")):
        (folder / "rank_0.txt").unlink(missing_ok=True)
        status, _, _ = run(*OPTIONS, f"log.profile={window}", f"train.steps={steps}")
        assert status == 0 and note in run.out and (folder / "rank_0.txt").exists() != bool(note)
    error = RuntimeError("some_cuda does not have a deterministic implementation, but you set ...")
    status, _, err = run(*OPTIONS, "train.deterministic=true", folder="error", hooks=Observe(error))
    assert status == 2 and err.startswith("error: train.deterministic: some_cuda does not have")
    for option, message in (
        ("log.profile=[3, 2]", "log.profile is [3, 2], expected a first and a last step"),
        ("log.profile=[2]", "log.profile is [2], expected a first"),
        ("log.profile=[2, 5]", "between 1 and 4"),
        ("log.memory_snapshot=true", "log.memory_snapshot needs a GPU, and this run has none"),
        ("log.layers=-1", "log.layers is -1, expected at least 0"),
    ):
        status, _, err = run(*OPTIONS, option, folder="bad")
        assert status == 2 and message in err and err.count("\n") == 1, option


def test_a_snapshot_is_written_when_memory_does_not_suffice(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(diagnostics, "record_memory_history", lambda: calls.append("record"))
    monkeypatch.setattr(diagnostics, "dump_memory_history", calls.append)

    class OneRank:
        class accelerator:
            process_index = 3

    config = Config()
    config.log.memory_snapshot = True
    with pytest.raises(torch.OutOfMemoryError), Diagnostics(config, OneRank, tmp_path, print):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert calls == ["record", tmp_path / "memory_rank_3.pickle"]
    with pytest.raises(ValueError), Diagnostics(config, OneRank, tmp_path, print):
        raise ValueError
    assert calls[2:] == ["record"]
