"""The benchmark: what it counts, that its contestants do what they are called, and that a failing part costs nothing else."""

import functools
import json
import sys
from argparse import Namespace

import pytest
import torch
from torch import nn

from celo2 import Celo2
from celo2 import optimizer as optimizer_module
from celo2.blocked import PLAIN
from celo2.kernels.traffic import bytes_moved
from configs.load import ConfigError, load_config
from launch.benchmark import gpu, optimizer, options, train
from launch.benchmark.__main__ import main
from launch.benchmark.gpu import Part
from launch.benchmark.measure import Column, peak_bytes, table, time_rounds
from launch.distributed.blocks import blocks_of, compile_blocks
from models import CausalLMLoss, build_model

CPU = torch.device("cpu")


def test_contestants_take_turns():
    calls = []
    seconds = time_rounds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3, CPU)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    turns = [name for i, name in enumerate(calls) if i == 0 or calls[i - 1] != name]
    assert "".join(turns) == "ab" * 5  # two rounds that do not count


def test_peak_is_what_was_held_at_once():
    def step():
        for _ in range(3):
            torch.ones(1 << 18)  # 1 MiB, gone before the next
        a, b = torch.ones(1 << 18), torch.ones(1 << 18)
        return a + b

    assert 3 << 20 <= peak_bytes(step, CPU) < 3.1 * (1 << 20)


def test_every_option_that_is_measured_is_one():
    compared = options.contestants("prepared/stdlib", 16)
    for name, (against, changes) in compared.items():
        load_config("configs/demo.yaml", ["data.dir=prepared/stdlib", *options.QUIET, *changes])
        assert against in compared, name
    folder = "my data, v2 {x}: 'a' \"b\" #"
    named = options.contestants(folder, 16)
    config = load_config("configs/demo.yaml", [*named["data.mix"][1], *named["eval.sets, one more"][1]])
    assert config.data.mix == [{"dir": folder, "weight": 1}] and config.eval.sets["more"]["dir"] == folder
    clock = options.Clock()
    clock.seconds = [0.0, 9.0, 9.0, 10.0, 11.0, 12.0, 13.0, 18.0]
    assert clock.step() == 2  # the mean of those that count
    mixture = Namespace(config="configs/demo.yaml", overrides=["data.dir=null", "data.mix=[{dir: a, weight: 1}]"], rounds=1)
    with pytest.raises(ConfigError, match=r"give data\.dir, not data\.mix"):
        options.measure(mixture, CPU)


def test_table_leaves_out_what_nobody_has():
    rows = [{"name": "a", "x": 1.5, "y": None}, {"name": "bcd", "y": None}]
    columns = (Column("name", "name"), Column("x", "x", ".2f"), Column("y", "y", ".2f"))
    assert table(rows, columns).splitlines() == ["| name |    x |", "| ---- | ---- |", "| a    | 1.50 |", "| bcd  |    - |"]


@pytest.mark.parametrize("size", ["gpt3-125m", "gpt3-1.3b"])
def test_shapes_are_those_of_the_models(size):
    model = build_model(size=size, vocab_size=64, device="meta")
    hidden = sorted(tuple(p.shape) for p in model.model.layers.parameters() if p.ndim == 2)
    assert sorted(optimizer.shapes_of(size)) == hidden


def test_floors_of_a_step_by_hand(monkeypatch):
    """One layer of width 8: 4 matrices of 64 weights and 2 of 256."""
    monkeypatch.setitem(optimizer.SMALL, "host", (1, 8))
    found = {c.name: c for c in optimizer.contestants(optimizer.make_params("host", CPU), CPU)}
    weights = 4 * 64 + 2 * 256
    newton_schulz = 4 * 5 * 6 * 8**3 + 2 * 5 * (4 * 8 * 8 * 32 + 2 * 8**3)
    assert found[optimizer.ADAMW].moved == 28 * weights and found[optimizer.MUON].flops == newton_schulz
    celo2 = found["Celo2, bf16 Newton-Schulz"]
    assert celo2.moved == bytes_moved(weights, 4, 4, 4, 2) == 94 * weights
    assert celo2.flops == newton_schulz + 432 * weights
    assert found["Celo2, bf16 Newton-Schulz and state"].moved == 64 * weights


