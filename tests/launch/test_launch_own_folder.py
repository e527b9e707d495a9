"""A folder of meta-training, or of a stranger, is no training run's; one of a run that was killed early is."""

import shutil
from pathlib import Path

from celo2 import load_rule, save_rule
from celo2.metatrain.config import Config
from celo2.training.configuration import to_yaml


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_meta_trained_rule_is_not_replaced(run):
    folder = run.tmp_path / "run"
    folder.mkdir()
    save_rule(load_rule("celo2-lm"), folder / "rule.safetensors")
    (folder / "metrics.jsonl").write_text('{"iteration": 1}\n')
    (folder / "config.yaml").write_text(to_yaml(Config()))
    for name, message in (
        ("config.yaml", f"error: {folder / 'config.yaml'} is not of a run of this program, which would replace it"),
        ("metrics.jsonl", f"error: {folder / 'metrics.jsonl'} is not of a run of this program, which would replace it"),
        (
            "rule.safetensors",
            f"error: {folder} holds rule.safetensors, which the run would replace, but no checkpoints or config.yaml: "
            "bring that back, or",
        ),
    ):
        before = files_of(folder)
        status, _, err = run()
        assert status == 2 and err.startswith(message) and err.endswith("choose another run.dir\n") and err.count("\n") == 1
        assert files_of(folder) == before
        (folder / name).unlink()


def test_a_run_begins_again_after_a_kill_before_its_first_checkpoint(run):
    folder = run.tmp_path / "run"
    status, whole, _ = run("train.steps=2", "checkpoint.every=2")
    shutil.rmtree(folder / "checkpoints")
    (folder / "checkpoints").mkdir()
    (folder / "events.jsonl").unlink()  # it tells of the checkpoint
    assert (folder / "rule.safetensors").exists()
    status, again, _ = run("train.steps=2", "checkpoint.every=2")
    assert status == 0 and [record["step"] for record in again] == [record["step"] for record in whole]


def test_a_damaged_config_of_a_run_that_has_checkpoints_does_not_stop_it(run):
    config = run.tmp_path / "run" / "config.yaml"
    assert run("train.steps=2")[0] == 0
    config.write_text("run: {name: [\n")
    assert run("train.steps=3")[0] == 0 and "steps: 3" in config.read_text()
