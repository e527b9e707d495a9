"""Configurations: types, overrides, and what a person is told about a mistake."""

from dataclasses import asdict
from pathlib import Path

import pytest

from configs.load import ConfigError, load_config, options, to_yaml
from configs.schema import Config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 5}\noptimizer: {lr: 3e-4}\n")
    return path


def test_file_then_overrides_then_defaults(file):
    config = load_config(file, ["train.batch_size=4", "run.name=x", "model.hf.model_type=qwen3", "log.trackers=[tensorboard]"])
    assert (config.train.steps, config.train.batch_size, config.optimizer.lr) == (5, 4, 3e-4)
    assert config.model.hf == {"model_type": "qwen3"}
    assert config.log.trackers == ["tensorboard"]
    assert config.train.grad_clip == Config().train.grad_clip


def test_empty_file_and_empty_section_are_the_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    for text in ("", "train:\n"):
        path.write_text(text)
        assert load_config(path) == Config()


def test_resolved_configuration_reads_back(file, tmp_path):
    config = load_config(file, ["model.hf={model_type: qwen3, hidden_size: 64}"])
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.step=3", "unknown key 'train.step'; did you mean 'train.steps'?"),
        ("trian.steps=3", "unknown key 'trian'; did you mean 'train'?"),
        ("steps=4", "unknown key 'steps'; did you mean 'train.steps'?"),
        ("train.steps=abc", "train.steps is 'abc', expected int"),
        ("train.steps=1.5", "train.steps is 1.5, expected int"),
        ("train.steps=0", "train.steps is 0, expected at least 1"),
        ("run.seed=-1", "run.seed is -1, expected between 0 and 4294967295"),
        ("distributed.replicas=0", "distributed.replicas is 0, expected at least 1"),
        ("distributed.timeout=0", "distributed.timeout is 0.0, expected above 0"),
        ("train.steps=", "train.steps is None, expected int"),
        (
            "optimizer.name=celo",
            "optimizer.name is 'celo', expected one of celo2, celo2-base, adamw, muon, lion, soap, adafactor, schedule-free, "
            "normuon, ademamix, mars, kron, scion; did you mean 'celo2'?",
        ),
        ("train.compile=1", "train.compile is 1, expected bool"),
        ("train.steps=true", "train.steps is True, expected int"),
        ("log.trackers=wandb", "log.trackers is 'wandb', expected a list"),
        (
            "log.trackers=[comet]",
            "log.trackers[0] is 'comet', expected one of tensorboard, wandb, mlflow, comet_ml, trackio",
        ),
        ("train=3", "'train' is a section"),
        ("train.steps.x=3", "'train.steps.x=3': 'steps' is a value"),
        ("schedule.warmup=2", "schedule.warmup is 2.0, expected a fraction"),
        ("optimizer.lr=nan", "optimizer.lr is nan, expected at least 0"),
        ("optimizer.adamw_lr=-1", "optimizer.adamw_lr is -1.0, expected at least 0"),
        ("train.steps", "'train.steps': expected section.key=value"),
        ("=3", "'=3': expected section.key=value"),
        ("model.hf=[", "the value: not YAML"),
        ("model.hf={a: 1, a: 2}", "'a' is set twice"),
        ("train.steps==5", "one = is enough"),
        ("train.steps:5", "write train.steps=5"),
        ("train.steps: 5", "write train.steps=5"),
        ("train.steps", "write train.steps=VALUE, without spaces"),
        ("", "'': expected section.key=value"),
        # Bytes of the command line that are not UTF-8 are surrogates in Python.
        (
            "run.dir=/lat\udce9/r",
            "'run.dir=/lat\\xe9/r': not UTF-8 text; rename such a file or folder, or name it by a link",
        ),
        ("log.trackers=[\udcff]", "'log.trackers=[\\xff]': not UTF-8 text"),
        ("train.steps=1e400", "expected int"),
        ("train.steps=" + "9" * 5000, "expected int"),
        ("train.steps=12:30", "train.steps is '12:30', expected int"),
        ("train.steps='5'", "train.steps is '5', expected int"),
        ("train.compile=maybe", "train.compile is 'maybe', expected bool"),
        ("distributed.timeout=.inf", "distributed.timeout is inf, expected above 0 and at most 31536000"),
        ("distributed.timeout=12:30", "distributed.timeout is '12:30', expected a number"),
        ("optimizer.lr=.inf", "optimizer.lr is inf, expected a finite number"),
        (f"optimizer.lr={10**400}", "optimizer.lr is inf, expected a finite number"),
        (f"log.every={10**400}", f"log.every is 1{76 * '0'}..., expected a finite number"),
        ("optimizer.lr=.nan", "optimizer.lr is nan, expected at least 0"),
        ("model.context=0", "model.context is 0, expected at least 1"),
        ("model.dropout=1", "model.dropout is 1.0, expected in [0, 1)"),
        ("run.name=", "run.name is '', expected some text"),
        ("run.dir=~nobody-of-this-name/x", "run.dir is '~nobody-of-this-name/x', but there is no such user"),
        ("run.seed=20261125123456", "expected between 0 and 4294967295"),
        ("log.trackers=null", "log.trackers is None, expected a list: log.trackers='[]'"),
        ("train.ramp={on: 64}", "train.ramp has the key on: write 'on' in quotes"),
        ("eval.sets={no: a}", "eval.sets has the key no: write 'no' in quotes"),
        ("train.ramp={'on': 64}", "train.ramp has the key 'on', expected a step from which on a batch size holds"),
        ("train.ramp={4: 8, 4.0: 16}", "train.ramp has the key 4.0 twice, in two forms"),
        ("train.ramp={4: 8, '04': 16}", "train.ramp has the key 4 twice"),
        ("train.ramp={1.5: 8}", "train.ramp has the key 1.5, expected a step from which on a batch size holds"),
        ("train.ramp={4: 8.5}", "train.ramp.4 is 8.5, expected a number of sequences, 1 or above"),
        ("train.average={kind: [ema]}", "train.average.kind is ['ema'], expected one of ema, tail"),
        ("log.trackers=wandb,tensorboard", "expected a list: log.trackers='[wandb, tensorboard]'"),
        ("model.hf=llama", "expected a mapping, such as {key: value}"),
        ("model.hf={tie_word_embeddings: no}", "model.hf.tie_word_embeddings is no: write true or false"),
        (
            "eval=false",
            "'eval' is a section: set its keys (eval.every, sequences, sets, tasks, lm_eval, lm_eval_include, tasks_every, "
            "task_examples), found False",
        ),
        ("eval=null", "'eval' is a section"),
        ("optimizer.colour=1", "unknown key 'optimizer.colour'; known here: optimizer.name, "),
        ("train.batch=1", "did you mean 'train.batch_size'?"),
        ("distributed.strategy=zero9", "expected one of ddp, zero1, zero2, zero3, fsdp2"),
    ],
)
def test_mistakes_are_named(file, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(file, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        *((f"run.name={text}", text) for text in ("1.10", "007", "12:30", "1e3", "yes", "2026-11-25", "0x1f", "1_000", "null")),
        *((f"run.name={text}", text) for text in ("[a", "a: b", "# a", "*a", "- a", "'tis", "{x", "true", ".inf", "é")),
        ("run.name='quoted'", "quoted"),
        ('log.sample_prompt="= 1"', "= 1"),
        ("log.sample_prompt=def f(x): # a", "def f(x): # a"),
        ("log.sample_prompt=def ", "def "),
        ("log.sample_prompt=", ""),
        ("optimizer.rule=null", None),
        ("run.dir=", None),
        *((f"train.steps={text}", 1000) for text in ("1e3", "1000.0", "1_000", "0x3e8", "0o1750", "001000", "+1000")),
        *((f"optimizer.lr={text}", 1e-8) for text in ("1e-8", "1E-8", "1.e-8", "+.1e-7", "0.00000001")),
        *((f"train.compile={text}", True) for text in ("true", "True", "yes", "on")),
        (
            "optimizer.arguments={eps: 1e-8, betas: [9e-1, 1.0], k: {e: 1e6, n: null, t: '1e6', s: 1:30}}",
            {"eps": 1e-8, "betas": [0.9, 1.0], "k": {"e": 1e6, "n": None, "t": "1e6", "s": "1:30"}},
        ),
        ("model.hf.rope_theta=1e6", {"rope_theta": 1e6}),
    ],
)
def test_values_are_what_was_written(file, tmp_path, override, value):
    """On the command line, in a file, and in the resolved file that a training run writes."""
    section, key = override.partition("=")[0].split(".")[:2]
    config = load_config(file, [override])
    found = getattr(getattr(config, section), key)
    assert found == value and type(found) is type(value)
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


