"""What a run logs: the mean of the window, exact across a resume; evaluations; trackers without phantom runs or repeats."""

import errno
import importlib.machinery
import itertools
import json
import math
import shutil
import sys
import types

import pytest
from accelerate import Accelerator
from stopping import StopIn

from configs.load import ConfigError, build
from launch.monitoring.metrics import Metrics
from launch.monitoring.signals import STOPPED
from launch.monitoring.trackers import require_installed
from launch.run.state import RunState, from_saved

CLOCK = ("seconds", "tokens_per_second", "optimizer_seconds")


def without_clock(records):
    return [{key: value for key, value in record.items() if key not in CLOCK} for record in records]


def test_the_logged_loss_is_the_mean_of_the_window_also_after_a_resume(run):
    """Over 30 steps, which hold the shorter last sequence of an epoch: the steps weigh as much as they have targets."""
    options = ["train.steps=30", "train.batch_size=16", "eval.every=0", "checkpoint.every=7", "model.dropout=0.1"]
    single = run(*options, "log.every=1", folder="single")[1]
    steps = [r for r in single if "loss" in r]
    assert all(r["loss"] == r["step_loss"] for r in steps)
    _, whole, _ = run(*options, "log.every=9", folder="whole")
    for step in (5, 20):
        assert run(*options, "log.every=9", hooks=StopIn(step))[0] == STOPPED
    status, parts, _ = run(*options, "log.every=9")
    assert status == 0 and without_clock(parts) == without_clock(whole)
    tokens = [0, *(r["tokens"] for r in steps)]
    sizes = [after - before for before, after in itertools.pairwise(tokens)]
    assert len(set(sizes)) > 1
    logged = [r for r in whole if "loss" in r]
    assert [r["step"] for r in logged] == [1, *range(9, 30, 9), 30]
    for before, record in zip([{"step": 0}, *logged], logged, strict=False):
        window = range(before["step"], record["step"])
        mean = sum(steps[i]["loss"] * sizes[i] for i in window) / sum(sizes[i] for i in window)
        assert record["loss"] == pytest.approx(mean, rel=1e-12)
        assert record["step_loss"] == steps[record["step"] - 1]["loss"]
        assert record["adamw_lr"] == pytest.approx(2 * record["lr"])


def test_steps_that_were_skipped_are_not_in_the_mean():
    state = RunState()
    for tokens, loss in ((10, None), (10, 3.0), (30, 5.0)):
        state.finish_step(1, tokens, 1.0)
        state.learn(tokens, loss)
    assert state.bad_steps == 1
    assert state.window_loss == pytest.approx(4.5) and (state.step, state.tokens) == (3, 50)
    state.begin_window()
    state.learn(7, 0.1)
    assert state.window_loss == 0.1  # exactly
    earlier = {"step": 4, "tokens": 9, "seconds": 1.0, "evaluated": 3, "bad_steps": 0, "rollbacks": 0, "skipped": []}
    earlier |= {"tracker_ids": {}, "config": {"train": {"batch_size": 2}}}
    assert from_saved(earlier) == RunState(
        step=4, sequences=8, tokens=9, seconds=1.0, evaluated=3
    )  # a checkpoint of an earlier version


@pytest.mark.parametrize(
    ("name", "route", "rest"), [("adafactor", "null", 5e-3), ("celo2-base", "null", 5e-3), ("adafactor", "hidden", 1e-2)]
)
def test_the_logged_rates_are_those_that_parameters_have(run, name, route, rest):
    """The file says adamw_lr 1e-2, which an optimizer that updates everything at one rate passes over."""
    _, records, _ = run(
        "train.steps=1",
        "eval.every=0",
        "schedule.kind=constant",
        "schedule.warmup=0",
        f"optimizer.name={name}",
        f"optimizer.route={route}",
    )
    assert [(r["lr"], r["adamw_lr"]) for r in records if "lr" in r] == [(5e-3, rest)]


def test_evaluations_have_perplexity_and_bits_per_byte(run):
    """A token of this data is a byte or, at the end of a document, nothing."""
    _, records, _ = run("eval.sequences=1000")
    evaluations = [r for r in records if "val_loss" in r]
    assert len(evaluations) == 2
    for r in evaluations:
        assert r["val_perplexity"] == pytest.approx(math.exp(r["val_loss"]))
        assert r["val_bits_per_byte"] == pytest.approx(r["val_loss"] / math.log(2) * 6642 / (6642 - 6), rel=1e-12)


