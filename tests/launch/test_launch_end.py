"""What ends a run: a summary that may fail, signals, a terminal that shows less than UTF-8, or one that is gone."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from configs.load import load_config
from launch.distributed.heartbeat import print_error
from launch.monitoring.display import Terminal, show_any_text
from launch.monitoring.signals import COPY, GRACE, Count, StopSignals
from launch.run import summary as summary_module
from launch.run.hooks import Hooks
from launch.run.summary import Summary

ROOT = Path(__file__).parents[2]


def raising(error):
    def act(*_, **__):
        raise error

    return act


def test_whatever_fails_in_the_summary_is_a_warning(run, monkeypatch):
    status, _, _ = run("train.steps=3", "log.sample_prompt=" + "a long prompt " * 9)
    assert status == 0 and "warning: the prompt has 126 tokens, the model's context 32" in run.out
    assert "log.sample_prompt has 126 tokens, the context 32: the model will see the last 16 of them" in run.out  # at the start
    status, _, _ = run("--plan", "log.sample_prompt=" + "a long prompt " * 9)
    assert status == 0 and "note: log.sample_prompt has 126 tokens" in run.out
    folder = run.tmp_path / "run"
    assert len((folder / "sample.txt").read_text(encoding="utf-8")) > 125  # the whole prompt is shown
    config = load_config(folder / "config.yaml")
    faults = {
        "draw_losses": ImportError("No module named 'matplotlib'"),
        "sample_text": RuntimeError("probability tensor contains either `inf`, `nan` or element < 0"),
        "load_tokenizer": ValueError("not a tokenizer"),
        "load_model": torch.OutOfMemoryError("CUDA out of memory"),
        "read_metrics": OSError(errno.EIO, "Input/output error"),
        "replacing": OSError(errno.ENOSPC, "No space left on device"),
    }
    for name, error in faults.items():
        said: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(summary_module, name, raising(error))
            Summary(config, folder, [folder / "checkpoints"], 256, 32, said.append, lambda: False).finish(torch.device("cpu"))
        assert any(line.startswith("warning: ") and str(error) in line for line in said), name


@pytest.mark.parametrize("log_every", [1, 100])
def test_losses_that_are_not_finite_end_in_status_0_and_null(run, log_every):
    status, records, _ = run("optimizer.name=adamw", "optimizer.lr=1e30", "optimizer.adamw_lr=1e30", f"log.every={log_every}")
    assert status == 0 and "validation loss not finite" in run.out
    text = (run.tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text and "Infinity" not in text
    assert records[-1]["val_loss"] is None and records[-1]["val_perplexity"] is None
    assert "not finite" not in run.out.split("training loss ")[-1].split(" -> ")[0]


class Look(Hooks):
    """Notes which files are there before a step."""

    def __init__(self, folder, step):
        self.folder, self.step, self.found = folder, step, set()

    def before_step(self, step, strategy):
        if step == self.step:
            self.found = {path.name for path in self.folder.iterdir()}
            self.training = strategy.model.training


def test_loss_and_sample_are_there_after_every_evaluation(run):
    look = Look(run.tmp_path / "run", 4)
    assert run("model.dropout=0.1", hooks=look)[0] == 0
    assert {"loss.png", "sample.txt"} <= look.found and look.training
    *_, last = [json.loads(line) for line in (run.tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert last["event"] == "finished" and last["step"] == 6


def test_a_sample_changes_nothing(run):
    """The same losses with samples and without, dropout included."""
    without, with_samples = (run("model.dropout=0.1", f"log.sample_tokens={n}", folder=f"{n}")[1] for n in (0, 8))
    assert [r.get("loss", r.get("val_loss")) for r in without] == [r.get("loss", r.get("val_loss")) for r in with_samples]


def test_what_a_terminal_cannot_show_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    show_any_text()
    Terminal(file=sys.stdout).say("Größe [b] :smile: 日")
    sys.stdout.flush()
    assert written.getvalue() == b"Gr\\xf6\\xdfe [b] :smile: \\u65e5\n"


class Full(io.StringIO):
    """A stream that takes nothing."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.ENOSPC, "No space left on device")])
