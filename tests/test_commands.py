"""Every command in a header, a docstring or a document is one that its program accepts.

Programs read their arguments and are stopped there; configurations are loaded, and checked for the processes that the command
starts. Placeholders in capitals get a value. The slow test prints the plan of every training command.
"""

import argparse
import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed.run
from accelerate.commands.launch import launch_command_parser

import train
from celo2.metatrain.config import load_config as load_metatrain
from configs.load import load_config, load_written
from launch.planning.machines import machine_of
from launch.run.check import check

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
PROGRAM = re.compile(
    r"(?:python3? -m [\w.]+|python3? train\.py|torchrun(?=.* train\.py)|accelerate launch|sbatch|launch/cluster/\w+\.sh|make)\b"
)
VALUES = {
    "CONFIG.yaml": "configs/demo.yaml",
    "SUBJECT": "strategies",
    "N": "2",
    "NAME": "h100",
    "ROWS": "64",
    "COLS": "64",
    "IN": "in",
}
NO_PARSER = ("celo2.kernels.tune", "pytest", "torch.distributed.run", "pip", "venv")  # the first reads its three numbers itself


def texts() -> list[tuple[str, str]]:
    """(where, text) of the headers of configurations and cluster files, docstrings of modules, and code in documents."""
    found = []
    for name in TRACKED:
        path = ROOT / name
        if name.startswith(("configs/", "launch/cluster/")) and not name.endswith(".py"):
            found.append((name, "\n".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))))
        elif name.endswith(".py") and not name.startswith("tests/"):
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            found.append((name, re.sub(r"`([^`]+)`", r"\n\1\n", docstring)))
        elif name.endswith(".md") and name != "CHANGELOG.md":
            code = re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", path.read_text(), re.DOTALL)
            found.append((name, "\n".join(block or inline for block, inline in code)))
    return found


def commands() -> dict[str, str]:
    """Every command, with one place where it stands."""
    found = {}
    for where, text in texts():
        for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines():
            line = line.strip()
            if PROGRAM.match(line) and line != "make":
                line = re.split(r"\s{2,}|: (?=(?:[^']*'[^']*')*[^']*$)| #", line)[0].rstrip(".")  # prose may follow
                found.setdefault(line, where)
    return found


COMMANDS = commands()


def words_of(command: str) -> list[str]:
    """The words of a command, with values for placeholders and without what is optional."""
    words = shlex.split(re.sub(r"\s\[[^\]']*\]", "", command))
    return [VALUES.get(word, f"some/{word.lower()}" if word.isupper() else word) for word in words if word != "..."]


class Accepted(BaseException):
    """A program has accepted its arguments."""


def accepted(program: list[str], monkeypatch) -> argparse.Namespace:
    """What the parser of `python -m ...` makes of its arguments."""

    def stopping(parse):
        def stop(parser, args=None, namespace=None):
            result, rest = parse(parser, args, namespace)
            if rest:
                parser.error(f"unrecognized arguments: {rest}")
            raise Accepted(result)

        return stop

    for method, parse in (("parse_args", "parse_known_args"), *[("parse_known_intermixed_args",) * 2]):
        monkeypatch.setattr(argparse.ArgumentParser, method, stopping(getattr(argparse.ArgumentParser, parse)))
    monkeypatch.setattr(sys, "argv", program[2:])
    try:
        runpy.run_module(program[2], run_name="__main__", alter_sys=True)
    except Accepted as result:
        return result.args[0]
    raise AssertionError("it did not read its arguments")


def training(words: list[str], tmp_path: Path) -> tuple[list[str], int] | None:
    """The arguments of train.py and the number of processes that a command starts; None for another program."""
    if words[0] == "make":
        return None
    if words[0] == "sbatch" or words[0].startswith("launch/cluster/"):
        script = words[1:] if words[0] == "sbatch" else words
        words = through_script(script, tmp_path)
    if words[:2] == ["accelerate", "launch"]:
        args = launch_command_parser().parse_args(words[2:])
        processes = int(re.search(r"num_processes: (\d+)", (ROOT / args.config_file).read_text())[1])
        return [args.training_script, *args.training_script_args][1:], processes
    if words[0] == "torchrun":
        args = torch.distributed.run.get_args_parser().parse_args(words[1:])
        assert args.training_script == "train.py"
        return args.training_script_args, int(args.nproc_per_node) * int(args.nnodes.split(":")[-1])
    if words[:2] in (["python", "train.py"], ["python3", "train.py"]):
        return words[2:], 1
    return None


