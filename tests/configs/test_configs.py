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
            "optimizer.name is 'celo', expected one of celo2, celo2-base, adamw, muon, lion, soap, adafactor, schedule-free; "
            "did you mean 'celo2'?",
        ),
        ("train.compile=1", "train.compile is 1, expected bool"),
        ("train.steps=true", "train.steps is True, expected int"),
        ("log.trackers=wandb", "log.trackers is 'wandb', expected a list"),
        ("log.trackers=[mlflow]", "log.trackers[0] is 'mlflow', expected one of tensorboard, wandb"),
        ("train=3", "'train' is a section"),
        ("train.steps.x=3", "'train.steps.x=3': 'steps' is a value"),
        ("schedule.warmup=2", "schedule.warmup is 2.0, expected a fraction"),
        ("optimizer.lr=nan", "optimizer.lr is nan, expected at least 0"),
        ("optimizer.adamw_lr=-1", "optimizer.adamw_lr is -1.0, expected at least 0"),
        ("train.steps", "'train.steps': expected section.key=value"),
        ("=3", "'=3': expected section.key=value"),
        ("run.name=[", "the value is not YAML"),
        ("distributed.strategy=zero9", "expected one of ddp, zero1, zero2, zero3, fsdp2"),
    ],
)
def test_mistakes_are_named(file, override, message):
    with pytest.raises(ConfigError) as error:
        load_config(file, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_configuration(tmp_path):
    for text, message in (("- a\n", "found a list"), ("a: [\n", "not YAML")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_config(tmp_path / "bad.yaml")
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
