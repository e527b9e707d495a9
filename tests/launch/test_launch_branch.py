"""Going back to a checkpoint: both lines are kept, the same command continues, a kill at any moment harms nothing."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from stopping import StopIn

from configs.load import ConfigError, build
from configs.schema import Checkpoint
from launch.checkpoint import publish
from launch.checkpoint.publish import write_manifest
from launch.checkpoint.retention import surplus
from launch.checkpoint.verify import CheckpointError, checkpoint_name, find_checkpoint, list_checkpoints, step_of
from launch.monitoring.signals import STOPPED
from launch.run import branch
from launch.run.branch import begin_line, choose_start, config_to_plan, read_origin
from launch.run.check import check_folders


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def losses(records):
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def test_both_lines_are_kept_and_the_same_command_continues(run):
    old = ["train.steps=12", "checkpoint.every=2", "eval.every=4", "checkpoint.keep=10"]
    _, before, _ = run(*old)
    folder = run.tmp_path / "run"
    back = [*old[:3], "checkpoint.keep=2", "optimizer.lr=2e-3", f"checkpoint.resume={folder / 'checkpoints' / 'step_00000004'}"]
    _, elsewhere, _ = run(*back, folder="elsewhere")  # a branch in a folder of its own, not interrupted
    assert losses(elsewhere).keys() == losses(before).keys() and losses(elsewhere)[4] == losses(before)[4]
    assert names(run.tmp_path / "elsewhere" / "checkpoints") == [checkpoint_name(step) for step in (4, 10, 12)]

    status, _, _ = run(*back, hooks=StopIn(9))
    assert status == STOPPED and "set_aside/1, a run's folder of its own" in run.out
    assert names(folder / "checkpoints") == [checkpoint_name(step) for step in (4, 8, 9)]
    aside = folder / "set_aside" / "1"
    assert names(aside / "checkpoints") == [checkpoint_name(step) for step in (6, 8, 10, 12)]
    assert [json.loads(line) for line in (aside / "metrics.jsonl").read_text().splitlines()] == before
    status, _, _ = run(*back, hooks=StopIn(11))
    assert status == STOPPED and "step_00000009" in run.out
    status, branched, _ = run(*back[:-1])  # auto
    assert status == 0 and "step_00000011" in run.out
    assert losses(branched) == losses(elsewhere)
    assert names(folder / "set_aside") == ["1"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (event,) = [e for e in events if e["event"] == "branch"]
    assert (event["step"], event["set_aside"]) == (4, "set_aside/1")

    # With another setting it is another branch; the first one is kept, too. The line that was set aside is a run's folder.
    status, again, _ = run(*back, "optimizer.lr=1e-3")
    assert status == 0 and losses(again)[6] != losses(branched)[6]
    assert names(folder / "set_aside") == ["1", "2"]
    status, continued, _ = run(*old, "train.steps=13", folder="run/set_aside/1")
    assert status == 0 and losses(continued).keys() == {*losses(before), 13}


def make_checkpoint(path, step, content="", **state):
    path.mkdir(parents=True)
    (path / "state.json").write_text(json.dumps({"step": step, "content": content, **state}))
    write_manifest(path)


def make_run(folder, steps, content):
    for step in steps:
        make_checkpoint(folder / "checkpoints" / checkpoint_name(step), step, content)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, "loss": content}) + "\n" for s in range(max(steps) + 1)))
    (folder / "config.yaml").write_text(content)


def config_of(resume, **optimizer):
    return build({"checkpoint": {"resume": str(resume)}, "optimizer": optimizer})


def tree(folder):
    """Every file with its content, but for the name that a line has by chance."""
    places = {"": folder, "checkpoints/": (folder / "checkpoints").resolve()}  # it may be a link
    found = {
        prefix + path.relative_to(place).as_posix(): path.read_text()
        for prefix, place in places.items()
        for path in place.rglob("*")
        if path.is_file()
    }
    origins = {name: json.loads(text) for name, text in found.items() if name.endswith("origin.json")}
    return found | {name: {**origin, "id": ""} for name, origin in origins.items()}


class Killed(BaseException):
    pass


def rename_on_one_disk(path, target, rename=Path.rename):
    """`Path.rename` where the checkpoints of each folder lie on a disk of their own."""
    if path.name.startswith("step_") and path.resolve().parent != Path(target).parent.resolve():
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(path))
    return rename(path, target)


@pytest.mark.parametrize(("source", "disks"), [("own", 1), ("own copy", 1), ("other", 1), ("own", 2), ("other", 2)])
@pytest.mark.parametrize("then", ["the same command", "auto"])
def test_a_kill_between_any_two_operations(source, disks, then, tmp_path, monkeypatch):
    make_run(tmp_path / "template", (2, 4, 6, 8), "old")
    for name in ("tensorboard", "profile"):
        (tmp_path / "template" / name).mkdir()
        (tmp_path / "template" / name / "file").write_text(name)
    if disks == 2:
        monkeypatch.setattr(Path, "rename", rename_on_one_disk)
    make_run(tmp_path / "other", (3, 4, 5), "other")
    shutil.copytree(tmp_path / "template/checkpoints/step_00000004", tmp_path / "template/checkpoints/step_best")
    resume = {
        "own": "run/checkpoints/step_00000004",
        "own copy": "run/checkpoints/step_best",
        "other": "other/checkpoints/step_00000004",
    }
    config, run_dir = config_of(tmp_path / resume[source]), tmp_path / "run"
    left = [0]

    def killing(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    results = []
    for kill in range(100):
        shutil.rmtree(run_dir, ignore_errors=True)
        shutil.copytree(tmp_path / "template", run_dir)
        if disks == 2:
            shutil.rmtree(tmp_path / "disk", ignore_errors=True)
            shutil.move(run_dir / "checkpoints", tmp_path / "disk")
            (run_dir / "checkpoints").symlink_to(tmp_path / "disk")
        start = choose_start(config, run_dir)
        assert start.begins and start.checkpoint == (tmp_path / resume[source]).resolve()
        left[0], killed = kill, False
        with monkeypatch.context() as patch:
            for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "write_text"), (branch.os, "link")):
                patch.setattr(owner, name, killing(getattr(owner, name)))
            for name in ("copy2", "rmtree"):
                patch.setattr(branch.shutil, name, killing(getattr(shutil, name)))
            try:
                begin_line(run_dir, start.origin)
            except Killed:
                killed = True
        again = choose_start(config if then == "the same command" else config_of("auto"), run_dir)
        if again.begins:  # killed before anything was written: the start is made once more
            assert not (run_dir / "set_aside").exists()
            begin_line(run_dir, again.origin)
        elif read_origin(run_dir) is None:  # likewise; the old line goes on
            assert then == "auto" and again.checkpoint.name == "step_00000008" and not (run_dir / "set_aside").exists()
            continue
        else:
            assert again.checkpoint == run_dir / "checkpoints" / "step_00000004"
        results.append(tree(run_dir))
        if not killed:
            break
    assert not killed and len(results) > 5
    assert all(result == results[-1] for result in results)
    kept = [checkpoint_name(step) for step in ((4,) if source == "other" else (2, 4))]
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == kept
    aside = run_dir / "set_aside/1"
    moved = (2, 4, 6, 8) if source == "other" else (6, 8)
    assert [path.name for path in list_checkpoints(aside / "checkpoints")] == [checkpoint_name(step) for step in moved]
    assert (aside / "metrics.jsonl").read_text() == (tmp_path / "template/metrics.jsonl").read_text()
    origin = "other" if source == "other" else "template"
    assert (run_dir / "metrics.jsonl").read_text() == (tmp_path / origin / "metrics.jsonl").read_text()
    assert (run_dir / "checkpoints/step_best").exists()  # a copy is never moved
    assert (aside / "tensorboard/file").read_text() == "tensorboard" and not (run_dir / "tensorboard").exists()
    assert (aside / "profile/file").read_text() == "profile" and not (run_dir / "profile").exists()
    assert len(list((tmp_path / "other/checkpoints").iterdir())) == 3  # nor is anything of the other run


def test_the_line_is_known_again(tmp_path, monkeypatch):
    """Relative, with a slash, through a link, in a copy of the whole run, and when the other run's checkpoint is gone."""
    make_run(tmp_path / "run", (2, 4), "old")
    run_dir, given = tmp_path / "run", tmp_path / "run/checkpoints/step_00000002"
    begin_line(run_dir, choose_start(config_of(given), run_dir).origin)
    make_checkpoint(run_dir / "checkpoints" / checkpoint_name(3), 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to(run_dir)
    for same in (
        f"{given}/",
        "run/checkpoints/step_00000002",
        "link/checkpoints/step_00000002",
        "~/run/checkpoints/step_00000002",
    ):
        start = choose_start(config_of(same), run_dir)
        assert not start.begins and start.checkpoint.name == "step_00000003"
    assert choose_start(config_of("link"), run_dir).checkpoint.name == "step_00000003"  # the run itself: as auto
    shutil.copytree(run_dir, tmp_path / "copy")
    for same in (given, "copy/checkpoints/step_00000002"):
        assert not choose_start(config_of(same), tmp_path / "copy").begins
    changed = choose_start(config_of(given, lr=0.5), run_dir)
    assert changed.begins and changed.origin.set_aside == "set_aside/2"

    other = tmp_path / "branch"
    start = choose_start(config_of("copy"), other)  # a run: its newest checkpoint
    begin_line(other, start.origin)
    assert start.checkpoint.name == "step_00000003"
    make_checkpoint(tmp_path / "copy/checkpoints" / checkpoint_name(9), 9)  # the other run has gone on
    assert not choose_start(config_of("copy"), other).begins
    shutil.rmtree(tmp_path / "copy")
    assert choose_start(config_of("copy"), other).checkpoint == other / "checkpoints/step_00000003"
    with pytest.raises(
        CheckpointError, match=r"step_00000004 is not a whole checkpoint: there is no such folder; there is .*set_aside/1/"
    ):
        choose_start(config_of("run/checkpoints/step_00000004"), run_dir)
    with pytest.raises(CheckpointError, match=r"there is no such folder; beside it are step_00000003"):
        choose_start(config_of("branch/checkpoints/step_00000007"), tmp_path / "new")
    with pytest.raises(CheckpointError, match=r"a\*\*b is not a whole checkpoint: there is no such folder$"):
        choose_start(config_of("a**b"), run_dir)


def test_checkpoints_on_another_disk_are_set_aside_if_there_is_room(tmp_path, monkeypatch):
    other = Path("/dev/shm")
    if not os.access(other, os.W_OK) or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one disk")
    run_dir, disk = tmp_path / "run", other / f"checkpoints-{os.getpid()}"
    make_run(run_dir, (2, 4, 6), "old")
    shutil.move(run_dir / "checkpoints", disk)
    try:
        (run_dir / "checkpoints").symlink_to(disk)
        config = config_of(run_dir / "checkpoints/step_00000002")
        with monkeypatch.context() as patch:
            patch.setattr(branch.shutil, "disk_usage", lambda folder: namedtuple("Usage", "total used free")(100, 90, 10))
            with pytest.raises(
                CheckpointError, match=r"GB here, but only 1e-08 GB are free; free space, or choose another run\.dir$"
            ):
                choose_start(config, run_dir)
        assert not (run_dir / "origin.json").exists() and names(disk) == [checkpoint_name(step) for step in (2, 4, 6)]
        begin_line(run_dir, choose_start(config, run_dir).origin)
        assert names(disk) == [checkpoint_name(2)]
        aside = run_dir / "set_aside/1"
        assert names(aside / "checkpoints") == [checkpoint_name(4), checkpoint_name(6)]
        assert choose_start(config_of("auto"), aside).checkpoint == aside / "checkpoints" / checkpoint_name(6)
    finally:
        shutil.rmtree(disk)


MAPPINGS = (
    ("train", "average", {"kind": "ema", "decay": 0.5}, {"kind": "ema", "decay": 0.9}),
    ("train", "ramp", {"4": 16}, {"4": 16, "8": 32}),
    ("optimizer", "arguments", {"betas": [0.9, 0.99]}, {"betas": [0.9, 0.99], "eps": 1e-7}),
)


@pytest.mark.parametrize(("section", "option", "one", "two"), MAPPINGS)
def test_an_option_that_is_a_mapping_makes_another_branch(section, option, one, two, tmp_path):
    for number, (before, after) in enumerate(((None, one), (one, None), (one, two), (two, one))):
        run_dir = tmp_path / str(number)
        make_run(run_dir, (2, 4), "old")
        resume = {"checkpoint": {"resume": str(run_dir / "checkpoints/step_00000002")}}
        config = build(resume | {section: {option: before}})
        begin_line(run_dir, choose_start(config, run_dir).origin)
        assert not choose_start(config, run_dir).begins
        assert choose_start(build(resume | {section: {option: after}}), run_dir).begins


def test_a_line_of_another_version_is_known_again(tmp_path):
    """Its origin.json lacks options that came later, and has some that are gone."""
    make_run(tmp_path, (2, 4), "old")
    given = tmp_path / "checkpoints/step_00000002"
    begin_line(tmp_path, choose_start(config_of(given), tmp_path).origin)
    origin = json.loads((tmp_path / "origin.json").read_text())
    del origin["settings"]["optimizer.base_width"], origin["settings"]["train.average"]
    origin["settings"] |= {"optimizer.gone": 3, "train.steps": 7}
    (tmp_path / "origin.json").write_text(json.dumps(origin))
    assert not choose_start(config_of(given), tmp_path).begins
    assert choose_start(config_of(given, base_width=64), tmp_path).begins


def test_what_checkpoint_resume_may_mean(tmp_path):
    make_run(tmp_path / "a", (2, 4), "old")
    for word, meant in (
        ("latest", "auto continues from the newest checkpoint"),
        ("Auto", "auto continues from the newest checkpoint"),
        ("false", "never begins at step 0, in a folder that holds no run"),
    ):
        with pytest.raises(CheckpointError, match=rf"{word} is not a whole checkpoint: there is no such folder; {meant}$"):
            choose_start(config_of(word), tmp_path / "a")
    cooldown = build({"checkpoint": {"resume": "latest"}, "schedule": {"cooldown": 3, "kind": "constant"}})
    with pytest.raises(CheckpointError, match=r"no such folder; auto continues from the newest checkpoint$"):
        config_to_plan(cooldown, tmp_path / "a")
    folder = tmp_path / "a/checkpoints"
    with pytest.raises(
        CheckpointError, match=rf"; name a checkpoint in it, such as {folder}/step_00000004, or the run {folder.parent}$"
    ):
        choose_start(config_of(folder), tmp_path / "b")

    given, run_dir = folder / checkpoint_name(2), tmp_path / "b"
    begin_line(run_dir, choose_start(config_of(given), run_dir).origin)
    shutil.rmtree(run_dir / "checkpoints")
    message = f"{run_dir} began at {given}, but holds no checkpoint any more; choose another run.dir"
    for again in (f", and checkpoint.resume={given} to begin there again", ""):
        with pytest.raises(CheckpointError) as error:
            choose_start(config_of("auto"), run_dir)
        assert str(error.value) == message + again
        shutil.rmtree(given, ignore_errors=True)


@pytest.mark.parametrize("option", ["run.dir", "checkpoint.fallback_dir"])
@pytest.mark.parametrize("folder", ["checkpoints", "checkpoints/new", "checkpoints/step_00000002/new", "copy/new"])
def test_no_run_lies_among_checkpoints(folder, option, tmp_path):
    """They are deleted with all that is in them."""
    make_run(tmp_path, (2, 4), "old")
    shutil.copytree(tmp_path / "checkpoints/step_00000002", tmp_path / "copy")
    section, key = option.split(".")
    taken = tmp_path / folder.removesuffix("/new")
    with pytest.raises(ConfigError) as error:
        check_folders(build({section: {key: str(tmp_path / folder)}}))
    assert str(error.value) == (
        f"{option} {tmp_path / folder} is in {taken}, whose run deletes old checkpoints with all that is in them: name another "
        "folder; to resume from a checkpoint, use checkpoint.resume"
    )
    for good in (tmp_path, tmp_path / "set_aside/1", tmp_path / "new"):
        check_folders(build({section: {key: str(good)}}))


def test_no_run_lies_in_the_folder_of_its_data(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    run, mix = {"dir": str(tmp_path / "link")}, [{"dir": str(tmp_path / name), "weight": 1} for name in "ba"]
    for data in ({"dir": str(tmp_path / "a")}, {"mix": mix}):
        with pytest.raises(ConfigError, match=r"^run\.dir .*/link is the folder of the data: choose another run\.dir$"):
            check_folders(build({"run": run, "data": data}))
    check_folders(build({"run": run, "data": {"dir": str(tmp_path)}}))


def test_the_newest_checkpoint_by_name_is_no_branch(run):
    run("train.steps=6", "checkpoint.every=2")
    newest = run.tmp_path / "run/checkpoints/step_00000006"
    for steps in (8, 10):  # the second time 8 is newer, but it is the same command
        status, records, _ = run(f"train.steps={steps}", "checkpoint.every=2", f"checkpoint.resume={newest}")
        assert status == 0 and max(losses(records)) == steps
    assert not (run.tmp_path / "run/set_aside").exists() and newest.exists()


def clutter(folder, source):
    """What people leave beside checkpoints."""
    for name in ("step_best", "step_00000030_keep", "step_00000040 copy", "step_40", "step_000000040", "step_00000099"):
        shutil.copytree(source, folder / name)
    for name in ("step_", "step_00000098", "step_-0000001", "step_latest", "step_٠٠٠٠٠٠٩٩"):
        (folder / name).mkdir()
    (folder / "step_00000097").write_text("a file")
    (folder / ".step_notes").write_text("mine")
    (folder / "step_00000096").symlink_to(source)
    (folder / "latest").symlink_to(source)
    return set(names(folder))


def test_what_is_no_checkpoint_harms_nothing_and_stays(tmp_path):
    for step in (30, 40):
        make_checkpoint(tmp_path / checkpoint_name(step), step)
    there = clutter(tmp_path, tmp_path / checkpoint_name(30))
    newest, problems = find_checkpoint(tmp_path)
    assert newest == tmp_path / checkpoint_name(40)
    assert len(problems) == 1 and "step_00000099 is a copy of step 30" in problems[0]
    assert surplus(newest, Checkpoint(keep=1)) == [tmp_path / checkpoint_name(30)]
    publish.remove_leftovers(tmp_path)
    assert set(names(tmp_path)) == there


def test_large_steps_are_ordered_by_number(tmp_path):
    for step in (99_999_999, 100_000_000):
        make_checkpoint(tmp_path / checkpoint_name(step), step)
    assert [step_of(path) for path in list_checkpoints(tmp_path)] == [99_999_999, 100_000_000]


def test_a_run_with_copies_alone_is_not_started_anew(tmp_path):
    make_run(tmp_path, (2,), "old")
    (tmp_path / "checkpoints/step_00000002").rename(tmp_path / "checkpoints/step_mine")
    with pytest.raises(CheckpointError, match="holds no step_<digits>, but step_mine: name one"):
        choose_start(config_of("auto"), tmp_path)
    assert choose_start(config_of(tmp_path / "checkpoints/step_mine"), tmp_path).begins


@pytest.mark.parametrize("gone", ["empty", "missing"])
def test_a_run_whose_checkpoints_are_gone_is_not_started_anew(tmp_path, gone):
    """As where their disk is not mounted. Before the first checkpoint a run begins anew."""
    make_run(tmp_path, (2, 4), "old")
    (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
    if gone == "empty":
        (tmp_path / "checkpoints").mkdir()
    events = tmp_path / "events.jsonl"
    for saved in ("", '{"event": "checkpoint", "step": 2, "error": "no space left"}\n'):
        events.write_text('{"event": "start", "step": 0}\n' + saved)
        assert choose_start(config_of("auto"), tmp_path).checkpoint is None
    events.write_text('{"event": "start", "step": 0}\n{"event": "checkpoint", "step": 2}\n{"event": "checkpoint", "step": 4}\n')
    with pytest.raises(CheckpointError, match=r"saved a checkpoint of step 4 .* holds none now: mount it or bring it back"):
        choose_start(config_of("auto"), tmp_path)
    (tmp_path / "checkpoints").rmdir() if gone == "empty" else None
    (tmp_path / "elsewhere").rename(tmp_path / "checkpoints")
    assert choose_start(config_of("auto"), tmp_path).checkpoint == tmp_path / "checkpoints" / checkpoint_name(4)


def test_what_is_kept(tmp_path):
    settings = {"config": {"checkpoint": {"keep_every": 20}}}
    values = {10: 3.0, 20: 2.0, 30: 1.0, 40: 1.5, 50: None, 60: 0.5, 70: 4.0}
    for step, loss in values.items():
        evaluated = 55 if step == 60 else step  # the loss that 60 knows is not its own
        make_checkpoint(
            tmp_path / checkpoint_name(step), step, val_loss=loss, evaluated=evaluated, **settings if step == 20 else {}
        )
    make_checkpoint(tmp_path / checkpoint_name(80), 80)  # beyond: of another line

    def kept(origin=None, **options):
        gone = surplus(tmp_path / checkpoint_name(70), Checkpoint(**options), origin)
        return [step for step in (*values, 80) if tmp_path / checkpoint_name(step) not in gone]

    assert kept(keep=2) == [20, 60, 70, 80]  # 20 was a milestone when it was written
    assert kept(keep=1, keep_every=30) == [20, 30, 60, 70, 80]
    assert kept(keep=1, keep_best=True) == [20, 30, 70, 80]
    assert kept(keep=1, origin=40) == [20, 40, 70, 80]


def test_milestones_and_the_best_are_saved_though_no_checkpoint_is_due(run):
    """No learning after step 2, so that evaluation 2 is the best; `every` comes to none of these steps."""
    options = ["train.steps=9", "eval.every=1", "schedule.kind=constant", "checkpoint.every=0", "checkpoint.keep=1"]
    status, records, _ = run(*options, "optimizer.lr=0.3", "checkpoint.keep_best=true", "checkpoint.keep_every=4")
    measured = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
    best = min(measured, key=measured.get)
    assert status == 0
    assert names(run.tmp_path / "run/checkpoints") == [checkpoint_name(step) for step in sorted({best, 4, 8, 9})]
    state = json.loads((run.tmp_path / "run/checkpoints" / checkpoint_name(best) / "state.json").read_text())
    assert state["best_loss"] == state["val_loss"] == measured[best]


def test_files_have_the_usual_permissions(run):
    from launch.checkpoint.export import export

    before = os.umask(0o027)
    try:
        assert run("train.steps=3")[0] == 0
        export(run.tmp_path / "run", run.tmp_path / "exported")
    finally:
        os.umask(before)
    files = [path for top in ("run", "exported") for path in (run.tmp_path / top).rglob("*") if path.is_file()]
    assert len(files) > 12
    assert {(path.name, oct(path.stat().st_mode & 0o777)) for path in files} == {(path.name, "0o640") for path in files}
