"""The cluster files: they parse, and the Slurm script, with stand-ins for Slurm's commands, queues a stopped run again."""

import os
import subprocess
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


def test_a_signal_to_the_loop_is_one_to_the_run(tmp_path):
    ready = tmp_path / "ready"
    script = f"trap 'sleep 0.3; exit 75' TERM; touch {ready}; for _ in $(seq 100); do sleep 0.1; done"
    loop = subprocess.Popen(["bash", CLUSTER / "loop.sh", "bash", "-c", script])
    end = time.monotonic() + 10
    while not ready.exists() and time.monotonic() < end:
        time.sleep(0.05)
    loop.terminate()
    assert loop.wait(10) == 75
