"""Checkpoints that lie outside a run's folder belong to one run, though a copy of the run's folder names them, too."""

import os
import shutil
from pathlib import Path

import pytest

from configs.load import load_config
from configs.schema import Checkpoint, Config
from launch.checkpoint.folders import CHECKPOINTS, FALLBACK, choose_checkpoint, claim, folders_of, other_owner
from launch.checkpoint.verify import CheckpointError
from launch.run.branch import checkpoint_folders, choose_start

QUICK = ("eval.every=0", "log.sample_tokens=0", "checkpoint.every=2", "checkpoint.keep=1")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def linked(run_dir, disk):
    run_dir.mkdir()
    disk.mkdir(exist_ok=True)
    (run_dir / CHECKPOINTS).symlink_to(disk)
    return run_dir


def message(run_dir, disk, owner):
    return (
        f"{run_dir / CHECKPOINTS} leads to {disk}, which holds the checkpoints of {owner}: choose another run.dir with "
        f"checkpoint.resume={owner}, or copy the checkpoints into a folder of its own and link that; if {run_dir} replaces "
        f"{owner}, remove {run_dir / CHECKPOINTS / 'owner'}"
    )


def test_a_copy_that_kept_the_link_is_refused(run):
    a, b, disk = (run.tmp_path / name for name in ("a", "b", "disk"))
    linked(a, disk)
    assert run(*QUICK, "train.steps=2", folder="a")[0] == 0
    assert names(disk) == ["owner", "step_00000002"] and (disk / "owner").read_text() == f"{a}\n"
    shutil.copytree(a, b, symlinks=True)
    status, _, error = run(*QUICK, "train.steps=4", "optimizer.lr=1e-2", folder="b")
    assert (status, error) == (2, f"error: {message(b, disk, a)}\n")
    assert names(disk) == ["owner", "step_00000002"]

    shutil.copytree(disk, run.tmp_path / "other")  # the remedy: the checkpoints copied, and the link changed
    (b / CHECKPOINTS).unlink()
    (b / CHECKPOINTS).symlink_to(run.tmp_path / "other")
    assert run(*QUICK, "train.steps=4", folder="b")[0] == 0 and "resumed from" in run.out
    assert names(disk) == ["owner", "step_00000002"] and names(run.tmp_path / "other") == ["owner", "step_00000004"]

    shutil.copytree(a, run.tmp_path / "replaces", symlinks=True)  # the other remedy, of a run that was moved by copying
    (disk / "owner").unlink()
    assert choose_start(Config(), run.tmp_path / "replaces").checkpoint is not None
    claim(a / CHECKPOINTS, a)

    shutil.copytree(a, run.tmp_path / "whole")  # as cp -rL: it has its own checkpoints, and resumes
    assert run(*QUICK, "train.steps=4", folder="whole")[0] == 0 and "resumed from" in run.out
    assert names(disk) == ["owner", "step_00000002"]

    shutil.rmtree(b)
    a.rename(b)  # a run that was moved keeps its checkpoints
    assert run(*QUICK, "train.steps=4", folder="b")[0] == 0 and "resumed from" in run.out
    assert names(disk) == ["owner", "step_00000004"] and (disk / "owner").read_text() == f"{b}\n"


def test_one_of_two_runs_is_the_first(tmp_path):
    """A folder without the file, as of an earlier version, belongs to whoever starts first; a link to the run is the run."""
    disk = tmp_path / "disk"
    u, v = linked(tmp_path / "u", disk), linked(tmp_path / "v", disk)
    assert other_owner(disk, u) is other_owner(disk, v) is None
    claim(u / CHECKPOINTS, u)
    claim(u / CHECKPOINTS, u)
    with pytest.raises(CheckpointError) as error:
        claim(v / CHECKPOINTS, v)
    assert str(error.value) == message(v, disk, u)
    (tmp_path / "link").symlink_to(u)
    assert other_owner(disk, tmp_path / "link") is None
    for content in (b"", b"\0\xff", b"relative\n", os.fsencode(tmp_path / "gone"), b"/" + b"x" * 9000):  # nobody's
        (disk / "owner").write_bytes(content)
        assert other_owner(disk, v) is None
    (disk / "owner").unlink()
    os.mkfifo(disk / "owner")
    assert other_owner(disk, v) is None  # and does not wait for a writer