def test_contestants_are_what_they_are_called(monkeypatch):
    """The plain path and the reference take the step that the optimizer takes; a contestant that did nothing would win."""
    monkeypatch.setitem(optimizer.SMALL, "host", (1, 16))
    results = []
    steps = (Celo2.step, optimizer.step_plainly, optimizer.step_by_reference)
    for step in steps:
        params = optimizer.make_params("host", CPU)
        before = [p.detach().clone() for p in params]
        celo2 = Celo2(params, optimizer.LR, ns_dtype=torch.float32)
        celo2.allocate_state()
        step(celo2)
        results.append(torch.cat([(p.detach() - b).flatten() for p, b in zip(params, before, strict=True)]) / optimizer.LR)
    assert results[0].square().mean().sqrt().item() == pytest.approx(1, abs=1e-4)  # measured 1 + 4e-7
    for other in results[1:]:
        assert (other - results[0]).abs().max() < 2e-3  # measured 0 and 1.9e-4: a weight's rounding, divided by LR


def test_plain_path_is_forced(monkeypatch):
    def unexpected(device):
        raise AssertionError("asked for the path of the device")

    monkeypatch.setattr(optimizer_module, "passes_for", unexpected)
    params = optimizer.make_params("host", CPU)[:1]
    with pytest.raises(AssertionError):
        Celo2(params, 1e-5).step()
    optimizer.step_plainly(Celo2(params, 1e-5))
    assert PLAIN.newton_schulz.__module__ == "celo2.orthogonalize"


def test_a_training_step_is_that_of_train(tmp_path, capfd, monkeypatch):
    """Both rows, their shares, the profile and the JSON; compiled by a back end that needs no compiler."""
    monkeypatch.setitem(train.BATCHES, "gpt3-tiny", train.Batch(1, 64))
    monkeypatch.setitem(train.DEFAULT_SIZES, "cpu", ["gpt3-tiny"])
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    options = ["--rounds", "2", "--json", str(tmp_path / "r.json"), "--profile", str(tmp_path / "p.txt")]
    assert main(["train", *options]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert [(row["size"], row["compiled"]) for row in result["rows"]] == [("gpt3-tiny", "no"), ("gpt3-tiny", "yes")]
    for row in result["rows"]:
        assert 0 < row["optimizer_share"] < 1 and 0 < row["full_share"] < row["optimizer_share"]
        assert row["tokens_per_second"] == pytest.approx(128 / (row["ms"] / 1e3))
    profile = (tmp_path / "p.txt").read_text()
    assert "2 forward and backward" in profile and "aten::" in profile
    assert "tokens/s" in capfd.readouterr().out


def test_blocks_are_compiled_once_and_equal_the_eager_model(monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    gradients = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = build_model(layers=4, width=32, heads=2, context=16, vocab_size=64)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if compiled:
            compile_blocks(model, CPU)
        CausalLMLoss(model)(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for four blocks
    difference = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert difference < 1e-6  # measured 0; with the default back end on a CPU 6.0e-7 (8 layers of gpt3-mini)


@pytest.mark.parametrize("variable", ["CXX", None])
def test_compile_without_a_compiler_is_one_error(monkeypatch, tmp_path, variable):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if variable:
        monkeypatch.setenv(variable, "missing-compiler -O2")
    model = build_model(layers=1, width=32, heads=2, context=16, vocab_size=64)
    with pytest.raises(ConfigError, match="train.compile needs the compiler " + ("missing-compiler" if variable else r"g\+\+")):
        compile_blocks(model, CPU)


def test_blocks_of_other_models():
    small = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 16}
    assert len(blocks_of(build_model(hf={"model_type": "gpt2", **small}, vocab_size=64))) == 3


def test_a_part_that_fails_or_hangs_does_not_lose_the_others(tmp_path, capsys):
    python = (sys.executable, "-c")
    rows = gpu.measure_gpu(
        tmp_path / "out",
        [
            Part("broken", (*python, "raise SystemExit('no kernel')"), 20),
            Part("endless", (*python, "import time; print('begun', flush=True); time.sleep(60)"), 1),
            Part("sound", (*python, "print('a table')"), 20),
        ],
    )
    outcomes = [row["outcome"] for row in rows]
    assert outcomes == ["failed with exit status 1, see broken.txt", "stopped after its 1 s, see endless.txt", "done"]
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "no kernel" in summary and "begun" in summary and "a table" in summary
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == rows


def test_every_part_is_a_command_and_all_fit_in_ten_minutes(tmp_path):
    parts = gpu.parts(tmp_path)
    assert sum(part.limit for part in parts) <= 600
    for part in parts:
        if "launch.benchmark" in part.command:
            with pytest.raises(SystemExit) as exit:
                main([*part.command[part.command.index("launch.benchmark") + 1 :], "--help"])
            assert exit.value.code == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_bad_input_is_one_line(tmp_path, capsys):
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: no GPU was found") and not (tmp_path / "out").exists()
    assert main(["loss", "--json", str(tmp_path / "missing" / "r.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
