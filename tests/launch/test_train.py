"""train.py from the outside: what a person types, what the run leaves behind, what a mistake says."""

import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.load import load_written
from launch.run.check import check
from launch.run.hooks import Hooks

ROOT = Path(__file__).parents[2]


def losses(records):
    return [r["loss"] for r in records if "loss" in r]


def validation(records):
    return [r["val_loss"] for r in records if "val_loss" in r]


def test_a_run_learns_and_leaves_everything_behind(run):
    status, records, _ = run("train.steps=40", "log.every=10", "eval.every=20", "checkpoint.every=10")
    assert status == 0
    training = [r for r in records if "loss" in r]
    assert [r["step"] for r in training] == [1, 10, 20, 30, 40]
    assert [r["step"] for r in records if "val_loss" in r] == [20, 40]
    expected = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds"}
    expected |= {"optimizer_seconds", "update_rms", "update_ratio", "step_loss", "adamw_lr"}
    assert all(set(r) == expected for r in training)
    assert training[-1]["tokens"] <= 40 * 8 * 32
    assert training[-1]["loss"] < math.log(257) - 1.5  # measured 2.9 from 5.5
    folder = run.tmp_path / "run"
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_00000030", "step_00000040"]
    for name in ("config.yaml", "tokenizer.json", "loss.png", "sample.txt"):
        assert (folder / name).stat().st_size > 0
    assert "validation loss" in run.out


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("optimizer", ["celo2", "celo2-base", "adamw", "muon"])
def test_every_optimizer_under_every_schedule(run, optimizer, kind):
    status, records, _ = run(
        f"optimizer.name={optimizer}", f"schedule.kind={kind}", "train.steps=12", "eval.every=0", "schedule.warmup=0.2"
    )
    assert status == 0
    values = losses(records)
    assert len(values) == 12
    assert values[-1] < values[0] - 0.2
    lrs = [r["lr"] for r in records if "lr" in r]
    assert lrs[0] == pytest.approx(5e-3 / 2)
    assert lrs[-1] == pytest.approx(5e-3 * (1 if kind == "constant" else 0.1))


def test_same_seed_same_bits(run):
    first, second, other = run(folder="a")[1], run(folder="b")[1], run("run.seed=2", folder="c")[1]
    assert losses(first) == losses(second)
    assert validation(first) == validation(second)
    assert losses(first) != losses(other)


def test_gradient_accumulation_changes_nothing(run):
    """1 x 8 against 8 x 1 and 2 x 4 over steps that hold the padded end of an epoch: sums over tokens, divided once."""
    whole = run("train.steps=60", "eval.every=0", folder="whole")[1]
    for micro in (1, 4):
        split = run("train.steps=60", "eval.every=0", f"train.micro_batch_size={micro}", folder=f"micro{micro}")[1]
        # Worst measured 3.3e-7 over sixty steps.
        assert losses(split) == pytest.approx(losses(whole), rel=1e-5)
        assert [r["tokens"] for r in split] == [r["tokens"] for r in whole]
    full = 8 * 32 * 60
    assert whole[-1]["tokens"] < full  # a shorter last sequence was among them


@pytest.mark.parametrize(("optimizer", "state"), [("celo2", "fp32"), ("celo2", "bf16"), ("adamw", "fp32"), ("muon", "fp32")])
def test_resume_is_exact(run, optimizer, state):
    """Stopped after three of nine steps, with dropout: every later loss is the uninterrupted run's, bit for bit."""
    options = [
        f"optimizer.name={optimizer}",
        f"optimizer.state_dtype={state}",
        "model.dropout=0.1",
        "schedule.kind=constant",
        "schedule.warmup=0",
    ]
    _, whole, _ = run(*options, "train.steps=9", folder="whole")
    run(*options, "train.steps=3", folder="parts")
    _, parts, _ = run(*options, "train.steps=9", folder="parts")
    assert losses(parts) == losses(whole)
    assert [r["step"] for r in parts if "loss" in r] == list(range(1, 10))
    assert validation(parts) == validation(whole)
    assert "resumed from" in run.out