def test_a_copy_gets_a_second_folder_of_its_own(run):
    second = run.tmp_path / "second"
    options = [*QUICK, f"checkpoint.fallback_dir={second}"]
    assert run(*options, "train.steps=2", folder="c")[0] == 0
    c, d = run.tmp_path / "c", run.tmp_path / "d"
    own = (c / FALLBACK).read_text()
    shutil.copytree(c, d)
    assert run(*options, "train.steps=4", "optimizer.lr=1e-2", folder="d")[0] == 0
    assert (c / FALLBACK).read_text() == own != (d / FALLBACK).read_text()
    config = Config(checkpoint=Checkpoint(fallback_dir=str(second)))
    assert str(checkpoint_folders(config, c, None)[1]) == own
    assert str(checkpoint_folders(config, d, None)[1]) == (d / FALLBACK).read_text()

    # The newest checkpoint of the original is there alone, and a copy has no such step.
    copy = run.tmp_path / "copy"
    shutil.copytree(c, copy)
    (d / CHECKPOINTS / "step_00000004").rename(f"{own}/step_00000004")
    assert choose_checkpoint(c).path.name == "step_00000004" and len(folders_of(copy)) == 1
    chosen = choose_checkpoint(copy)
    assert chosen.path == copy / CHECKPOINTS / "step_00000002"
    assert chosen.problems == [f"{own}/step_00000004 is newer, but belongs to {c}, of which {copy} is a copy"]
    with pytest.raises(CheckpointError) as error:
        choose_start(config, copy)
    assert str(error.value) == (
        f"{copy} is a copy of {c}, whose newest checkpoint is {own}/step_00000004: copy it into {copy / CHECKPOINTS}, or remove "
        f"{copy / FALLBACK} to continue without it"
    )
    (copy / CHECKPOINTS).rename(run.tmp_path / "away")  # without a checkpoint of its own it cannot continue without that one
    with pytest.raises(CheckpointError) as error:
        choose_start(config, copy)
    assert str(error.value).endswith(f"/step_00000004: copy it into {copy / CHECKPOINTS}")
    (run.tmp_path / "away").rename(copy / CHECKPOINTS)
    (copy / FALLBACK).unlink()
    assert choose_start(config, copy).checkpoint == copy / CHECKPOINTS / "step_00000002"


def test_a_new_run_at_the_place_of_a_moved_one_gets_another_second_folder(run):
    second = run.tmp_path / "second"
    options = [*QUICK, "train.steps=2", f"checkpoint.fallback_dir={second}"]
    assert run(*options, folder="c")[0] == 0
    (run.tmp_path / "c").rename(run.tmp_path / "moved")
    assert run(*options, folder="c")[0] == 0
    assert (run.tmp_path / "c" / FALLBACK).read_text() != (run.tmp_path / "moved" / FALLBACK).read_text()
    assert len(names(second)) == 2


def test_a_lost_folder_of_a_run_does_not_lose_its_second_folder(run):
    second = run.tmp_path / "second"
    options = [*QUICK, f"checkpoint.fallback_dir={second}"]
    assert run(*options, "train.steps=4", folder="c")[0] == 0
    c = run.tmp_path / "c"
    there = Path((c / FALLBACK).read_text())
    (c / CHECKPOINTS / "step_00000004").rename(there / "step_00000004")  # as after a full disk

    (c / FALLBACK).unlink()  # as of a copy without this file: the owner says whose folder it is
    assert choose_start(load_config(c / "config.yaml", []), c).checkpoint == there / "step_00000004"

    (there / "step_00000004").rename(c / CHECKPOINTS / "step_00000004")
    (c / "events.jsonl").rename(c / "lost")  # its checkpoints say that this is the owner's folder, too
    assert str(checkpoint_folders(load_config(c / "config.yaml", []), c, None)[1]) == str(there)
    assert choose_start(load_config(c / "config.yaml", []), c).checkpoint == c / CHECKPOINTS / "step_00000004"
    (c / CHECKPOINTS / "step_00000004").rename(there / "step_00000004")

    shutil.rmtree(c)
    status, _, error = run(*options, "train.steps=6", folder="c")
    assert (status, error) == (
        2,
        f"error: {c} holds no run, but {there} holds checkpoints of an earlier run at this path: continue from them with "
        f"checkpoint.resume={there}/step_00000004, or choose another run.dir; if that run was moved, resume it first\n",
    )
    status, records, _ = run(*options, "train.steps=6", f"checkpoint.resume={there}/step_00000004", folder="c")
    assert status == 0 and [record["step"] for record in records if "loss" in record][-2:] == [5, 6]
    assert names(there) == ["owner", "step_00000004"]