def test_events_say_how_a_start_ended(run):
    def last():
        return json.loads((run.tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])

    run(hooks=StopIn(2))
    assert (last()["event"], last()["reason"], last()["step"]) == ("stopped", "signal", 2)
    run()
    assert (last()["event"], last()["step"]) == ("finished", 6)
    status, _, _ = run()  # it is finished already
    assert status == 0 and last()["event"] == "finished" and "a sample of at most 8 tokens" in run.out


def test_tensorboard_has_one_folder_and_each_step_once(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["log.trackers=[tensorboard]", "log.sample_tokens=0"]
    assert run(*options)[0] == 0
    folder = run.tmp_path / "run"
    shutil.rmtree(folder / "checkpoints" / "step_00000006")  # as after a kill before it was written
    assert run(*options)[0] == 0
    files = list(folder.rglob("*tfevents*"))
    assert len(files) == 2 and {path.parent for path in files} == {folder / "tensorboard"}
    found = EventAccumulator(str(folder / "tensorboard")).Reload()
    for key, steps in (("loss", [1, 2, 3, 4, 5, 6]), ("val_loss", [3, 6]), ("adamw_lr", [1, 2, 3, 4, 5, 6])):
        assert [event.step for event in found.Scalars(key)] == steps


def test_tensorboard_has_each_line_as_a_run_of_its_own(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["log.trackers=[tensorboard]", "log.sample_tokens=0", "eval.every=0"]
    folder = run.tmp_path / "run"
    assert run(*options)[0] == 0
    assert (
        run(*options, "train.steps=5", f"checkpoint.resume={folder / 'checkpoints/step_00000003'}", "optimizer.lr=1e-3")[0] == 0
    )
    for line, steps in ((folder / "set_aside/1", [1, 2, 3, 4, 5, 6]), (folder, [4, 5])):
        found = EventAccumulator(str(line / "tensorboard")).Reload()
        assert [event.step for event in found.Scalars("loss")] == steps


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package wandb that notes what it gets."""
    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.starts, module.error = [], None

    class Run:
        def __init__(self, options):
            self.options, self.logged, self.finished = options, [], 0

        def log(self, values, step):
            if module.error:
                raise module.error
            self.logged.append((step, values))

        def finish(self):
            self.finished += 1

    def init(**options):
        module.starts.append(Run(options))
        return module.starts[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: True)
    return module


def test_wandb_gets_one_run_for_all_starts(run, wandb):
    options = ["log.trackers=[wandb]", "log.project=mine", "log.group=sweep", "log.sample_tokens=0"]
    assert run(*options)[0] == 0
    shutil.rmtree(run.tmp_path / "run" / "checkpoints" / "step_00000006")
    assert run(*options, "train.steps=8")[0] == 0
    assert run(*options, folder="other")[0] == 0
    first, second, other = wandb.starts
    assert (first.options["project"], first.options["group"], first.options["name"]) == ("mine", "sweep", "test")
    assert first.options["id"] == second.options["id"] != other.options["id"] and second.options["resume"] == "allow"
    assert [step for step, values in first.logged if "loss" in values] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in second.logged] == [7, 8, 8]  # steps 4 to 6 were done again, and are there already
    assert [r.finished for r in wandb.starts] == [1, 1, 1]
    wandb.error = ConnectionError("the network is gone")
    assert run(*options, folder="offline")[0] == 0
    assert "warning: wandb gets no more numbers: the network is gone" in run.out


def test_a_tracker_that_does_not_start_is_one_line(run, wandb):
    def init(**_):
        raise ValueError("api_key not configured\nrun wandb login")

    wandb.init = init
    status, _, err = run("log.trackers=[wandb]")
    assert status == 2 and err == "error: log.trackers: wandb does not start: api_key not configured run wandb login\n"


def test_a_full_disk_delays_tensorboard(run, tmp_path, monkeypatch):
    """What does not fit waits, and nothing is lost or doubled; the run is told once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from launch.monitoring import growing

    state = {"writes": 0}

    class Full:
        """The file of events, whose disk takes half a record in the third to fifth write, and nothing more."""

        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            state["writes"] += 1
            if 3 <= state["writes"] <= 8:
                if state["writes"] % 2 == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                return self.file.write(data[: len(data) // 2])
            return self.file.write(data)

    def opening(path, *args, **kwargs):
        file = open(path, *args, **kwargs)  # noqa: SIM115
        return Full(file) if "tfevents" in str(path) and kwargs.get("buffering") == 0 else file

    monkeypatch.setattr(growing, "open", opening, raising=False)
    assert run("log.trackers=[tensorboard]", "log.sample_tokens=0")[0] == 0
    assert (
        run.out.count("cannot be written (No space left on device); the run continues and keeps its numbers in memory until") == 1
    )
    assert run.out.count("can be written again; nothing is lost") == 1
    found = EventAccumulator(str(run.tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


class FakeService:
    """A stand-in for the packages mlflow, comet_ml, trackio and aim, as far as Accelerate calls them."""

    def __init__(self, name):
        self.name, self.started, self.logged, self.tags, self.parameters, self.ended = name, [], [], [], [], 0
        self.error = None

    def take(self, values, step):
        if self.error:
            raise self.error
        self.logged.append((step, dict(values)))

    def end(self, *_):
        self.ended += 1

    def module(self):
        module = types.ModuleType(self.name)
        module.__spec__, module.__version__ = importlib.machinery.ModuleSpec(self.name, None), "3.50.0"
        service = self

        def start(**options):
            service.started.append(options)
            info = types.SimpleNamespace(run_id=options.get("run_id") or "known")
            run = types.SimpleNamespace(info=info, hash=options.get("run_hash") or "known", end=service.end, close=service.end)
            run.finish, run.add_tag, run.set_name, run.set_step = service.end, service.tags.append, lambda _: None, lambda _: None
            run.log = run.log_metrics = service.take
            run.log_metric = run.track = lambda *a, step, **k: service.take({k.get("name", a[0]): a[-1]}, step)
            run.log_parameters = service.parameters.append
            return run

        class Aim:
            def __new__(cls, **options):
                run = start(**options)
                return type("Run", (types.SimpleNamespace,), {"__setitem__": lambda s, _, v: service.parameters.append(v)})(
                    **vars(run)
                )

        module.search_experiments, module.create_experiment = lambda filter_string: [], lambda **_: "1"
        module.start_run = module.start = module.init = start
        module.log_metrics, module.log_params, module.end_run = service.take, service.parameters.append, service.end
        limits = types.SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        module.utils = types.SimpleNamespace(validation=limits)
        module.config = types.SimpleNamespace(update=lambda values, **_: service.parameters.append(values))
        module.Run = Aim
        return module


@pytest.mark.parametrize("name", ["mlflow", "comet_ml", "trackio", "aim"])
def test_trackers_of_accelerate_get_one_run_for_all_starts(name, tmp_path, monkeypatch):
    """Without the loop: it gives every tracker the same calls as W&B."""
    service, said = FakeService(name), []
    monkeypatch.setitem(sys.modules, name, service.module())
    monkeypatch.setattr(f"accelerate.utils.is_{name}_available", lambda: True)
    config = build({"run": {"name": "test"}, "log": {"trackers": [name], "project": "mine", "group": "sweep"}})
    accelerator = Accelerator(cpu=True)
    for steps in ((1, 2, 3), (3, 4)):  # the second start does step 3 again
        with Metrics(accelerator, config, tmp_path, said.append) as metrics:
            metrics.rewind(steps[0] - 1, 0)
            for step in steps:
                metrics.write({"step": step, "tokens": 10 * step, "loss": 1.5})
    assert [step for step, values in service.logged if "loss" in values] == [1, 2, 3, 4] and not said
    assert service.ended == 2 and len(service.started) == 2 and len(service.parameters) >= 1
    identity = {"mlflow": "run_id", "comet_ml": "experiment_key", "trackio": "name", "aim": "run_hash"}[name]
    assert service.started[1][identity] == json.loads((tmp_path / f"{name}.json").read_text())["id"]
    assert "sweep" in str(service.started) + str(service.tags)
    service.error = ConnectionError("the network is gone")
    with Metrics(accelerator, config, tmp_path, said.append) as metrics:
        metrics.rewind(4, 0)
        metrics.write({"step": 5, "loss": 1.5})
    assert said == [f"warning: {name} gets no more numbers: the network is gone"]
    monkeypatch.setattr(f"accelerate.utils.is_{name}_available", lambda: False)
    with pytest.raises(ConfigError, match=f"log.trackers asks for {name}, which is not installed"):
        require_installed(config)


def test_an_error_is_the_last_event(tmp_path):
    from configs.schema import Config

    device = types.SimpleNamespace(is_main_process=True)
    with pytest.raises(OSError), Metrics(device, Config(), tmp_path):
        raise OSError("the disk is gone")
    (event,) = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert (event["event"], event["reason"], event["error"]) == ("stopped", "error", "the disk is gone")
