"""Persistent buffers and frozen weights over two processes: equal on all ranks, as in one process, saved and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import launch.run.setup
import launch.run.summary
import train
from launch.checkpoint.tensors import read_tensors
from launch.distributed.buffers import copies, frozen_to_buffers, persistent_buffers, settle
from launch.run.setup import build_model

ROOT = Path(__file__).parents[2]
HF = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
OPTIONS = [f"model.{key}=null" for key in ("layers", "width", "heads")]
OPTIONS += [f"model.hf={json.dumps(HF)}", "log.sample_tokens=0", "train.steps=4", "checkpoint.every=2", "eval.every=0"]
STRATEGIES = ("ddp", "zero1", "zero3", "fsdp2")
BUFFERS = {"model.embed_tokens.mean", "model.embed_tokens.calls", "model.norm.frozen"}


def with_statistics(**options):
    """`build_model` of a model with a running mean of its embeddings, a count of its forward passes and a frozen weight."""
    model = build_model(**options)
    embedding = model.get_input_embeddings()
    embedding.register_buffer("mean", torch.zeros(32))
    embedding.register_buffer("calls", torch.zeros((), dtype=torch.int64))
    model.model.norm.frozen = nn.Parameter(torch.arange(3.0), requires_grad=False)

    def update(module, inputs, output):
        if module.training:
            module.mean = 0.9 * module.mean + output.detach().mean((0, 1))  # another tensor, not the same one changed
            module.calls += 1

    embedding.register_forward_hook(update)
    return model


@pytest.mark.parametrize("strategies", [("fsdp2",), pytest.param(STRATEGIES, marks=pytest.mark.slow)])
def test_statistics_of_two_processes_are_those_of_one(strategies, run, prepared, monkeypatch):
    monkeypatch.setattr("launch.run.setup.build_model", with_statistics)
    assert run(*OPTIONS, folder="one")[0] == 0
    folder = run.tmp_path
    common = [str(folder / "config.yaml"), f"data.dir={prepared}", *OPTIONS, "train.micro_batch_size=4"]
    runs = []
    for name in strategies:
        runs.append([*common, f"distributed.strategy={name}", f"run.dir={folder / name}"])
        half = folder / name / "checkpoints" / "step_00000002"
        runs.append([*runs[-1][:-1], f"checkpoint.resume={half}", f"run.dir={folder / name}-resumed"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = {**os.environ, "RUNS": json.dumps(runs), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr

    last = "checkpoints/step_00000004/model.safetensors"
    one = read_tensors(folder / "one" / last)
    assert one.keys() >= BUFFERS and one["model.embed_tokens.calls"] == 4 and one["model.embed_tokens.mean"].abs().max() > 1e-3
    for name in strategies:
        two, resumed = (read_tensors(folder / run_dir / last) for run_dir in (name, f"{name}-resumed"))
        assert two.keys() == one.keys()
        assert all(torch.equal(two[key], resumed[key]) for key in two), name
        # Largest difference of the four strategies: 3.7e-9.
        assert (two["model.embed_tokens.mean"] - one["model.embed_tokens.mean"]).abs().max() < 1e-7, name
        assert two["model.embed_tokens.calls"] == 4 and torch.equal(two["model.norm.frozen"], torch.arange(3.0))


def test_a_refused_step_leaves_the_buffers_as_they_were():
    norm = nn.BatchNorm1d(3)
    before = copies(persistent_buffers(norm))
    norm(torch.full((4, 3), float("nan")))
    assert norm.running_mean.isnan().all()
    settle(persistent_buffers(norm), before, refused=torch.tensor(True), world=1)
    assert all(torch.equal(before[name], buffer) for name, buffer in norm.named_buffers())


def test_frozen_weights_keep_their_names_and_values():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model[1].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    frozen_to_buffers(model, lambda name, p: p.data)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model(torch.ones(1, 2)).shape == (1, 2)


@pytest.mark.slow
def test_weights_without_a_gradient_over_two_processes(run, prepared):
    """Stock models: cross-attention that nothing uses, a frozen correction of the router, a buffer."""
    sys.path.append(str(ROOT / "tests" / "models"))
    from tiny_models import tiny

    common = [str(run.tmp_path / "config.yaml"), f"data.dir={prepared}", *OPTIONS, "train.micro_batch_size=4", "model.context=32"]
    assert run(*OPTIONS, folder="one")[0] == 0  # writes config.yaml
    runs = []
    for model_type in ("bart", "afmoe", "deepseek_v3", "hy_v4"):
        for name in STRATEGIES:
            options = [f"model.hf={json.dumps(tiny(model_type))}", f"distributed.strategy={name}"]
            runs.append([*common, *options, f"run.dir={run.tmp_path / name}-{model_type}"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    environment = {**os.environ, "RUNS": json.dumps(runs), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


if __name__ == "__main__":
    import torch.distributed as dist

    from launch.private import leave

    dist.destroy_process_group = lambda *_: None  # the runs of one start share the group: a new one would meet stale addresses
    if not any("bart" in word for arguments in json.loads(os.environ["RUNS"]) for word in arguments):
        launch.run.setup.build_model = with_statistics
    launch.run.summary.draw_losses = lambda *_: None  # takes longer than all the rest
    torch.set_num_threads(1)
    statuses = []
    for arguments in json.loads(os.environ["RUNS"]):
        statuses.append(train.main(arguments))
    leave(max(statuses))
