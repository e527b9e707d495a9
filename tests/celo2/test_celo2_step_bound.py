"""The bound of step sizes in meta-training: what `rule.step_bound` means, and what is refused."""

from dataclasses import replace

import pytest
from test_celo2_metatrain import data, digits  # noqa: F401
from test_celo2_metatrain_cli import TINY

from celo2 import load_rule, save_rule
from celo2.metatrain.config import ConfigError, load_config
from celo2.metatrain.train import PESTraining


def test_the_rule_of_a_run_has_its_bound_of_step_sizes(digits, tmp_path):  # noqa: F811
    """That of `rule.step_bound`, else that of `rule.init`; the first rule of a run may have no step sizes yet."""
    path = tmp_path / "c.yaml"
    path.write_text(TINY)
    save_rule(replace(load_rule("hand-agreement"), step_bound=1.5), tmp_path / "start.safetensors")
    trained, start = ["rule.step_sizes=true", "rule.init_noise=0"], f"rule.init={tmp_path}/start.safetensors"
    for changes, bound in (
        ([start], 1.5),
        ([start, "rule.step_bound=2"], 2),
        ([start, *trained], 1.5),
        (["rule.init=hand-nesterov", "rule.step_bound=1", *trained], 1),
        (["rule.init=hand-nesterov", "rule.step_bound=0.5", *trained], 0.5),
    ):
        training = PESTraining(load_config(path, changes), digits)
        save_rule(training.rule(), tmp_path / "first.safetensors")
        training.step()
        save_rule(training.rule(), tmp_path / "rule.safetensors")
        assert load_rule(tmp_path / "rule.safetensors") == training.rule()
        assert load_rule(tmp_path / "rule.safetensors").step_bound == bound


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["rule.step_bound=1"], "rule.step_bound is 1.0, expected null: the rule has no step sizes"),
        (["rule.init=hand-nesterov", "rule.step_bound=1"], "rule.step_bound is 1.0, expected null: the rule has no step sizes"),
        (["rule.init=hand-agreement", "rule.step_bound=0"], "rule.step_bound is 0.0, expected at least 0.001"),
        (["rule.init=hand-agreement", "rule.step_bound=.nan"], "rule.step_bound is nan, expected at least 0.001"),
    ],
)
def test_a_bound_that_cannot_be_is_an_error(changes, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(TINY)
    with pytest.raises(ConfigError, match=message):
        load_config(path, changes)
