"""python -m launch.compare from the outside: trials in their folders, interruptions, mistakes, and one real comparison.

Most tests put a stand-in for train.py in place that writes what a run writes, in a moment: its loss is a parabola in log lr.
"""

import fcntl
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from celo2.training.idle import refuse_idle
from configs.load import ConfigError, load_config, load_written
from configs.schema import Config
from launch.compare import __main__ as compare
from launch.compare import trials
from launch.compare.contestants import parse, parse_all
from launch.compare.curves import judge, stopped_diverged
from launch.compare.keys import keys_of
from launch.monitoring.guard import Diverged, Guard
from launch.monitoring.metrics import Metrics
from launch.monitoring.signals import STOPPED
from launch.optimizers.idle import IDLE

ROOT = Path(__file__).parents[2]
STAND_IN = f"""
import json, math, os, signal, sys, time, types
sys.path.insert(0, {str(ROOT)!r})
sys.modules["celo2"] = types.ModuleType("celo2")  # the loader alone, without torch, whose import takes seconds
sys.modules["celo2"].__path__ = [{str(ROOT / "celo2")!r}]
from pathlib import Path
from configs.load import load_config, to_yaml
config = load_config(sys.argv[1], sys.argv[2:])
folder, steps, lr = Path(config.run.dir), config.train.steps, config.optimizer.lr
folder.mkdir(parents=True, exist_ok=True)
with (folder.parent.parent.parent / "starts.txt").open("a") as file:
    file.write(f"{{folder.parent.name}}/{{folder.name}} {{os.environ.get('CUDA_VISIBLE_DEVICES', '-')}}\\n")
(folder / "config.yaml").write_text(to_yaml(config))
if config.optimizer.weight_decay == 7:
    sys.exit("something\\nelse is wrong")
if lr > 0.5:
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({{"event": "stopped", "reason": "diverged"}}) + "\\n")
    print("error: 10 steps in a row were not finite, the last with loss nan", file=sys.stderr)
    sys.exit(2)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
if config.optimizer.weight_decay == 5 and not (folder / "saved").exists():
    (folder / "ready").touch()
    deadline = time.monotonic() + 30
    while not stopped and time.monotonic() < deadline:
        time.sleep(0.01)
    (folder / "saved").touch()
    sys.exit(75)
optimum = {{"adamw": 2e-3, "muon": 1e-3, "torch.optim.NAdam": 4e-3}}[config.optimizer.name]
final = 3 + math.log2(lr / optimum) ** 2 / 10 + (config.optimizer.name == "adamw") / 5 + 0.001 * config.run.seed
final += 0.001 * (config.optimizer.name == "adamw") * (config.run.seed % 2)
(folder / "checkpoints" / "step_00000010").mkdir(parents=True, exist_ok=True)
with (folder / "metrics.jsonl").open("w") as file:
    for step in range(1, steps + 1):
        at = {{"step": step, "tokens": 8 * step}}
        loss = 6 + (final - 6) * step / steps
        clock = {{"seconds": step, "optimizer_seconds": 0.1, "update_rms": lr, "update_ratio": lr}}
        file.write(json.dumps(at | clock | {{"loss": loss, "grad_norm": 1.0}}) + "\\n")
        file.write(json.dumps(at | {{"val_loss": loss}}) + "\\n")
"""
CONFIG = "run: {name: demo}\ntrain: {steps: 10, batch_size: 8}\noptimizer: {adamw_lr: 1e-2}\n"


