"""Which checkpoints stay: damaged ones are not counted, and losses on different validation sets are not compared."""

import pytest
from test_launch_branch import make_checkpoint, names

from configs.schema import Checkpoint
from launch.checkpoint.retention import surplus
from launch.checkpoint.state import read_state
from launch.checkpoint.verify import checkpoint_name, find_checkpoint
from launch.run.state import RunState


def test_damaged_checkpoints_are_not_counted(tmp_path):
    """Where there are fewer whole ones than `keep`, nothing is deleted."""
    paths = {step: tmp_path / checkpoint_name(step) for step in (10, 13, 20)}
    for step, path in paths.items():
        make_checkpoint(path, step, val_loss=step, evaluated=step)
    assert surplus(paths[20], Checkpoint(keep=2)) == [paths[10]]
    assert surplus(paths[20], Checkpoint(keep=2), damaged=[paths[13]]) == [paths[13]]
    assert surplus(paths[20], Checkpoint(keep=1, keep_best=True), damaged=[paths[10]]) == [paths[10]]
    (paths[13] / "state.json").write_text("")
    assert surplus(paths[20], Checkpoint(keep=2)) == [paths[13]]
    assert surplus(paths[20], Checkpoint(keep=3)) == []


@pytest.mark.parametrize("damage", ["a file is cut short", "a byte is flipped"])
def test_the_checkpoint_that_the_start_took_is_kept(run, damage):
    options = ["checkpoint.every=2", "checkpoint.keep=2", "eval.every=0", "log.sample_tokens=0"]
    assert run(*options, "train.steps=3")[0] == 0
    folder = run.tmp_path / "run/checkpoints"
    file = folder / checkpoint_name(3) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content if damage == "a byte is flipped" else content[:-50])
    assert run(*options, "train.steps=4")[0] == 0 and "step_00000003/model.safetensors" in run.out
    assert names(folder) == [checkpoint_name(2), checkpoint_name(4)]
    # Written again, it is whole.
    file = folder / checkpoint_name(4) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    assert run(*options, "train.steps=4")[0] == 0
    assert names(folder) == [checkpoint_name(2), checkpoint_name(4)] and find_checkpoint(folder)[1] == []


def test_losses_on_two_validation_sets_are_not_compared(tmp_path):
    sets = {10: (1.0, "a"), 20: (3.0, "b"), 30: (2.0, "b"), 40: (2.5, "b")}
    for step, (loss, validation) in sets.items():
        make_checkpoint(tmp_path / checkpoint_name(step), step, val_loss=loss, evaluated=step, validation=validation)
    best = Checkpoint(keep=1, keep_best=True)
    assert surplus(tmp_path / checkpoint_name(40), best) == [tmp_path / checkpoint_name(step) for step in (10, 20)]
    state = RunState(step=10)
    assert state.finish_evaluation(1.0, "a") and not state.finish_evaluation(1.5, "a")
    assert state.finish_evaluation(3.0, "b") and state.finish_evaluation(2.0, "b") and not state.finish_evaluation(2.5, "b")
    state = RunState(step=10, best_loss=1.0)  # of an earlier version, which did not say the set
    assert not state.finish_evaluation(3.0, "b")


def test_another_validation_set_begins_a_new_best(run):
    options = ["checkpoint.keep=1", "checkpoint.keep_best=true", "eval.every=1", "checkpoint.every=0", "log.sample_tokens=0"]
    folder, note = run.tmp_path / "run/checkpoints", "and so has the validation set: checkpoint.keep_best compares only losses"
    assert run(*options, "train.steps=2", "eval.sequences=1")[0] == 0
    first = read_state(folder / checkpoint_name(2))
    assert run(*options, "train.steps=3", "eval.sequences=1")[0] == 0 and note not in run.out
    assert read_state(folder / checkpoint_name(3))["validation"] == first["validation"]
    status, records, _ = run(*options, "train.steps=6", "eval.sequences=8", "optimizer.lr=0.0")
    assert status == 0 and note in run.out
    state = read_state(folder / checkpoint_name(6))
    losses_now = [r["val_loss"] for r in records if r["step"] > 3 and "val_loss" in r]
    assert state["best_loss"] == min(losses_now) and state["validation"] != first["validation"]
    status, _, _ = run(*options, "train.steps=7", "eval.sequences=8")
    assert status == 0 and note not in run.out