def test_evaluation_is_the_same_whatever_the_training_batch(run):
    """No learning: the validation loss must not depend on micro-batches, evaluation times or training data."""
    options = ["optimizer.lr=0", "optimizer.adamw_lr=0", "eval.every=2"]
    small = validation(run(*options, "train.micro_batch_size=2", folder="small")[1])
    large = validation(run(*options, folder="large")[1])
    assert len(set(large)) == 1
    assert small == pytest.approx(large, rel=1e-6)


def test_other_architectures_train(run):
    hf = "model.hf={model_type: qwen3, hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2,"
    status, records, _ = run(hf + " head_dim: 16, intermediate_size: 64}", *unset_shape(), "model.context=32", "train.steps=12")
    assert status == 0
    assert losses(records)[-1] < losses(records)[0] - 0.2


def unset_shape():
    return ["model.layers=null", "model.width=null", "model.heads=null"]


def test_bfloat16_trains_and_stays_near_float32(run):
    single = losses(run(folder="fp32")[1])
    mixed = losses(run("train.precision=bf16", folder="bf16")[1])
    assert mixed == pytest.approx(single, rel=1e-3)  # measured 1e-4
    assert mixed != single


def test_trackers_get_the_same_numbers(run):
    status, _, _ = run("log.trackers=[tensorboard]")
    assert status == 0
    assert list((run.tmp_path / "run").rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.dir=null"], "data.dir is missing"),
        (["data.dir=/nowhere"], "/nowhere: no such folder"),
        (
            ["optimizer.name=adamw", "optimizer.rule=celo2-lm"],
            "optimizer.rule celo2-lm is for celo2 and celo2-base, not for adamw",
        ),
        (["distributed.replicas=2"], "distributed.replicas 2 is for fsdp2, not for ddp: leave it out"),
        (["distributed.strategy=fsdp2", "distributed.shard_state=true"], "distributed.shard_state is for ddp; fsdp2 divides"),
        (
            ["optimizer.name=celo2-base", "optimizer.adamw_lr=0.1"],
            "optimizer.adamw_lr 0.1 applies only to parameters that AdamW trains",
        ),
        (["optimizer.route=all"], "optimizer.route all applies only to optimizers from a library"),
        (["schedule.decay=0.3"], "schedule.decay 0.3 is for wsd, not for schedule.kind cosine"),
        (["schedule.decay=0.2"], "schedule.decay 0.2 is for wsd"),  # the default, but somebody wants it
        (["schedule.kind=constant", "schedule.final=0"], "schedule.final 0.0 is not for schedule.kind constant"),
        (["schedule.kind=wsd", "schedule.warmup=0.9"], "schedule.warmup and schedule.decay are more than 1"),
        (["distributed.strategy=fsdp2", "optimizer.name=torch.optim.NAdam"], "does not support sharded parameters"),
        (["--plan", "distributed.strategy=zero1", "optimizer.name=torch.optim.NAdam"], "does not support sharded parameters"),
        (["--plan", "optimizer.arguments={momentum: 1}"], "has no argument 'momentum'"),
        (["optimizer.arguments={rule: celo2-lm}"], "optimizer.arguments holds 'rule': give it as optimizer.rule"),
        (["optimizer.name=celo2-base", "optimizer.arguments={betas: [0.8, 0.9]}"], "no effect with celo2-base"),
        (
            ["model.hf={model_type: qwen3, dtype: bfloat16}"],
            "model.hf.dtype is bfloat16, but train.precision decides, which is fp32",
        ),
        (["--plan", "--gpu", "h10"], "--gpu h10 is unknown, expected one of h100, h200"),
        (["--gpu", "h100"], "--gpu is for --plan"),
        (["--train.steps=5"], "'--train.steps=5': write train.steps=5, without dashes"),
        (["--train.steps", "5"], "'--train.steps': write train.steps=VALUE, without dashes"),
        (["model.size=gpt3-126m"], "model.size: unknown size 'gpt3-126m'; did you mean 'gpt3-125m'? Sizes are gpt3-125m, "),
        (["model.size=giant", "model.layers=null"], "model.size: unknown size 'giant'; sizes are gpt3-125m, "),
        (["--plan", "model.size=gpt3-126m", "model.width=null"], "model.size: unknown size 'gpt3-126m'; did you mean"),
        (
            ["model.size=gpt3-mini"],
            "model.size gpt3-mini has no effect beside model.layers, model.width, model.heads and model.context (null takes the "
            "size's): leave it out",
        ),
        (["model.heads=3"], "model.heads: 3 heads do not divide the width 32"),
        (["model.hf={model_type: qwen3}"], "model.hf: hf and layers, width, heads exclude each other: write"),
        (
            ["optimizer.name=torch.optim.NAdam", "optimizer.arguments={bets: 1}"],
            "optimizer.arguments: torch.optim.nadam.NAdam has",
        ),
        (["model.vocab_size=100"], "model.vocab_size is 100, but the data has tokens up to 256"),
        (["optimizer.rule=nothing"], "no rule 'nothing'"),
        (["optimizer.rule=celo2-base"], "is a celo2-base rule"),
        (["optimizer.name=muon", "optimizer.state_dtype=bf16"], "optimizer.state_dtype bf16 is for celo2 and celo2-base"),
        (["optimizer.state_dtype=fp16"], "optimizer.state_dtype"),
        (["--plan", "optimizer.name=adamw", "optimizer.state_dtype=bf16"], "not for adamw"),
        (
            ["distributed.strategy=fsdp2", "distributed.replicas=2"],
            "distributed.replicas is 2, which does not divide 1 processes",
        ),
        (["checkpoint.resume=/nowhere"], "/nowhere is not a whole checkpoint"),
        (["model.layers=null"], "model.size: give a size, or all of layers, width, heads, context: layers missing"),
        (
            ["model.hf={model_type: qwen9}", "model.layers=null", "model.width=null", "model.heads=null"],
            "model.hf: transformers has no causal language model of model_type 'qwen9'",
        ),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, overrides, message):
    status, _, err = run(*overrides)
    assert status == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list(run.tmp_path.glob("run/checkpoints/*"))


