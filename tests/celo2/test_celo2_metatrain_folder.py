"""A run replaces nothing of another program: meta-training and pretraining refuse each other's folders, and any other."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_celo2_metatrain_cli import TINY

from celo2 import load_rule
from celo2.metatrain.__main__ import main
from celo2.metatrain.config import Config
from celo2.training.configuration import option, section, to_yaml
from celo2.training.folder import UnsafeFolder, check_own
from configs.schema import Config as TrainConfig


@dataclass
class Part:
    size: int = option(1, "", was="old_size")


@dataclass
class Schema:
    part: Part = section(Part)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, None),
        ({"config.yaml": "part: {size: 3}", "metrics.jsonl": '{"step": 1}\n{"st'}, None),  # killed before its first checkpoint
        ({"config.yaml": "old_size: 3"}, None),
        ({"config.yaml": "", "metrics.jsonl": "", "notes.txt": "mine"}, None),
        ({"rule.safetensors": "", "sign": ""}, None),
        ({"config.yaml": "part: {size: 3}\nmodel: {}"}, "config.yaml is not of a run of this program, which would replace it"),
        ({"config.yaml": "[1]"}, "config.yaml is not of a run"),
        ({"config.yaml": "a: b: c"}, "config.yaml is not of a run"),
        ({"metrics.jsonl": '{"step": 1}\n{"iteration": 1}\n'}, "metrics.jsonl is not of a run"),
        (
            {"rule.safetensors": ""},
            "holds rule.safetensors, which the run would replace, but no sign or other: bring that back, or",
        ),
    ],
)
def test_what_a_run_must_not_replace(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    if message is None:
        check_own(tmp_path, Schema, "step", "sign", "other")
        return
    with pytest.raises(UnsafeFolder, match=r"choose another run\.dir$") as caught:
        check_own(tmp_path, Schema, "step", "sign", "other")
    assert str(tmp_path) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    "files",
    [
        {"config.yaml": to_yaml(TrainConfig()), "metrics.jsonl": json.dumps({"step": 1, "loss": 2.0}) + "\n"},
        {"metrics.jsonl": json.dumps({"step": 1, "loss": 2.0}) + "\n"},
        {"config.yaml": "model: resnet\n", "rule.safetensors": "", "metrics.jsonl": json.dumps({"iteration": 1}) + "\n"},
        {"config.yaml": to_yaml(Config()), "rule.safetensors": ""},  # a run whose state was lost
    ],
)
def test_meta_training_refuses_a_folder_of_something_else(files, tmp_path, capsys):
    (tmp_path / "tiny.yaml").write_text(TINY)
    folder = tmp_path / "taken"
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    before = files_of(folder)
    assert main([str(tmp_path / "tiny.yaml"), f"run.dir={folder}"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and str(folder) in errors[0] and errors[0].endswith("choose another run.dir")
    assert files_of(folder) == before


def test_meta_training_begins_again_after_a_kill_before_its_first_checkpoint(tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = [str(tmp_path / "tiny.yaml"), f"run.dir={tmp_path / 'run'}", "outer.iterations=4"]
    assert main(arguments) == 0
    whole, rule = files_of(tmp_path / "run"), load_rule(tmp_path / "run" / "rule.safetensors")
    for name in ("state.safetensors", "rule.safetensors", "curve.png"):
        (tmp_path / "run" / name).unlink()
    assert main(arguments) == 0
    assert files_of(tmp_path / "run").keys() == whole.keys() and load_rule(tmp_path / "run" / "rule.safetensors") == rule
