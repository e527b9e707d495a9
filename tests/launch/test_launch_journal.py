"""Copies among a run's checkpoints: of the run itself, and of another run."""

import json
import shutil

import pytest
from test_launch_branch import losses, names

from data.prepare import prepare
from launch.checkpoint.export import export
from launch.checkpoint.journal import wrote
from launch.checkpoint.trained import open_trained, require_its_tokenizer
from launch.checkpoint.verify import CheckpointError, checkpoint_name


def test_a_copy_of_another_runs_checkpoint_begins_a_line(run):
    options = ["checkpoint.every=2", "checkpoint.keep=9", "eval.every=0", "log.sample_tokens=0"]
    run(*options, "train.steps=4", folder="a")
    _, before, _ = run(*options, "train.steps=6", "optimizer.lr=1e-2", folder="b")
    folder = run.tmp_path / "b"
    for source, name in (("a", "step_a4"), ("b", "step_best")):
        shutil.copytree(run.tmp_path / source / "checkpoints/step_00000004", folder / "checkpoints" / name)
    shutil.rmtree(folder / "checkpoints/step_00000004")
    resume = f"checkpoint.resume={folder}/checkpoints/"
    status, records, _ = run(*options, "train.steps=5", f"{resume}step_a4", folder="b")
    assert status == 0 and f"{folder}/checkpoints/step_a4 is not of this run, as events.jsonl shows" in run.out
    assert list(losses(records)) == [5]  # none of the line before
    aside = folder / "set_aside/1"
    assert [json.loads(line) for line in (aside / "metrics.jsonl").read_text().splitlines()] == before
    assert names(aside / "checkpoints") == [checkpoint_name(2), checkpoint_name(6)]
    assert run(*options, "train.steps=5", f"{resume}step_a4", folder="b")[0] == 0
    assert names(folder / "set_aside") == ["1"]  # the same command continues
    # The copy of the former line is not of this line, but is of the line that was set aside.
    assert not wrote(folder, folder / "checkpoints/step_best") and wrote(folder, folder / "checkpoints/step_00000005")
    assert wrote(aside, folder / "checkpoints/step_best") and not wrote(aside, folder / "checkpoints/step_a4")


def test_a_copy_of_an_own_checkpoint_continues_the_line(run):
    options = ["checkpoint.every=2", "checkpoint.keep=1", "eval.every=0", "log.sample_tokens=0"]
    folder = run.tmp_path / "run"
    assert run(*options, "train.steps=2")[0] == 0
    shutil.copytree(folder / "checkpoints/step_00000002", folder / "checkpoints/step_best")
    _, before, _ = run(*options, "train.steps=4")
    assert names(folder / "checkpoints") == [checkpoint_name(4), "step_best"]
    status, records, _ = run(*options, "train.steps=4", f"checkpoint.resume={folder / 'checkpoints/step_best'}")
    assert status == 0 and losses(records) == losses(before) and "is not of this run" not in run.out
    # Events of an earlier version name no manifest.
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    for event in events:
        event.pop("manifest", None)
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert wrote(folder, folder / "checkpoints/step_best")


def test_a_checkpoint_of_another_tokenizer_is_refused(run, prepared):
    source, bpe = str(prepared.parent / "text.jsonl"), run.tmp_path / "bpe"
    prepare(source, bpe, tokenizer="bpe", vocab_size=300, val_fraction=0.2, workers=1)
    quick = ["train.steps=2", "eval.every=0", "log.sample_tokens=0"]
    assert run(*quick, folder="e")[0] == 0
    assert run(*quick, f"data.dir={bpe}", folder="f")[0] == 0
    copy = run.tmp_path / "f/checkpoints/step_best_of_e"
    shutil.copytree(run.tmp_path / "e/checkpoints/step_00000002", copy)
    message = (
        f"{copy} was trained with another tokenizer than {run.tmp_path / 'f/tokenizer.json'}: name the checkpoint in the folder "
        "of its own run, or bring its tokenizer.json back"
    )
    for use in (lambda: export(copy, run.tmp_path / "x"), lambda: open_trained(copy)):
        with pytest.raises(CheckpointError) as error:
            use()
        assert str(error.value) == message
    assert not (run.tmp_path / "x").exists()
    require_its_tokenizer(run.tmp_path / "e/checkpoints/step_00000002", run.tmp_path / "e")
    state = copy / "state.json"
    content = state.read_bytes()
    state.write_text(json.dumps(json.loads(content) | {"identity": None}))
    require_its_tokenizer(copy, run.tmp_path / "f")  # whoever reads the state names the damage
    state.write_bytes(content)
    bare = ["model.layers=null", "model.width=null", "model.heads=null"]
    status, _, error = run(*quick, *bare, f"model.init={copy}", f"data.dir={bpe}", folder="g")
    assert (status, error) == (2, f"error: model.init: {message}\n")


def test_a_card_gives_no_losses_of_another_run(run):
    quick = ["train.steps=2", "eval.every=0", "log.sample_tokens=0"]
    for folder in ("e", "f"):
        assert run(*quick, f"optimizer.lr={1e-3 if folder == 'e' else 1e-2}", folder=folder)[0] == 0
    copy = run.tmp_path / "f/checkpoints/step_best_of_e"
    shutil.copytree(run.tmp_path / "e/checkpoints/step_00000002", copy)
    for checkpoint, given in ((run.tmp_path / "f", True), (copy, False)):
        export(checkpoint, run.tmp_path / f"x{given}")
        assert ("training loss" in (run.tmp_path / f"x{given}/README.md").read_text()) is given
