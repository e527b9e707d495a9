"""Averages of the weights: the numbers, skipped steps, resuming, evaluation, exports, and every strategy."""

import json

import pytest
import torch
from bad_gradients import Poison
from host_waits import LAST, HostWaits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from configs.average import AverageOptions
from configs.load import ConfigError, load_config
from launch.checkpoint.export import export
from launch.checkpoint.load import load_model
from launch.checkpoint.verify import CheckpointError
from launch.distributed.average import Average
from launch.run.hooks import Hooks

EMA, TAIL = "train.average={kind: ema, decay: 0.5}", "train.average={kind: tail, fraction: 0.5}"
HEALTHY, REFUSED = torch.zeros(()), torch.ones(())


def average_of(weights, kind="ema", decay=0.9, start=0):
    return Average(AverageOptions(kind, decay, start), weights, torch.device("cpu"))


def walk(steps, dtype, scale=1e-3):
    """A random walk of weights, as float64."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(500, generator=generator)]
    for _ in range(steps):
        found.append((found[-1] + scale * torch.randn(500, generator=generator)).to(dtype).float())
    return [w.double() for w in found[1:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "decay"), [("ema", 0.99), ("tail", 1.0)])
def test_the_average_is_that_of_float64(kind, decay, dtype):
    """Worst of these four: 3.4e-7. In bfloat16 an average over hundreds of steps would be off by 1e-2."""
    steps = walk(400, dtype, 1e-2 if dtype == torch.bfloat16 else 1e-3)
    weight = torch.zeros(500, dtype=dtype)
    average, expected = average_of({"w": weight}, kind, decay), torch.zeros(500, dtype=torch.float64)
    for n, values in enumerate(steps, 1):
        weight.copy_(values)
        average.update(n, HEALTHY)
        expected += (values - expected) * max(1 / n, 1 - decay)
    if kind == "tail":
        torch.testing.assert_close(expected, torch.stack(steps).mean(0))
    assert average.means["w"].dtype == torch.float32
    assert (average.means["w"] - expected).abs().max() < 3e-6


def test_a_refused_step_does_not_count_and_a_tail_begins_where_it_should():
    weight = torch.tensor([1.0, -0.0])
    average = average_of({"w": weight}, "tail", 1.0, start=2)
    for step, (value, refused) in enumerate([(9, 0), (9, 0), (3, 1), (5, 0), (7, 1), (8, 0)], 1):
        weight.fill_(value)
        average.update(step, torch.tensor(float(refused)))
        assert average.begun == (step > 2)
        if step == 3:
            assert average.means["w"].tolist() == [3, 3]  # nothing is in it: the weights as they are
    assert (average.means["w"].tolist(), average.members.item()) == ([6.5, 6.5], 2)
    average.update(2, HEALTHY)  # of a run that was made longer
    assert (average.begun, average.members.item()) == (False, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_average_come_back_to_the_bit(dtype):
    weight = torch.randn(50).to(dtype)
    average, told = average_of({"w": weight}), []
    average.update(1, HEALTHY)
    weight.mul_(3)
    average.update(2, HEALTHY)
    before, mean = weight.clone(), average.means["w"].clone()
    with pytest.raises(KeyError), average.in_place(lambda: told.append(weight.clone())):
        assert torch.equal(weight, mean.to(dtype))
        raise KeyError
    assert torch.equal(weight, before) and torch.equal(average.means["w"], mean)
    assert torch.equal(told[0], mean.to(dtype)) and torch.equal(told[1], before)


def checkpoint(folder, step):
    return folder / "checkpoints" / f"step_{step:08}"


def tensors(folder, step):
    return {name: load_file(checkpoint(folder, step) / f"{name}.safetensors") for name in ("model", "optimizer", "average")}


def equal(a, b):
    return all(a[kind].keys() == b[kind].keys() and all(torch.equal(t, b[kind][n]) for n, t in a[kind].items()) for kind in a)


def training(records):
    return {r["step"]: r["loss"] for r in records if "loss" in r}


class BadLoss(Hooks):
    """A loss that is not finite in a step, under any strategy."""

    def __init__(self, step):
        self.step = step

    def after_backward(self, step, strategy, loss):
        if step == self.step:
            loss.fill_(torch.nan)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_training_does_not_notice_its_average(strategy, run, monkeypatch):
    """An average, a step that is skipped, and a start from the middle: the same bits."""
    if strategy == "zero3":  # DeepSpeed keeps groups of the process group that it met first
        monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda *_: None)
    own = [f"distributed.strategy={strategy}", "log.sample_tokens=0", "eval.every=2"]
    _, plain, _ = run(*own, "checkpoint.every=0", folder="plain", hooks=BadLoss(2))
    status, whole, error = run(*own, EMA, folder="whole", hooks=BadLoss(2))
    assert status == 0, error
    assert training(whole) == training(plain)
    evaluations = [record for record in whole if "val_loss" in record]
    own_keys = [{key: value for key, value in r.items() if not key.startswith("average/")} for r in evaluations]
    assert own_keys == [record for record in plain if "val_loss" in record]
    assert [record["average/val_loss"] == record["val_loss"] for record in evaluations] == [True, False, False]
    state = json.loads((checkpoint(run.tmp_path / "whole", 6) / "state.json").read_text())
    assert state["average"] == {"kind": "ema", "members": 5} and state["bad_steps"] == 1
    middle = checkpoint(run.tmp_path / "whole", 3)
    status, again, error = run(*own, EMA, f"checkpoint.resume={middle}", folder="again")
    assert status == 0, error
    assert equal(tensors(run.tmp_path / "whole", 6), tensors(run.tmp_path / "again", 6))
    assert [record for record in again if "val_loss" in record] == evaluations


def test_an_average_goes_back_with_a_rollback(run):
    """The run that rolled back equals, bit for bit, one that was never disturbed and begins at the checkpoint it went back to."""
    own = [EMA, "log.sample_tokens=0", "eval.every=0", "checkpoint.every=4", "checkpoint.keep=9", "train.steps=8"]
    bad = ["train.on_spike=rollback", "train.max_bad_steps=2"]
    status, back, error = run(*own, *bad, folder="back", hooks=Poison([6, 7]))
    assert status == 0 and "rolled back to step 4; the 24 sequences since then are left out" in run.out, error
    run(*own, folder="whole")
    assert equal(tensors(run.tmp_path / "whole", 4), tensors(run.tmp_path / "back", 4))  # nothing of steps 5 to 7 is in it
    status, on, error = run(*own, f"checkpoint.resume={checkpoint(run.tmp_path / 'back', 4)}", folder="on")
    assert status == 0, error
    assert equal(tensors(run.tmp_path / "on", 8), tensors(run.tmp_path / "back", 8)) and training(on) == training(back)
    states = [json.loads((checkpoint(run.tmp_path / name, 8) / "state.json").read_text())["average"] for name in ("on", "back")]
    assert states == [{"kind": "ema", "members": 8}] * 2


@pytest.mark.parametrize(("saved_at", "members"), [(6, 6), (8, 4)])
def test_the_tail_of_a_longer_run_has_no_steps_from_before_its_beginning(saved_at, members, run):
    """The tail of the short run began at 3 or 4, that of the long one begins at 6: it is that of a run of 12 steps at once."""
    own = ["schedule.kind=constant", "schedule.warmup=0", TAIL, "log.sample_tokens=0", "checkpoint.every=4", "checkpoint.keep=9"]
    assert run(*own, f"train.steps={saved_at}", folder="longer")[0] == 0
    assert run(*own, "train.steps=12", folder="longer")[0] == 0
    assert ("the average of the weights is restarted" in run.out) == (saved_at > 3)
    assert run(*own, "train.steps=12", folder="whole")[0] == 0
    states = [json.loads((checkpoint(run.tmp_path / name, 12) / "state.json").read_text()) for name in ("longer", "whole")]
    assert [state["average"]["members"] for state in states] == [members, 6]
    longer, whole = (tensors(run.tmp_path / name, 12) for name in ("longer", "whole"))
    assert longer["average"].keys() == whole["average"].keys() and equal({"model": longer["model"]}, whole)
    assert equal(longer, whole) == (members == 6)


def test_no_step_waits_for_its_average(run):
    with HostWaits() as waits:
        assert run(EMA, "train.steps=4", "log.every=4", "eval.every=0", "checkpoint.every=0", hooks=waits)[0] == 0
    assert dict(waits.of_step[3][1]) == {LAST: 1}


def test_export_evaluation_and_beginning_from_an_average(run, prepared, capsys):
    from launch.evaluate import main as evaluate
    from models.export import main as export_command

    status, records, _ = run(TAIL, "eval.every=6", "eval.sequences=1000")
    assert status == 0
    folder = run.tmp_path / "run"
    assert not (checkpoint(folder, 3) / "average.safetensors").exists()  # it begins after step 3
    last = checkpoint(folder, 6)
    expected, raw = (load_model(last, average=average).eval() for average in (True, False))
    assert any(not torch.equal(a, b) for a, b in zip(expected.parameters(), raw.parameters(), strict=True))
    out = run.tmp_path / "exported"
    assert export_command([str(folder), str(out), "--average"]) == 0
    exported = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(20)[None]
    torch.testing.assert_close(exported(ids).logits, expected(ids).logits[..., :257], rtol=0, atol=1e-5)
    card = (out / "README.md").read_text()
    assert f"{records[-1]['average/val_loss']:.4f} nats" in card and "an average (tail) over 3 steps" in card
    capsys.readouterr()
    assert evaluate([str(folder), str(prepared), "--average"]) == 0
    assert f"loss {records[-1]['average/val_loss']:.4f}" in capsys.readouterr().out
    begins = ["train.steps=1", "optimizer.lr=0", "optimizer.adamw_lr=0", "eval.sequences=1000"]
    status, begun, error = run(f"model.init=average:{folder}", *begins, folder="begun")
    assert status == 0, error
    assert begun[-1]["val_loss"] == records[-1]["average/val_loss"]
    sources = ((checkpoint(folder, 3), "holds no average"), (out, "is neither a run nor a checkpoint"))
    for source, message in (*sources, (run.tmp_path / "none", "none is not there; average: takes a run or a checkpoint")):
        status, _, error = run(f"model.init=average:{source}", *begins, folder="refused")
        assert status == 2 and message in error and error.count("\n") == 1
    with pytest.raises(CheckpointError, match="holds no average"):
        export(checkpoint(folder, 3), run.tmp_path / "none", average=True)
    # Another kind begins anew; a run without one goes on without it.
    (checkpoint(folder, 6) / "average.safetensors").stat()
    status, longer, error = run(EMA, "train.steps=8", "eval.every=1", "eval.sequences=1000")
    assert status == 0, error
    assert longer[-3]["step"] == 7 and longer[-3]["average/val_loss"] == longer[-3]["val_loss"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{kind: swa}", "train.average.kind is 'swa', expected one of ema, tail"),
        ("{decay: 0.9}", "train.average.kind is None"),
        ("{kind: ema, fraction: 0.1}", "has the key 'fraction', which ema does not have"),
        ("{kind: ema, decay: 1}", "train.average.decay is 1, expected between 0 and 1"),
        ("{kind: ema, decay: true}", "train.average.decay is True"),
        ("{kind: tail, fraction: 0}", "train.average.fraction is 0, expected above 0, at most 1"),
        ("{kind: tail, fraction: .nan}", "train.average.fraction is nan"),
        ("ema", "train.average is 'ema', expected a mapping"),
    ],
)
def test_mistakes_are_named(value, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        load_config("configs/demo.yaml", [f"train.average={value}"])


def test_an_optimizer_that_averages_itself_is_refused(run):
    status, _, error = run("optimizer.name=schedule-free", EMA)
    assert status == 2 and "whose weights are an average already: leave it out" in error