def test_a_size_whose_numbers_the_command_line_gives_is_passed_over(run):
    (run.tmp_path / "size.yaml").write_text("model: {size: gpt3-mini}\ntrain: {steps: 1}\n")
    config, written = load_written(
        run.tmp_path / "size.yaml", [f"model.{key}=8" for key in ("layers", "width", "heads", "context")]
    )
    assert check(config, written, 1) == [
        "model.size gpt3-mini has no effect beside model.layers, model.width, model.heads and model.context (null takes the "
        "size's): not used"
    ]
    config, written = load_written(run.tmp_path / "size.yaml", ["model.width=8", "model.heads=8", "model.context=8"])
    assert check(config, written, 1) == []


def test_missing_and_malformed_configuration(capsys):
    import train

    assert train.main(["nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "error: cannot read configuration 'nowhere.yaml' (No such file or directory)\n"


def test_training_outside_the_main_thread_is_refused(run):
    with ThreadPoolExecutor() as threads:
        status, records, err = threads.submit(run).result()
    assert (status, records) == (2, []) and err == (
        "error: training must run in the main thread, since only that thread receives signals: call it there, or start train.py\n"
    )


def test_slurm_tasks_without_a_launcher_are_refused(run, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    status, _, err = run()
    assert status == 2 and err.count("\n") == 1
    assert "Slurm starts 2 tasks" in err and "slurm.sbatch" in err and not (run.tmp_path / "run").exists()
    monkeypatch.setenv("SLURM_NTASKS", "1")  # srun -n 1, and a shell of salloc
    assert run("train.steps=1")[0] == 0
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("SLURM_PROCID")
    assert run("train.steps=1")[0] == 0


def test_a_run_is_never_overwritten(run):
    run()
    status, _, err = run("checkpoint.resume=never")
    assert status == 2
    assert "holds a run already" in err


def test_resume_refuses_another_model_or_data_order(run):
    run("train.steps=3")
    for change, message in (
        ("model.width=64", "model.width is 32 in the checkpoint, 64 now. Restore model.width=32; or "),
        ("model.layers=3", "model.layers is 2 in the checkpoint, 3 now"),
        ("model.heads=4", "model.heads is 2 in the checkpoint, 4 now"),
        ("run.seed=5", "run.seed is 1 in the checkpoint, 5 now"),
        ("train.batch_size=16", "is 8 in the checkpoint, 16 now. Restore train.batch_size=8 or train.on_batch_change=allow; or "),
        ("optimizer.name=adamw", "optimizer.name is celo2 in the checkpoint, adamw now"),
        ("train.steps=2", "train.steps is already at step 3 in the checkpoint, 2 now. Restore train.steps=3 or more"),
    ):
        status, _, err = run(change)
        assert status == 2 and err.count("\n") == 1
        assert message in err and "or choose another run.dir and set model.init=" in err


def test_plan_trains_nothing(run):
    assert run("--plan")[:2] == (0, [])
    for text in ("tokens a step", "model.layers.*.attn.q_proj.weight", "memory", "Newton-Schulz", "epochs"):
        assert text in run.out
    assert not (run.tmp_path / "run").exists()


def test_exported_run_generates_through_transformers(run):
    run()
    export = [sys.executable, "-m", "models.export", str(run.tmp_path / "run"), str(run.tmp_path / "stock")]
    environment = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    said = subprocess.run(export, check=True, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert "WARNING" not in said.stdout + said.stderr
    script = (
        "from transformers import pipeline; import sys; assert 'models' not in sys.modules;"
        f"p = pipeline('text-generation', model={str(run.tmp_path / 'stock')!r});"
        "print(repr(p('python', max_new_tokens=5)[0]['generated_text']))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, cwd=run.tmp_path, capture_output=True, text=True)
    assert "python" in done.stdout


def test_optimizer_time_and_update_are_logged(run):
    """An update of celo2 has RMS 1, so without weight decay a hidden weight moves by the learning rate."""
    status, records, _ = run("log.every=2", "optimizer.weight_decay=0")
    training = [r for r in records if "loss" in r]
    assert status == 0 and [r["step"] for r in training] == [1, 2, 4, 6]
    for r in training:
        assert r["update_rms"] == pytest.approx(r["lr"], rel=1e-5)  # worst measured 1.2e-7
        assert 0 < r["update_ratio"] < 1 and 0 < r["optimizer_seconds"] < 5


def test_schedule_free_keeps_its_average_and_continues_exactly(run):
    pytest.importorskip("schedulefree")
    options = ["optimizer.name=schedule-free", "schedule.kind=constant", "checkpoint.keep=5", "checkpoint.every=3"]
    whole = run(*options)[1]
    first = run.tmp_path / "run" / "checkpoints" / "step_00000003"
    status, resumed, err = run(*options, f"checkpoint.resume={first}", folder="resumed")
    assert status == 0, err
    losses = [{r["step"]: r.get("val_loss", r.get("loss")) for r in records} for records in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.parametrize("mode", [["--plan"], ["train.steps=1"]])
def test_schedule_free_under_a_schedule_is_noted(run, mode):
    pytest.importorskip("schedulefree")
    note = "note: optimizer.name schedule-free is made for schedule.kind=constant, but schedule.kind is cosine\n"
    status, _, err = run("optimizer.name=schedule-free", *mode)
    assert status == 0 and err.startswith(note)
    assert "schedule-free" not in run("optimizer.name=schedule-free", "schedule.kind=constant", *mode)[2]


class Changes(Hooks):
    """Does something to a file before a step."""

    def __init__(self, step, path, change):
        self.step, self.path, self.change = step, path, change

    def before_step(self, step, strategy):
        if step == self.step:
            self.change(self.path)


def test_data_that_changes_while_it_is_trained_on_stops_the_run(run, prepared):
    """Other tokens or a shorter file: one line that names it, and the newest checkpoint continues once it is restored."""
    data = shutil.copytree(prepared, run.tmp_path / "data")
    shard, sound = data / "train_00000.bin", (data / "train_00000.bin").read_bytes()
    options = [f"data.dir={data}", "train.steps=12", "checkpoint.every=2", "eval.every=0", "log.sample_tokens=0"]
    whole = run(*options, folder="whole")[1]
    for folder, change in (
        ("overwritten", lambda path: path.write_bytes(sound[::-1])),
        ("cut", lambda path: os.truncate(path, 100)),
    ):
        status, records, error = run(*options, folder=folder, hooks=Changes(5, shard, change))
        assert status == 2 and error.count("\n") == 1
        assert f"{shard}: changed while it was in use" in error
        assert 4 <= len(records) < 12 and losses(records) == losses(whole)[: len(records)]
        shard.write_bytes(sound)
        assert run(*options, folder=folder)[0] == 0
        assert "resumed from" in run.out
        assert losses([json.loads(s) for s in (run.tmp_path / folder / "metrics.jsonl").read_text().splitlines()]) == losses(
            whole
        )
