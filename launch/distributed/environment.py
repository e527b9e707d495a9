"""Checks the environment variables of launchers before anything starts. A leftover variable must not cause a traceback or change
the training run."""

from __future__ import annotations

import os

from configs.load import ConfigError
from configs.schema import Config

LAUNCHED = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)  # torchrun, accelerate and deepspeed set all of them
# Requests of `accelerate launch` that train.py refuses because its own configuration decides: (request, option).
ASKED = {
    "ACCELERATE_USE_DEEPSPEED": ("to use DeepSpeed", "distributed.strategy"),
    "ACCELERATE_USE_FSDP": ("to use FSDP", "distributed.strategy"),
    "ACCELERATE_USE_MEGATRON_LM": ("to use Megatron-LM", "distributed.strategy"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("to use a parallelism configuration", "distributed.strategy"),
    "ACCELERATE_MIXED_PRECISION": ("to use mixed precision {}", "train.precision"),
    "ACCELERATE_DYNAMO_BACKEND": ("to compile with {}", "train.compile"),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("to accumulate gradients over {} steps", "train.micro_batch_size"),
    "ACCELERATE_GRADIENT_CLIPPING": ("to clip gradients at {}", "train.grad_clip"),
    "ACCELERATE_TORCH_DEVICE": ("to use the device {}", "CUDA_VISIBLE_DEVICES"),
}
OFF = ("", "0", "1", "no", "false", "none")  # "1": one step is no accumulation; for ACCELERATE_USE_*, "1" means true instead


def check_environment(config: Config) -> int:
    """Return the number of processes that were started, from the launcher's variables.

    Raises:
        ConfigError: variables are missing, empty or contradict each other, or ask for something that the configuration decides.
    """
    for variable, (asked, option) in ASKED.items():
        value = os.environ.get(variable, "").lower()
        on = value in ("1", "true") if "_USE_" in variable else value not in OFF
        if on and not (variable == "ACCELERATE_MIXED_PRECISION" and value == config.train.precision):
            section, _, key = option.partition(".")
            now = f", which is {getattr(getattr(config, section), key)}" if key else ""
            raise ConfigError(
                f"accelerate launch is configured {asked.format(value)} ({variable}); start plain processes "
                f"(launch/cluster/accelerate.yaml) and choose with {option}{now}"
            )
    return started_processes()


def started_processes() -> int:
    """Return WORLD_SIZE if a launcher has set all variables of LAUNCHED; 1 without a launcher."""
    given = {name: os.environ[name].strip() for name in LAUNCHED if name in os.environ}
    if not given.keys() & {"RANK", "LOCAL_RANK", "WORLD_SIZE"}:
        tasks = os.environ.get("SLURM_NTASKS", "1")
        if "SLURM_PROCID" in os.environ and tasks.isdigit() and int(tasks) > 1:
            raise ConfigError(
                f"Slurm starts {tasks} tasks (SLURM_NTASKS) and no launcher joins them; each would train alone: start torchrun "
                "under srun, as launch/cluster/slurm.sbatch does, or one task (srun -n 1)"
            )
        return 1  # MASTER_ADDR and MASTER_PORT alone start nothing
    wrong = [name for name in LAUNCHED if not given.get(name)]
    if wrong:
        raise ConfigError(
            f"the environment has {', '.join(given)}, but no value of {', '.join(wrong)}: start several processes with torchrun, "
            f"or one after `unset {' '.join(given)}`"
        )
    numbers = {name: number_of(name, given[name]) for name in LAUNCHED if name != "MASTER_ADDR"}
    rank, local, world = numbers["RANK"], numbers["LOCAL_RANK"], numbers["WORLD_SIZE"]
    if not (0 <= rank < world and 0 <= local <= rank):
        raise ConfigError(
            f"RANK={rank}, LOCAL_RANK={local} and WORLD_SIZE={world} in the environment contradict each other: ranks are 0 to "
            "WORLD_SIZE - 1, local ones at most as large; torchrun sets them"
        )
    if not 0 < numbers["MASTER_PORT"] < 1 << 16:
        raise ConfigError(f"MASTER_PORT={numbers['MASTER_PORT']} in the environment is not a port, 1 to 65535")
    return world


def number_of(name: str, text: str) -> int:
    """Return the whole number in an environment variable. Raises ConfigError if it is none."""
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}='{text}' in the environment is not a whole number: torchrun sets it, or unset it") from None
