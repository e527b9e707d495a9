"""Variables of launchers: what is missing, left over or contradicts the configuration is one line."""

import os

import pytest

from configs.load import ConfigError
from configs.schema import Config, Train
from launch.distributed.environment import check_environment

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """environment({name: value}) sets these and no others."""

    def set_to(variables):
        for name in [*TORCHRUN, "ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"]:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("variables", "processes"),
    [
        ({}, 1),
        (TORCHRUN, 2),
        ({"MASTER_ADDR": "a", "MASTER_PORT": "1"}, 1),  # some clusters set them everywhere
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}, 1),  # as accelerate.yaml has it
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, 1),
    ],
)
def test_what_is_accepted(environment, variables, processes):
    environment(variables)
    assert check_environment(Config(train=Train(precision="bf16"))) == processes


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE, but no value of RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": ""}, "no value of RANK, LOCAL_RANK, WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "unset LOCAL_RANK"),
        ({"RANK": "0"}, "unset RANK"),
        (TORCHRUN | {"MASTER_PORT": ""}, "no value of MASTER_PORT"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 in the environment is not a port"),
        (TORCHRUN | {"RANK": "2"}, "RANK=2, LOCAL_RANK=1 and WORLD_SIZE=2"),
        (TORCHRUN | {"RANK": "-1"}, "RANK=-1"),
        (TORCHRUN | {"LOCAL_RANK": "3"}, "LOCAL_RANK=3"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment is not a whole number"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed precision bf16 (ACCELERATE_MIXED_PRECISION)"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "choose with train.precision, which is fp32"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "choose with train.compile, which is False"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "train.micro_batch_size"),
        ({"ACCELERATE_USE_FSDP": "true"}, "to use FSDP"),
        ({"ACCELERATE_USE_DEEPSPEED": "1"}, "choose with distributed.strategy, which is ddp"),
        ({"ACCELERATE_TORCH_DEVICE": "cpu"}, "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_what_is_refused(environment, variables, message):
    environment(variables)
    with pytest.raises(ConfigError) as error:
        check_environment(Config())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_run_leaves_no_variable_of_a_launcher(run, environment):
    """DeepSpeed needs LOCAL_RANK, which the next training run of the process would take for an incomplete launcher."""
    environment({})
    for strategy in ("zero1", "ddp"):
        status, _, errors = run(f"distributed.strategy={strategy}", "train.steps=1", "log.sample_tokens=0", folder=strategy)
        assert status == 0, errors
        assert not TORCHRUN.keys() & os.environ.keys()
