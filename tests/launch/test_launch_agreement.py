"""What must be the same when a run continues from a checkpoint, what may change, and what a refusal says."""

import json
import shutil
from pathlib import Path

import pytest
from bad_gradients import Poison

import train
from celo2 import Rule, load_rule, save_rule
from data.prepare import prepare
from launch.compare.curves import read_run

WRITTEN = Path(__file__).parents[1] / "compatibility" / "written_by_5598d0e"
QUICK = ["train.steps=2", "eval.every=0", "log.sample_tokens=0", "schedule.kind=constant"]
HF = ["model.layers=null", "model.width=null", "model.heads=null", "model.context=32"]
QWEN = "model.hf={model_type: qwen3, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2, "
QWEN += "head_dim: 16, intermediate_size: 64"


def losses(records):
    return [r["loss"] for r in records if "loss" in r]


def state(run, step, folder="run"):
    return json.loads((run.tmp_path / folder / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())


def refused(result) -> str:
    """The line of a refusal; every one names a value to restore and the way to the weights alone."""
    status, _, err = result
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert " does not fit this run: " in err and ". Restore " in err and "choose another run.dir and set model.init=" in err
    return err


def test_the_rule_is_its_content(run):
    """A file that was overwritten is another rule under the same name; the run's folder keeps a copy of its own."""
    path, rule = run.tmp_path / "mine.safetensors", load_rule("celo2")
    save_rule(rule, path)
    options = [*QUICK, f"optimizer.rule={path}"]
    run(*options)
    save_rule(Rule({**rule.weights, "b2": rule.weights["b2"] + 1}), path)
    err = refused(run(*options, "train.steps=3"))
    copy = run.tmp_path / "run" / "rule.safetensors"
    assert f"optimizer.rule is {path} with the content " in err and f"Restore optimizer.rule={copy}" in err
    assert run(*options, "train.steps=3", f"optimizer.rule={copy}")[0] == 0
    assert run(*options, "train.steps=4", "optimizer.rule=null")[0] == 0  # the shipped rule has this content, too
    assert "optimizer.rule is celo2 with" in refused(run(*options, "train.steps=5", "optimizer.rule=celo2-lm"))


def test_a_rule_whose_file_is_gone_leads_to_the_copy_of_the_run(run):
    path = run.tmp_path / "mine.safetensors"
    save_rule(load_rule("celo2-lm"), path)
    assert run(*QUICK, f"optimizer.rule={path}")[0] == 0
    assert "celo2, rule " in run.out and f"{path} (meta-trained" in run.out
    path.unlink()
    copy = run.tmp_path / "run" / "rule.safetensors"
    status, _, err = run(*QUICK, f"optimizer.rule={path}", "train.steps=3")
    assert status == 2 and err.count("\n") == 1
    assert f"no rule '{path}'" in err and err.endswith(f"; this run has a copy: optimizer.rule={copy}\n")
    assert run(*QUICK, f"optimizer.rule={copy}", "train.steps=3")[0] == 0
    status, _, err = run(*QUICK, f"optimizer.rule={path}", "run.dir=another", "train.steps=3")  # which has no copy
    assert status == 2 and "copy" not in err


def test_what_gives_the_optimizers_state_another_meaning(run):
    options = [*QUICK, "optimizer.name=adamw"]
    run(*options)
    more = [*options, "train.steps=3"]
    assert "optimizer.arguments.betas is [0.9, 0.95] in the checkpoint, [0.9, 0.99] now" in refused(
        run(*more, "optimizer.arguments={betas: [0.9, 0.99]}")
    )
    assert (
        "optimizer.arguments.amsgrad is false in the checkpoint, true now. Restore optimizer.arguments.amsgrad=false"
        in refused(run(*more, "optimizer.arguments={amsgrad: true}"))
    )
    assert "optimizer.name is adamw in the checkpoint, muon now" in refused(run(*more, "optimizer.name=muon"))
    free = ["optimizer.arguments={betas: [0.9, 0.95], fused: false}", "optimizer.lr=1e-3", "optimizer.weight_decay=0"]
    free += ["schedule.kind=cosine", "train.precision=bf16", "train.grad_clip=0", "train.micro_batch_size=2"]
    assert run(*more, *free, "model.dropout=0.1", "distributed.strategy=fsdp2")[0] == 0


def earlier(monkeypatch):
    """Checkpoints as versions wrote them that left the decay of a dotted path in the gradient."""
    identity_of = train.identity_of
    monkeypatch.setattr(train, "identity_of", lambda *a: {k: v for k, v in identity_of(*a).items() if k != "decoupled decay"})


def test_a_decay_that_was_in_the_gradient_does_not_become_another_in_silence(run, monkeypatch):
    options, more = [*QUICK, "optimizer.name=torch.optim.NAdam"], "train.steps=3"
    earlier(monkeypatch)
    run(*options)
    restore = "optimizer.arguments.decoupled_weight_decay=false"
    err = refused(run(*options, more))
    assert f"optimizer.arguments.decoupled_weight_decay is false in the checkpoint, true now. Restore {restore}" in err
    monkeypatch.undo()
    assert run(*options, more, restore)[0] == 0
    assert refused(run(*options, "train.steps=4"))  # and it stays so
    assert run(*options, folder="new")[0] == 0
    assert run(*options, more, folder="new")[0] == 0 and "resumed from" in run.out


def test_a_decay_that_was_in_the_gradient_and_cannot_be_any_more_is_said(run, monkeypatch):
    options = [*QUICK, "optimizer.name=torch.optim.RMSprop"]
    earlier(monkeypatch)
    run(*options)
    run(*options, "train.steps=3")
    change = "optimizer.weight_decay in the gradient, of an earlier version -> decoupled"
    assert f"with train.steps 2 -> 3, {change}" in run.out
    events = [json.loads(line) for line in (run.tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["options"][-1] for event in events if event["event"] == "changed"] == [change]
    assert read_run(run.tmp_path / "run").changes[-1] == f"{change} after step 2"  # a comparison says it, too


def test_every_key_of_a_transformers_model(run):
    options = [*QUICK, *HF]
    run(*options, QWEN + ", rope_theta: 5000.0}")
    more = [*options, "train.steps=3"]
    err = refused(run(*more, QWEN + ", rope_theta: 7000, hidden_act: gelu}"))
    assert "model.hf.rope_theta is 5000.0 in the checkpoint, 7000" in err and "model.hf.rope_theta=5000.0" in err
    assert "model.hf.hidden_act is silu in the checkpoint, gelu now" in err
    assert "model.hf.rope_theta is 5000.0 in the checkpoint, 10000.0 now" in refused(run(*more, QWEN + "}"))
    assert "model.context is 32 in the checkpoint, 16 now" in refused(
        run(*more, QWEN + ", rope_theta: 5000.0}", "model.context=16")
    )
    assert "model_type is qwen3 in the checkpoint, gpt3 now" in refused(run(*QUICK, "train.steps=3"))
    # Other words for the same model.
    same = QWEN + ", rope_parameters: {rope_type: default, rope_theta: 5000}, attention_dropout: 0.1, hidden_act: silu}"
    assert run(*more, same)[0] == 0


def test_the_same_data_elsewhere_continues_and_other_data_does_not(run, prepared):
    run(*QUICK)
    moved = shutil.copytree(prepared, run.tmp_path / "moved")
    assert run(*QUICK, "train.steps=3", f"data.dir={moved}")[0] == 0
    source = str(prepared.parent / "text.jsonl")
    other = prepare(source, run.tmp_path / "other", tokenizer="bytes", val_fraction=0.4, workers=1)
    err = refused(run(*QUICK, "train.steps=4", f"data.dir={other}"))
    assert "the data set of data.dir is " in err and f" ({moved}) in the checkpoint, " in err and f" ({other}) now. " in err
    other = prepare(source, run.tmp_path / "bpe", tokenizer="bpe", vocab_size=300, val_fraction=0.2, workers=1)
    assert "the tokenizer of data.dir is " in refused(run(*QUICK, "train.steps=4", f"data.dir={other}"))


@pytest.mark.parametrize("world", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_another_batch_size_continues_the_order_and_is_exact_again(run, world):
    """3 steps of 8, then 5 of 16; stopped in between, with dropout; then 16 is the run's batch size and 8 is refused."""
    options = ["train.steps=3", "eval.every=0", "log.sample_tokens=0", "schedule.kind=constant", "model.dropout=0.1"]
    options += ["checkpoint.keep=9", f"distributed.strategy={world}"]
    change = ["train.batch_size=16", "train.on_batch_change=allow"]
    for folder in ("whole", "parts"):
        assert run(*options, folder=folder)[0] == 0
    assert "train.on_batch_change=allow" in refused(run(*options, "train.steps=8", "train.batch_size=16", folder="whole"))
    _, whole, _ = run(*options, *change, "train.steps=8", folder="whole")
    assert "train.batch_size 8 -> 16" in run.out
    run(*options, *change, "train.steps=5", folder="parts")
    status, parts, _ = run(*options, "train.steps=8", "train.batch_size=16", "train.micro_batch_size=8", folder="parts")
    assert status == 0 and losses(parts)[:5] == losses(whole)[:5] and losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert state(run, 8, "whole")["sequences"] == state(run, 8, "parts")["sequences"] == 3 * 8 + 5 * 16
    refused(run(*options, "train.steps=9", folder="parts"))


def test_a_rollback_after_a_batch_change_leaves_out_what_it_took(run):
    options = ["train.max_bad_steps=2", "train.on_spike=rollback", "checkpoint.every=4", "eval.every=0", "log.sample_tokens=0"]
    run(*options, "train.steps=4")
    more = [*options, "train.steps=10", "train.batch_size=16", "train.on_batch_change=allow"]
    assert run(*more, hooks=Poison([7, 8]))[0] == 0
    assert "rolled back to step 4; the 64 sequences since then are left out" in run.out
    assert state(run, 10)["sequences"] == 4 * 8 + (4 + 6) * 16


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A run of an earlier version, which noted less, as the current folder."""
    shutil.copytree(WRITTEN, tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")
    return tmp_path / "written"


def test_a_checkpoint_of_an_earlier_version_is_compared_too(written, capsys):
    for change, message in (
        ("model.heads=4", "model.heads is 2 in the checkpoint, 4 now"),
        ("model.context=16", "model.context is 32 in the checkpoint, 16 now"),
        ("optimizer.rule=celo2-lm", "optimizer.rule is celo2 with the content "),
        (
            "optimizer.arguments={betas: [0.8, 0.95]}",
            "optimizer.arguments.betas is [0.9, 0.95] in the checkpoint, ",
        ),
    ):
        assert train.main(["run/config.yaml", change]) == 2
        assert message in capsys.readouterr().err
    change = ["optimizer.rule=celo2", "train.batch_size=16", "train.on_batch_change=allow"]
    assert train.main(["run/config.yaml", *change]) == 0
    last = written / "run" / "checkpoints" / "step_00000006" / "state.json"
    assert json.loads(last.read_text())["sequences"] == 3 * 8 + 3 * 16


def test_options_that_a_checkpoint_does_not_know_had_their_defaults():
    """Those of earlier versions; and a mapping that is given up, or that comes."""
    from dataclasses import asdict

    from configs.schema import Config
    from launch.run.resume import changed_options

    saved, now = asdict(Config()), Config()
    for section, key in (("eval", "sets"), ("eval", "lm_eval"), ("eval", "tasks_every"), ("train", "average")):
        del saved[section][key]
    saved["train"]["forgotten"] = 1
    assert changed_options(saved, now) == []
    now.train.average = {"kind": "tail"}
    assert changed_options(saved, now) == ["train.average.kind None -> tail"]
    assert changed_options(asdict(now), Config()) == ["train.average.kind tail -> None"]
    mixed = Config()
    mixed.data.mix = [{"dir": "a", "weight": {0: 1.0, 9: 0.0}}, {"dir": "b", "weight": 1.0}]
    assert changed_options(json.loads(json.dumps(asdict(mixed))), mixed) == []  # as in a checkpoint