@pytest.fixture
def start(tmp_path, monkeypatch, capsys, prepared):
    """start(*words) -> (status, stdout, stderr) of launch.compare with the stand-in; the folder is tmp_path/out."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "train.py").write_text(STAND_IN)
    (tmp_path / "run.yaml").write_text(CONFIG + f"data: {{dir: {prepared}}}\n")
    monkeypatch.setattr(trials, "ROOT", tmp_path / "root")
    monkeypatch.setattr(trials, "POLL_SECONDS", 0.01)

    def run(*words):
        capsys.readouterr()
        status = compare.main([str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out"), "--parallel", "4", *words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def starts(tmp_path):
    path = tmp_path / "out" / "starts.txt"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def test_search_seeds_and_report(start, tmp_path):
    words = ["--optimizers", "adamw", "muon", "--lrs", "1e-3", "2e-3", "4e-3"]
    status, out, err = start(*words)
    assert (status, err) == (0, "")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    adamw, muon = results["optimizers"]
    # muon's best is at the edge of the grid: both get one more trial.
    assert "muon: its best lr, 0.001, is at the edge of its grid: tries 0.0005 below it" in out
    assert adamw["search"]["trials"] == muon["search"]["trials"] == 4
    assert (adamw["lr"], muon["lr"], adamw["adamw_lr"]) == (2e-3, 1e-3, 1e-2)
    assert adamw["seeds"] == muon["seeds"] == [1, 2, 3]  # the search had seed 0
    assert "muon has a lower loss than adamw, by 0.201 ± 0.001 (3 seeds, p < 0.001)" in results["sentences"][0]
    assert len(starts(tmp_path)) == 2 * 4 + 2 * 3
    trial = tmp_path / "out" / "trials" / "adamw"
    searched = ["lr_0.001_seed_0", "lr_0.002_seed_0", "lr_0.004_seed_0", "lr_0.00283_seed_0"]
    final = ["lr_0.002_seed_1", "lr_0.002_seed_2", "lr_0.002_seed_3"]
    assert {p.name for p in trial.iterdir()} == {*searched, *final}
    assert (trial / "lr_0.002_seed_1" / "checkpoints").exists()
    assert not (trial / "lr_0.001_seed_0" / "checkpoints").exists()  # nobody wants a search's checkpoints
    assert results["runs"][0]["command"].startswith("python train.py") and "optimizer.lr=0.002" in results["runs"][0]["command"]
    for name in ("report.html", "report.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000

    status, out, err = start(*words)  # the same command again starts nothing and says the same
    assert (status, err) == (0, "") and len(starts(tmp_path)) == 14
    assert "6 trials, 6 of them done already" in out
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["sentences"] == results["sentences"]

    assert len(results["search_commands"]) == 8 and "The 8 trials of the search" in (tmp_path / "out" / "report.html").read_text()

    folders = [str(path) for label in ("adamw", "muon") for path in (tmp_path / "out" / "trials" / label).glob("*seed_[12]")]
    assert compare.main(["--runs", *folders, "--out", str(tmp_path / "runs")]) == 0
    found = json.loads((tmp_path / "runs" / "results.json").read_text())
    assert found["sentences"][0].startswith("muon has a lower loss than adamw, by 0.20")
    assert found["optimizers"][0]["search"] is None
    assert "with how many trials, is not known" in (tmp_path / "runs" / "report.html").read_text()

    for name in ("report.html", "report.png", "details.png"):  # drawn again from the numbers alone
        (tmp_path / "runs" / name).unlink()
    assert compare.main(["--results", str(tmp_path / "runs" / "results.json"), "--out", str(tmp_path / "again")]) == 0
    assert {p.name for p in (tmp_path / "again").iterdir()} == {"report.html", "report.png", "details.png", "results.json"}
    assert json.loads((tmp_path / "again" / "results.json").read_text()) == found


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", "123\n", "metrics.jsonl, line 1: neither a training record nor an evaluation"),
        ("metrics.jsonl", '{"loss": 2}\n', "line 1: neither"),
        ("metrics.jsonl", '{"step": 1, "tokens": "8", "loss": 2, "seconds": 1}\n', "line 1: neither"),
        ("metrics.jsonl", '{"step": 1, "tokens": 8, "loss": 2, "seconds": 1}\n', "has no evaluation"),
        ("tokenizer.json", "{", "tokenizer.json is damaged"),
        (
            "config.yaml",
            "model: {layers: 1, width: 32, heads: 3, context: 8}",
            "config.yaml: model.heads: 3 heads do not divide the width 32",
        ),
    ],
)
def test_damaged_runs_are_named_in_one_line(start, prepared, tmp_path, monkeypatch, capsys, name, content, message):
    model = ["model.layers=1", "model.width=32", "model.heads=2", "model.context=8"]
    assert start("--optimizers", "adamw", "--lrs", "1e-3", "--seeds", "2", *model)[0] == 0
    monkeypatch.chdir(tmp_path / "out")  # from anywhere, relative or not
    folders = ["trials/adamw/lr_0.001_seed_1", str(tmp_path / "out" / "trials/adamw/lr_0.001_seed_2")]
    shutil.copy(Path(prepared) / "tokenizer.json", folders[0])
    assert compare.main(["--runs", *folders, "--out", "again"]) == 0
    runs = json.loads(Path("again/results.json").read_text())["runs"]
    assert runs[0]["command"].startswith(f"python train.py {tmp_path / 'out' / folders[0]}/config.yaml run.dir=")
    (Path(folders[0]) / name).write_text(content)
    capsys.readouterr()
    assert compare.main(["--runs", *folders, "--out", "third"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not Path("third").exists()


def test_an_interrupt_while_no_trial_runs_is_one_line(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "compare_runs", interrupt)
    assert compare.main(["--runs", "a"]) == 130 and capsys.readouterr().err.count("\n") == 1


def test_a_folder_of_another_comparison_is_refused(start, tmp_path):
    words = ["--optimizers", "adamw", "--lrs", "1e-3", "--seeds", "1"]
    assert start(*words)[0] == 0
    status, _, err = start(*words, "train.steps=11")
    assert status == 2 and err.count("\n") == 1
    assert "lr_0.001_seed_1 holds a run with train.steps=10, this comparison has 11: choose another --out" in err
    for text in ('{"data": "other"}', '{"da'):
        (tmp_path / "out" / "comparison.json").write_text(text)
        status, _, err = start(*words)
        assert status == 2 and err.count("\n") == 1 and "holds a comparison on other data" in err
    (tmp_path / "file").touch()
    assert compare.main([str(tmp_path / "run.yaml"), "--optimizers", "adamw", "--out", str(tmp_path / "file")]) == 2


def test_a_folder_to_publish_that_cannot_be_is_named_before_the_trials(start, tmp_path):
    (tmp_path / "file").touch()
    words = ["--optimizers", "adamw", "--lrs", "1e-3", "--seeds", "1"]
    for folder, said in (("file", "a file is in the way"), ("out", "this would replace the report there")):
        status, _, err = start(*words, "--publish", str(tmp_path / folder))
        assert status == 2 and err.startswith(f"error: --publish {tmp_path / folder}: {said}") and starts(tmp_path) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.steps=100"], 5),  # the default, 100, would draw one point
        (["train.steps=100", "eval.every=50"], 50),  # asked for
        (["train.steps=10000"], 100),
        (["train.steps=7", "eval.every=0"], 1),
    ],
)
def test_a_curve_has_twenty_points_unless_told_otherwise(start, tmp_path, overrides, expected):
    assert start("--optimizers", "adamw", "--lrs", "1e-3", "--seeds", "1", *overrides)[0] == 0
    trial = tmp_path / "out" / "trials" / "adamw" / "lr_0.001_seed_1"
    assert load_config(trial / "config.yaml").eval.every == expected


def test_divergence_is_counted_and_others_go_on(start, tmp_path):
    status, out, _ = start("--optimizers", "adamw", "muon{lr: 1}", "--trials", "3", "--seeds", "2", "--adamw-lrs", "0.02")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert status == 0 and "lr_2_seed_0: diverged (error: 10 steps in a row were not finite" in out
    adamw, muon = (row["search"] for row in results["optimizers"])
    assert [p["loss"] for p in muon["lr"] if p["value"] > 0.5] == [None, None]
    assert adamw["trials"] == muon["trials"] == 3 + 6 + 1
    assert "still at the edge after 6 extensions" in out
    before = len(starts(tmp_path))
    assert start("--optimizers", "adamw", "muon{lr: 1}", "--trials", "3", "--seeds", "2", "--adamw-lrs", "0.02")[0] == 0
    assert len(starts(tmp_path)) == before  # a diverged trial is done, too

    sound = [str(path) for path in (tmp_path / "out" / "trials" / "adamw").glob("*_seed_[12]")]
    (lost,) = (tmp_path / "out" / "trials").glob("muon*/lr_2_seed_0")
    assert compare.main(["--runs", *sound, str(lost), "--out", str(tmp_path / "runs")]) == 0
    said = json.loads((tmp_path / "runs" / "results.json").read_text())["sentences"]
    assert any(text.startswith("muon diverged in 1 of 1 seeds") for text in said)


def test_a_trial_that_fails_ends_it_in_one_line(start):
    status, _, err = start("--optimizers", "adamw", "--lrs", "1e-3", "optimizer.weight_decay=7")
    assert status == 2 and err.count("\n") == 1
    assert "failed with status 1: else is wrong (all of it:" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_all_trials_and_the_same_command_continues(start, tmp_path, number):
    words = ["--optimizers", "adamw", "muon", "--lrs", "1e-3", "--seeds", "3", "optimizer.weight_decay=5"]

    def interrupt():
        deadline = time.monotonic() + 30
        while len(list((tmp_path / "out").glob("trials/*/*/ready"))) < 4 and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    previous = signal.getsignal(number)
    status, out, _ = start(*words)
    thread.join()
    assert status == STOPPED and signal.getsignal(number) == previous
    assert "stopped by a signal, all trials are saved; the same command continues" in out
    assert len(starts(tmp_path)) == 4 == len(list((tmp_path / "out").glob("trials/*/*/saved")))
    for label in ("adamw", "muon"):  # the two that had not begun need not wait for a signal of their own
        folder = tmp_path / "out" / "trials" / label / "lr_0.001_seed_3"
        folder.mkdir(parents=True)
        (folder / "saved").touch()
    assert start(*words)[0] == 0
    assert len(starts(tmp_path)) == 10


def test_a_trial_that_another_process_runs_is_left_alone(start, tmp_path):
    folder = tmp_path / "out" / "trials" / "adamw" / "lr_0.001_seed_1"
    folder.mkdir(parents=True)
    with (folder / "log.txt").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        status, _, err = start("--optimizers", "adamw", "--lrs", "1e-3", "--seeds", "1")
    assert status == 2 and "lr_0.001_seed_1 is being run by another process" in err and starts(tmp_path) == []


def test_a_trial_that_someone_stops_stops_the_comparison(start, tmp_path):
    """As a cluster does that signals every process but this one."""

    def stop_one():
        deadline = time.monotonic() + 30
        while not (tmp_path / "out" / "trials" / "adamw" / "lr_0.001_seed_1" / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        (pid,) = [
            int(path.name)
            for path in Path("/proc").iterdir()
            if path.name.isdigit() and str(tmp_path).encode() in command_of(path) and b"run.seed=1" in command_of(path)
        ]
        os.kill(pid, signal.SIGTERM)

    thread = threading.Thread(target=stop_one)
    thread.start()
    status, out, _ = start("--optimizers", "adamw", "--lrs", "1e-3", "--seeds", "2", "optimizer.weight_decay=5")
    thread.join()
    assert status == STOPPED and out.count("stopped by a signal, saved") == 2


def command_of(process):
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_each_gpu_gets_one_trial_at_a_time(start, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "visible_devices", lambda: ["3", "GPU-abc"])
    assert start("--optimizers", "adamw", "--lrs", "1e-3", "--seeds", "3", "--parallel", "2")[0] == 0
    used = {line.split()[1] for line in starts(tmp_path)}
    assert used == {"3", "GPU-abc"}


def test_outcomes():
    start, end = {"step": 1, "loss": 5.0}, {"step": 9, "val_loss": 4.0}
    assert judge([], 9) == ("unfinished", float("inf"))
    assert judge([start], 9).status == "unfinished"
    assert judge([start, {"step": 5, "val_loss": 4.0}], 9) == ("unfinished", float("inf"))
    assert judge([start, end], 9) == ("finished", 4.0)
    assert judge([start, end | {"val_loss": 5.5}], 9).status == "diverged"  # ends above where it began
    assert judge([start, end | {"val_loss": None}], 9).status == "diverged"
    assert judge([start, end | {"val_loss": 5.5}], 9, trained=True) == ("finished", 5.5)  # as model.init may
    assert judge([start, end | {"val_loss": None}], 9, trained=True).status == "diverged"
    first = {"step": 3, "val_loss": 4.0}
    for loss, status in ((4.9, "finished"), (5.1, "diverged")):
        assert judge([start, first, end | {"val_loss": loss}], 9, trained=True).status == status


def test_divergence_is_recognized_by_the_event_that_train_writes(tmp_path):
    device = SimpleNamespace(device=torch.device("cpu"), reduce=lambda tensor, _: tensor, is_main_process=True, num_processes=1)
    guard = Guard(device, Config().train)
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(Diverged), Metrics(device, Config(), folder, {}) as metrics:
        metrics.event({"event": "start"})
        assert not stopped_diverged(folder)
        for _ in range(Config().train.max_bad_steps):
            guard.judge(1, torch.tensor(float("nan")), torch.tensor(1.0), False)
            guard.wait(newest=True)
            list(guard.verdicts())
    assert stopped_diverged(folder)
    metrics.event({"event": "start"})  # somebody runs it again
    assert not stopped_diverged(folder)
    with pytest.raises(ConfigError), Metrics(device, Config(), tmp_path, {}):
        raise ConfigError("data.dir is missing")
    assert not stopped_diverged(tmp_path)
    (tmp_path / "diverged.json").write_text('{"error": "error: 10 steps in a row were not finite"}')  # of an earlier version
    assert stopped_diverged(tmp_path)


@pytest.mark.parametrize(
    ("spec", "label", "lr", "overrides"),
    [
        ("celo2", "celo2", 5e-3, ("optimizer.name=celo2",)),  # the configuration's own optimizer keeps its options
        ("adamw", "adamw", 5e-3, ("optimizer.name=adamw", "optimizer.rule=null", "optimizer.arguments=null")),
        ("torch.optim.NAdam", "torch.optim.NAdam", 1e-2, ("optimizer.name=torch.optim.NAdam",)),
        ("torch.optim.NAdam{route: all, lr: 3e-3}", "torch.optim.NAdam", 3e-3, ("optimizer.route=all",)),
        ("adamw{arguments: {betas: [0.8, 0.9]}}", "adamw", 5e-3, ("optimizer.arguments={betas: [0.8, 0.9]}",)),
        ("adamw{adamw_lr: 0.5}", "adamw", 5e-3, ("optimizer.adamw_lr=0.5",)),
        ("adamw{arguments: {eps: 1e-6}}", "adamw", 5e-3, ("optimizer.arguments={eps: 1.0e-06}",)),  # a word in YAML 1.1
    ],
)  # fmt: skip
def test_contestants(spec, label, lr, overrides, tmp_path):
    config = Config()
    config.optimizer.lr = 5e-3  # five times what is usual for celo2: the other grids begin five times higher, too
    (contestant,) = parse_all([spec], config)
    assert (contestant.label, contestant.lr) == (label, pytest.approx(lr))
    assert set(overrides) <= set(contestant.overrides)
    (tmp_path / "c.yaml").write_text("")
    assert load_config(tmp_path / "c.yaml", contestant.overrides).optimizer.name == label
    assert "/" not in contestant.slug and contestant.slug


def test_only_celo2_has_state_in_bfloat16():
    config = Config()
    config.optimizer.state_dtype = "bf16"
    assert "optimizer.state_dtype=fp32" in parse("muon", config).overrides
    assert not any("state_dtype" in word for word in parse("celo2-base", config).overrides)


def test_scion_gets_no_decay_and_no_width(tmp_path):
    """What the others are given in common; a trial of it is not refused, and no search is made over its decay."""
    pytest.importorskip("pytorch_optimizer")
    (tmp_path / "c.yaml").write_text("")
    common = ["optimizer.weight_decay=0.3", "optimizer.cautious_weight_decay=true", "optimizer.base_width=64"]
    config = load_config(tmp_path / "c.yaml", common)
    scion, mars = parse_all(["scion", "mars"], config)
    trial, written = load_written(tmp_path / "c.yaml", [*common, *scion.overrides])
    assert refuse_idle(trial, IDLE, written) == []
    own = trial.optimizer
    assert (own.weight_decay, own.cautious_weight_decay, own.base_width) == (0.1, False, None)
    assert not any("optimizer." in text for text in scion.special)
    assert [key.name for key in keys_of(scion, ["lr", "weight_decay"], config)] == ["lr"]
    assert [key.name for key in keys_of(mars, ["lr", "weight_decay"], config)] == ["lr", "weight_decay"]


def test_schedule_free_gets_no_schedule():
    pytest.importorskip("schedulefree")
    assert "schedule.kind=constant" in parse("schedule-free", Config()).overrides


def test_the_same_name_twice_is_told_apart():
    a, b = parse_all(["adamw", "adamw{weight_decay: 0}"], Config())
    assert (a.label, b.label) == ("adamw", "adamw{weight_decay: 0}") and a.slug != b.slug
    with pytest.raises(ConfigError, match="names 'adamw' twice"):
        parse_all(["adamw", "adamw"], Config())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a configuration is missing"),
        (["c.yaml"], "--optimizers is missing"),
        (["c.yaml", "--optimizers", "train.steps=3"], "--optimizers is missing"),
        (["c.yaml", "--optimizers", "adamw", "--lrs", "fast"], "--lrs fast: expected positive numbers or auto"),
        (["c.yaml", "--optimizers", "adamw", "--lrs", "-1"], "--lrs -1: expected positive numbers"),
        (["c.yaml", "--optimizers", "adamw", "--adamw-lrs", "0", "train.steps=3"], "--adamw-lrs 0: expected positive numbers"),
        (["c.yaml", "--optimizers", "adamm"], "expected one of celo2, celo2-base, adamw"),
        (["c.yaml", "--optimizers", "adamw{lr"], "expected NAME or NAME{key: value, ...}"),
        (["c.yaml", "--optimizers", "adamw{lrr: 1}"], "unknown key 'optimizer.lrr'"),
        (["c.yaml", "--optimizers", "adamw{lr: x}"], "optimizer.lr is 'x', expected a number"),
        (
            ["c.yaml", "--optimizers", "adamw{lr: 0}"],
            "adamw{lr: 0}: the search begins at the learning rate 0; give a positive lr",
        ),
        (["c.yaml", "--optimizers", "torch.optim.Nope"], "has no Nope"),
        (["c.yaml", "--optimizers", "celo2{rule: nowhere.safetensors}"], "nowhere.safetensors"),
        (["c.yaml", "--optimizers", "adamw", "data.dir=nowhere"], "nowhere"),
        (["--runs", "nowhere"], "nowhere holds no run: config.yaml is missing"),
        (
            ["c.yaml", "--runs", "nowhere"],
            "--runs uses existing results: it can be combined only with --out, --reference, --publish and --target-loss, "
            "not with a config",
        ),
        (["--runs", "nowhere", "--seeds", "2"], "not with --seeds"),
        (["--results", "nowhere.json"], "cannot read results 'nowhere.json' (No such file or directory)"),
        (["--results", "c.yaml"], "c.yaml is not a results.json that launch.compare wrote"),
        (["c.yaml", "--optimizers", "adamw", "--seeds", "0"], "--seeds: 0 is not a whole number of 1 or more"),
        (["c.yaml", "--optimizers", "adamw", "--trials", "many"], "--trials: many is not a whole number of 1 or more"),
        (["c.yaml", "--optimizers", "adamw", "--no-such"], "unrecognized arguments: --no-such"),
        (
            ["c.yaml", "--optimizers", "adamw{arguments: {eps: small}}"],
            "optimizer.arguments.eps is 'small', expected a number, such as 1e-08",
        ),
        (["c.yaml", "--optimizers", "muon{arguments: {betas: 1}}"], "has no argument 'betas'"),
    ],
)
def test_mistakes_are_named_in_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text("train: {steps: 3}\n")
    try:
        status = compare.main(words)
    except SystemExit as exit:
        status = exit.code
    err = capsys.readouterr().err
    assert status == 2 and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "runs").exists()


def test_a_real_comparison(prepared, tmp_path):
    """Two optimizers, trained by train.py; one seed, because every start takes seconds."""
    (tmp_path / "run.yaml").write_text(
        f"data: {{dir: {prepared}}}\nmodel: {{layers: 2, width: 32, heads: 2, context: 32}}\n"
        "train: {steps: 8, batch_size: 8, micro_batch_size: 8}\noptimizer: {adamw_lr: 1e-2}\n"
        "log: {every: 2}\neval: {every: 2, sequences: 8}\n"
    )
    words = [str(tmp_path / "run.yaml"), "--optimizers", "celo2", "torch.optim.NAdam", "--lrs", "5e-3"]
    assert compare.main([*words, "--seeds", "1", "--parallel", "2", "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "one seed tells no difference from noise, so nothing is claimed" in results["sentences"][0]
    for row in results["optimizers"]:
        assert 2 < row["loss"]["mean"] < 5.5  # from log 257 = 5.55
        assert row["state_bytes"] > 100_000
    for run in results["runs"]:
        assert run["flops_per_token"] > 6 * 30_000
        assert run["validation"]["step"] == [1, 2, 3, 4, 5, 6, 7, 8] and run["training"]["step"] == [1, 2, 4, 6, 8]