def test_nobody_reads_or_the_disk_is_full(error, monkeypatch):
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    terminal = Terminal(file=Full(error))
    for _ in range(2):
        terminal.say("a line")


# The main thread is in a computation that no signal interrupts and that does not hold the interpreter.
BLOCKED = """
import hashlib, sys
from launch.monitoring.signals import StopSignals
with StopSignals() as signals:
    signals.wait = sys.argv[1] == "wait"
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
"""


@pytest.mark.parametrize(("phase", "numbers"), [("wait", [signal.SIGINT, signal.SIGTERM]), ("start", [signal.SIGTERM])])
def test_a_second_signal_stops_at_once_inside_a_long_operation(phase, numbers):
    process = subprocess.Popen([sys.executable, "-c", BLOCKED, phase], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    process.stdout.readline()
    for number in numbers:
        time.sleep(COPY + 0.2)
        process.send_signal(number)
    start = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and time.monotonic() - start < GRACE + 8  # the machine may be busy
    assert err == "error: stopped at once by a signal; the same command continues from the newest checkpoint\n"


def test_signals_of_a_launcher_do_not_end_a_process_that_has_a_verdict():
    with StopSignals() as signals:
        signals.hold()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received
        with pytest.raises(KeyboardInterrupt):  # a person
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("launcher", [False, True])
def test_copies_of_a_signal_do_not_count(launcher, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    if not launcher:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    count = Count()
    assert [count.add(signal.SIGTERM), count.add(signal.SIGTERM)] == [1, 1]  # `timeout` sends two
    now[0] += COPY + 0.1
    # torchrun's ranks get Ctrl-C from the terminal and from torchrun.
    assert [count.add(signal.SIGINT), count.add(signal.SIGINT)] == ([2, 2] if launcher else [2, 3])


def test_torchrun_learns_why_a_rank_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    print_error("data.dir is missing")
    said = json.loads((tmp_path / "error.json").read_text())["message"]
    assert said["message"] == "data.dir is missing" and int(said["extraInfo"]["timestamp"]) > 0
    assert capsys.readouterr().err == "error: data.dir is missing\n"


def test_a_locale_that_is_not_utf8(run, prepared):
    """Names and texts that ASCII lacks, on a terminal and in files; and a reader that leaves after the first line."""
    run("train.steps=1")  # writes config.yaml
    folder = run.tmp_path / "ascii"
    command = [sys.executable, "train.py", str(run.tmp_path / "config.yaml"), f"data.dir={prepared}", f"run.dir={folder}"]
    environment = {**os.environ, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    process = subprocess.run(
        [*command, "train.steps=3", "run.name=Größe", "log.sample_prompt=Größe"], cwd=ROOT, env=environment, capture_output=True
    )
    assert process.returncode == 0, process.stderr
    assert "warning" not in process.stdout.decode("ascii")
    assert (folder / "sample.txt").read_text(encoding="utf-8").startswith("Größe")
    assert load_config(folder / "config.yaml").run.name == "Größe"
    with subprocess.Popen([*command, "train.steps=6"], cwd=ROOT, stdout=-1, stderr=-1) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(200) == 0, process.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize(("target", "number"), [("launcher", signal.SIGTERM), ("group", signal.SIGINT)])
def test_the_last_line_under_torchrun_says_what_happened(target, number, run, prepared):
    run("train.steps=1")
    folder, output = run.tmp_path / "two", run.tmp_path / "output"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command += [str(run.tmp_path / "config.yaml"), f"data.dir={prepared}", f"run.dir={folder}", "train.micro_batch_size=4"]
    command += ["train.steps=100000", "log.every=1", "eval.every=0", "checkpoint.every=0"]
    with open(output, "wb") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while "step      3/" not in output.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        os.kill(process.pid, number) if target == "launcher" else os.killpg(process.pid, number)
        assert process.wait(60) != 0
        time.sleep(2)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert output.read_text().splitlines()[-1].startswith("stopped by a signal after step ")
    assert len(list((folder / "checkpoints").glob("step_*"))) == 1