def test_utf_8_of_a_command_line_in_another_locale(file):
    assert load_config(file, ["run.dir=caf\udcc3\udca9"]).run.dir == "café"


def test_values_of_a_file(tmp_path):
    """Text without quotes, anchors and merge keys, a byte order mark, and sections given twice by different spellings."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "\ufeff---\nrun: {name: 1.10, dir: 12:30}\nmodel:\n  hf: &a {rms_norm_eps: 1e-6, x: 007}\n"
        "optimizer:\n  arguments: {<<: *a, x: 2}\ntrain.steps: 1e3\ntrain: {batch_size: 4}\n"
    )
    config = load_config(path)
    assert (config.run.name, config.run.dir, config.train.steps, config.train.batch_size) == ("1.10", "12:30", 1000, 4)
    assert config.model.hf == {"rms_norm_eps": 1e-6, "x": 7} and config.optimizer.arguments == {"rms_norm_eps": 1e-6, "x": 2}
    assert load_config(path, ["train={steps: 3}"]).train.batch_size == 4  # a section adds to the file's


def test_paths_begin_at_home(file, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["run.dir=~/run", "data.dir=~/data", "optimizer.rule=~/a.safetensors", "checkpoint.resume=~/run/checkpoints/step_1"]
    config = load_config(file, given)
    found = (config.run.dir, config.data.dir, config.optimizer.rule, config.checkpoint.resume)
    assert found == tuple(word.partition("=")[2].replace("~", "/home/me") for word in given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"- a\n", "found a list"),
        (b"word\n", "found a single value"),
        (b"a: [\n", "not YAML"),
        (b"train:\n  steps: 4\ntrain:\n  grad_clip: 0.5\n", "line 3: 'train' is set twice, first in line 1"),
        (b"train: {steps: 4}\ntrain.steps: 5\n", "'train.steps' is set twice"),
        (b"run: {name: a}\n---\nrun: {name: b}\n", "line 2: a second document begins"),
        (b"train:\n\tsteps: 4\n", "line 2: a tab at the start of the line"),
        (b"run: {name: !!str a}\ntrain: {steps: !!int 4}\n", "line 2: the tag"),
        (b"model: {hf: &a {b: *a}}\n", "line 1: an alias refers to a value that contains the alias"),
        (b"eval: false\n", "'eval' is a section"),
        (b"[" * 5000, "nested too deeply"),
        (b"model: {hf: " + b"[" * 150 + b"]" * 150 + b"}", "expected a mapping"),
        ("run: {name: é}".encode("latin-1"), "not UTF-8"),
        (b"a: \x00", "not YAML"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_bytes(text)
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "bad.yaml")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_step_of_the_ramp_may_be_written_as_a_power_of_ten(file):
    config = load_config(file, ["train.ramp={1e3: 16, 4: 1e1}"])
    assert config.train.ramp == {4: 10, 1000: 16} and all(type(n) is int for pair in config.train.ramp.items() for n in pair)


def test_tasks_between_evaluations_that_are_not_made(file):
    with pytest.raises(ConfigError) as error:
        load_config(file, ["eval.every=0", "eval.tasks_every=12"])
    assert str(error.value) == (
        "eval.tasks_every is 12, but eval.every is 0: tasks are part of an evaluation, and the only one is at the end; "
        "set eval.every, or leave eval.tasks_every out"
    )


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot read configuration .*missing\.yaml"):
        load_config(tmp_path / "missing.yaml")


def test_shipped_files_load():
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    assert {"demo", "gpt3_125m", "gpt3_350m", "gpt3_760m", "gpt3_1.3b"} <= {path.stem for path in paths}
    for path in paths:
        assert load_config(path).run.name == path.stem


def test_every_option_is_documented():
    listed = {name for name, _, _ in options()}
    assert listed == {f"{section}.{key}" for section, keys in asdict(Config()).items() for key in keys}
    assert all(doc for _, _, doc in options())