def through_script(script: list[str], tmp_path: Path) -> list[str]:
    """The torchrun command that a script of launch/cluster starts, with stand-ins for the programs that it calls."""
    stand_ins = {
        "python": '#!/usr/bin/env bash\nprintf "%s\\n" "$@" > "$STARTED"\n',
        "srun": '#!/usr/bin/env bash\nshift; exec "$@"\n',
        "scontrol": "#!/usr/bin/env bash\necho node\n",
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    started, python = tmp_path / "started", str(tmp_path / "python")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STARTED": str(started), "PYTHON": python, "DEEPSPEED": python}
    environment |= {"GPUS": "2", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "2"}
    subprocess.run(["bash", *script], cwd=ROOT, env=environment | {"SLURM_JOB_NODELIST": "a"}, check=True, timeout=30)
    words = started.read_text().split("\n")[:-1]
    if words[:2] == ["-m", "torch.distributed.run"]:
        return ["torchrun", *words[2:]]
    return ["torchrun", "--nproc-per-node", words[words.index("--num_gpus") + 1], *words[words.index("train.py") :]]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")  # they are imported already, and run as programs here
@pytest.mark.parametrize("command", COMMANDS, ids=list(COMMANDS))
def test_every_command_is_accepted(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = words_of(command)
    if len(words) == 1:  # the name of a script
        assert (ROOT / words[0]).exists()
        return
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert not [word for word in words[1:] if word not in targets and "=" not in word]
        return
    found = training(words, tmp_path)
    if found is not None:
        arguments, world = found
        if "--help" in arguments:
            return
        if "--gpu" in arguments:
            at = arguments.index("--gpu")
            machine_of(arguments[at + 1])
            del arguments[at : at + 2]
        config, *overrides = [word for word in arguments if not word.startswith("--")]
        check(*load_written(config, overrides), world)
    elif words[2] not in NO_PARSER and words[2:] != ["launch.benchmark"]:
        if len(words) == 3:  # a bare name in a text: the program is there
            assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").exists() or (ROOT / words[2].replace(".", "/")).is_dir()
            return
        if "--help" in words:
            return
        if words[2] == "celo2.metatrain":
            words = [word.replace("configs/demo.yaml", "configs/metatrain/digits.yaml") for word in words]
        args = accepted(words, monkeypatch)
        if words[2] in ("launch.compare", "celo2.metatrain") and args.config:
            configuration = load_metatrain if words[2] == "celo2.metatrain" else load_config
            overrides = [word for word in args.overrides if "=" in word]
            configuration(args.config, overrides)


def test_commands_are_found():
    """The search finds the commands of every kind of place."""
    places = set(COMMANDS.values())
    for place in ("configs/gpt3_125m.yaml", "launch/cluster/torchrun.sh", "launch/cluster/slurm.sbatch", "README.md", "train.py"):
        assert place in places
    assert len(COMMANDS) > 40


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=list(COMMANDS))
def test_every_training_command_can_be_planned(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = words_of(command)
    found = training(words, tmp_path) if len(words) > 1 else None
    if found is None or "--help" in found[0]:
        return
    arguments, world = found
    of_the_reader = ("model.init=", "checkpoint.resume=", "schedule.cooldown=")  # they name a run that is not here
    arguments = [word for word in arguments if not word.startswith(of_the_reader)]
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world, "MASTER_ADDR": "a", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    assert train.main([*arguments, *([] if "--plan" in arguments else ["--plan"])]) == 0
    assert f"{world} process(es)" in capsys.readouterr().out
