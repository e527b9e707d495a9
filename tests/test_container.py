"""The Dockerfile without Docker: what it copies is enough for its own commands, in an empty folder."""

import fnmatch
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def instructions():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    return [line.split(" ", 1) for line in lines if line and not line.startswith("#")]


def test_the_commands_run_in_a_folder_with_what_is_copied(tmp_path):
    """The interpreter and packages are those of this environment; RUN lines that install are only looked at."""
    project, ran = tmp_path / "project", []
    project.mkdir()
    ignored = (ROOT / ".dockerignore").read_text().split()
    for name, rest in instructions():
        if name == "COPY" and rest == ". .":
            tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
            for file in tracked:
                if not any(fnmatch.fnmatch(part, pattern) for part in Path(file).parts for pattern in ignored):
                    (project / file).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / file, project / file)
        elif name == "COPY":
            source, _ = rest.split()
            shutil.copy(ROOT / source, project / source)
        elif name == "RUN" and "install" not in rest:
            command = shlex.split(rest.partition(">")[0])
            assert command[0] == "python"
            environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            done = subprocess.run([sys.executable, *command[1:]], cwd=project, env=environment, capture_output=True, text=True)
            assert done.returncode == 0 and "train.steps" in done.stdout, done.stderr
            ran.append(rest)
        elif name == "RUN" and "pip" in rest:
            assert (project / "requirements.txt").exists() and rest.endswith("-r requirements.txt")
    assert len(ran) == 1
