"""The cluster files: they parse, and the Slurm script, with stand-ins for Slurm's commands, queues a stopped run again."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parents[2] / "launch" / "cluster"
SCRIPTS = ["torchrun.sh", "deepspeed.sh", "slurm.sbatch", "loop.sh"]

# Like a torchrun that trains: after a signal it saves, for a moment, and ends with 1.
SRUN = """#!/usr/bin/env bash
trap 'sleep 0.3; echo saved >> "$LOG"; exit 1' USR1
echo $$ > "$LOG.pid"; echo "$@" > "$LOG.args"
for _ in $(seq "$STEPS"); do sleep 0.1; done
exit "$STATUS"
"""


@pytest.mark.parametrize("name", SCRIPTS)
def test_they_parse(name):
    subprocess.run(["bash", "-n", CLUSTER / name], check=True)
    assert os.access(CLUSTER / name, os.X_OK)


def test_accelerate_starts_plain_processes():
    config = yaml.safe_load((CLUSTER / "accelerate.yaml").read_text())
    assert config["distributed_type"] == "MULTI_GPU" and config["mixed_precision"] == "no" and not config["use_cpu"]
    assert not {"deepspeed_config", "fsdp_config"} & set(config)


@pytest.fixture
def slurm(tmp_path):
    """slurm(steps of 0.1 s, status, signal) -> (exit status, what the stand-ins wrote, arguments of srun)."""
    stand_ins = {
        "srun": SRUN,
        "scancel": '#!/usr/bin/env bash\necho "scancel $*" >> "$LOG"; kill -USR1 "$(cat "$LOG.pid")"\n',
        "scontrol": '#!/usr/bin/env bash\nif [[ $1 == show ]]; then printf "a1\\na2\\n"; else echo "$*" >> "$LOG"; fi\n',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    log.touch()

    def start(steps, status, send_signal):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "STEPS": str(steps), "STATUS": str(status)}
        environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "1234", "SLURM_JOB_NUM_NODES": "2"}
        environment |= {"SLURM_JOB_NODELIST": "a[1-2]", "SLURM_GPUS_ON_NODE": "8"}
        job = subprocess.Popen(["bash", CLUSTER / "slurm.sbatch", "my.yaml", "run.name=x"], env=environment)
        if send_signal:
            end = time.monotonic() + 10
            while not (tmp_path / "log.args").exists() and time.monotonic() < end:
                time.sleep(0.05)
            job.send_signal(10)
        return job.wait(20), log.read_text().splitlines(), (tmp_path / "log.args").read_text().split()

    return start


def test_a_signal_saves_and_queues_again(slurm):
    status, log, arguments = slurm(100, 0, True)
    assert (status, log) == (75, ["scancel --signal=USR1 1234.0", "saved", "requeue 1234"])
    assert arguments[-3:] == ["train.py", "my.yaml", "run.name=x"]
    assert arguments[arguments.index("--nnodes") + 1] == "2" and arguments[arguments.index("--nproc-per-node") + 1] == "8"
    assert arguments[arguments.index("--rdzv-endpoint") + 1] == "a1:21234"


@pytest.mark.slow  # 30 s of CPU: two starts of torchrun
def test_slurm_stops_queues_again_and_goes_on(run, prepared, tmp_path):
    """The script with torchrun and a training run; only Slurm's own commands are stand-ins: what they are asked for happens."""
    constant = ["schedule.kind=constant", "schedule.warmup=0"]  # the rate does not follow from train.steps
    assert run("train.steps=8", *constant, folder="whole")[0] == 0
    with socket.socket() as probe:  # the script's port follows from the number of the job
        while True:
            try:
                job = random.randrange(20000)
                probe.bind(("127.0.0.1", 20000 + job))
                break
            except OSError:
                continue
    stand_ins = {
        "srun": 'shift; echo $$ > "$LOG.pid"; exec "$@"',
        "scancel": 'kill -USR1 "$(cat "$LOG.pid")"',
        "scontrol": 'if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$*" >> "$LOG"; fi',
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    root, log = CLUSTER.parents[1], tmp_path / "log"
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(log),
        "PYTHON": sys.executable,
        "GPUS": "2",
    }
    environment |= {"SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_ID": str(job), "SLURM_JOB_NUM_NODES": "1"}
    environment |= {"SLURM_JOB_NODELIST": "here", "OMP_NUM_THREADS": "1"}
    command = ["bash", str(CLUSTER / "slurm.sbatch"), str(tmp_path / "config.yaml"), f"data.dir={prepared}"]
    command += [f"run.dir={tmp_path / 'run'}", "train.steps=8", *constant, "train.micro_batch_size=4"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with open(tmp_path / "output", "w") as output:
        first = subprocess.Popen([*command, "train.steps=1000000"], env=environment, stdout=output, stderr=output)
        while not (metrics.exists() and '"step": 3,' in metrics.read_text()):
            assert first.poll() is None, (tmp_path / "output").read_text()
            time.sleep(0.05)
        first.send_signal(signal.SIGUSR1)
        assert first.wait(120) == 75, (tmp_path / "output").read_text()
        assert log.read_text() == f"requeue {job}\n"
        stopped = int(list((tmp_path / "run" / "checkpoints").glob("step_*"))[-1].name[5:])
        steps = f"train.steps={max(8, stopped + 2)}"
        environment["SLURM_RESTART_COUNT"] = "1"
        again = subprocess.run([*command, steps], env=environment, stdout=output, stderr=output, timeout=170)
    assert again.returncode == 0, (tmp_path / "output").read_text()
    losses, whole = (
        {r["step"]: r["loss"] for r in map(json.loads, path.read_text().splitlines()) if "loss" in r}
        for path in (metrics, tmp_path / "whole" / "metrics.jsonl")
    )
    assert all(losses[step] == pytest.approx(whole[step], rel=1e-5) for step in whole)


@pytest.mark.parametrize("status", [0, 2])
def test_without_a_signal_it_is_not_queued_again(slurm, status):
    assert slurm(1, status, False)[:2] == (status, [])


@pytest.mark.parametrize(
    ("statuses", "ended", "starts"),
    [("70 75 0", 0, 3), ("1 2", 2, 2), ("130", 130, 1), ("1 1 1 0", 1, 3)],  # the last: quick failures in a row
)
def test_the_loop_starts_again_what_another_start_mends(statuses, ended, starts, tmp_path):
    count = tmp_path / "count"
    script = f'set -- {statuses}; echo x >> {count}; n=$(wc -l < {count}); exit "${{!n}}"'
    command = ["bash", CLUSTER / "loop.sh", "bash", "-c", script]
    status = subprocess.run(command, env={**os.environ, "PAUSE": "0"}, stderr=subprocess.DEVNULL, timeout=30).returncode
    assert (status, len(count.read_text().split())) == (ended, starts)


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_a_link_to_a_script_finds_the_project_and_a_missing_environment_is_named(script, tmp_path):
    link, variable = tmp_path / "link", "PYTHON" if script == "torchrun.sh" else "DEEPSPEED"
    link.symlink_to(CLUSTER / script)
    done = subprocess.run([link], env={**os.environ, variable: "none/here"}, capture_output=True, text=True, cwd=tmp_path)
    root = CLUSTER.parents[1]
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: there is no none/here in {root}: make venv, or set {variable}\n"


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "QUIT", "USR1", "USR2", "XCPU"])
def test_every_stop_signal_to_the_loop_ends_both(name, tmp_path):
    """The child handles nothing, as in the first seconds of a start, when bash lets it ignore INT and QUIT."""
    ready = tmp_path / "ready"
    number = signal.Signals[f"SIG{name}"]
    loop = subprocess.Popen(
        ["bash", CLUSTER / "loop.sh", "bash", "-c", f"touch {ready}; exec sleep 60"],
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # bash traps no signal that it was told to ignore, as by nohup
    )
    end = time.monotonic() + 10
    while not ready.exists() and time.monotonic() < end:
        time.sleep(0.05)
    loop.send_signal(number)
    assert loop.wait(10) == 128 + (signal.SIGTERM if name in ("INT", "QUIT") else number)


def test_a_signal_to_the_loop_is_one_to_the_run(tmp_path):
    ready = tmp_path / "ready"
    script = f"trap 'sleep 0.3; exit 75' TERM; touch {ready}; for _ in $(seq 100); do sleep 0.1; done"
    loop = subprocess.Popen(["bash", CLUSTER / "loop.sh", "bash", "-c", script])
    end = time.monotonic() + 10
    while not ready.exists() and time.monotonic() < end:
        time.sleep(0.05)
    loop.terminate()
    assert loop.wait(10) == 75
