"""What to change if a training run does not fit into the memory of its GPUs or of their hosts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from launch.planning.cost import Setup, Workload
from launch.planning.machines import Machine
from launch.planning.memory import peaks
from launch.planning.table import WORLDS, fitting_worlds, on, short_of
from launch.planning.units import size

SHOWN = 3  # remedies for a number of GPUs


def remedy_lines(
    workload: Workload, recomputed: Workload, setup: Setup, batch: int, machine: Machine, worlds: tuple[int, ...] = WORLDS
) -> list[str]:
    """A line for each number of GPUs on which the run does not fit, those with the same remedies together.

    `recomputed` is `workload` with gradient checkpointing.
    """
    by_remedy: dict[tuple[str, str], list[str]] = {}
    for world in fitting_worlds(setup, batch, worlds):
        here = on(setup, world, batch)
        if short := short_of(workload, here, machine):
            by_remedy.setdefault((short, remedies(workload, recomputed, here, batch, machine)), []).append(str(world))
    words = {"GPU": "", "host": " for the memory of the hosts"}
    return [f"too large   on {', '.join(on_these)} GPU(s){words[short]}: {text}" for (short, text), on_these in by_remedy.items()]


def used(workload: Workload, setup: Setup) -> float:
    """Bytes of one rank on its GPU."""
    return peaks(workload, setup)[0]


def remedies(workload: Workload, recomputed: Workload, setup: Setup, batch: int, machine: Machine) -> str:
    """The single changes that make a run fit, or all of them together if none does alone."""
    fitting: dict[str, str] = {}  # the first value that fits of each option
    for name, model, changed in single_changes(workload, recomputed, setup, batch):
        option, _, value = name.partition("=")
        if option not in fitting and not short_of(model, changed, machine):
            fitting[option] = value
    if fitting:
        return f"{' or '.join(f'{option}={value}' for option, value in list(fitting.items())[:SHOWN])} fits"
    strategy = "fsdp2" if setup.entry.sharded_path is not None and setup.world > 1 else setup.strategy
    smallest = replace(
        on(replace(setup, micro_batch=1), setup.world, batch),
        strategy=strategy,
        shard_state=False,
        state_bf16=setup.entry.takes_rule,
    )
    together = [f"distributed.strategy={strategy}", "train.micro_batch_size=1", "model.gradient_checkpointing=true"]
    together += ["optimizer.state_dtype=bf16"] if setup.entry.takes_rule else []
    device, host = peaks(recomputed, smallest)
    takes = f"{size(device)} of a GPU and {size(host)} of its host"
    if not (short := short_of(recomputed, smallest, machine)):
        return f"{' '.join(together)} fits with {takes}"
    kind = "GPUs" if short == "GPU" else "hosts"
    if setup.entry.sharded_path is None:  # every process holds everything
        return f"even {' '.join(together)} takes {takes}: larger {kind}, or an optimizer that is sharded (celo2, adamw, muon)"
    return f"even {' '.join(together)} takes {takes}: more or larger {kind}"


def single_changes(workload: Workload, recomputed: Workload, setup: Setup, batch: int) -> Iterator[tuple[str, Workload, Setup]]:
    """(override, workload, setup) for each change; those that cost less time come first."""
    for micro in range(setup.micro_batch - 1, 0, -1):
        smaller = on(replace(setup, micro_batch=micro), setup.world, batch)
        if smaller.micro_batch == micro and used(workload, smaller) < used(workload, setup):
            yield f"train.micro_batch_size={micro}", workload, smaller
    if setup.entry.takes_rule and not setup.state_bf16:
        yield "optimizer.state_dtype=bf16", workload, replace(setup, state_bf16=True)
    if setup.replicas > 1:
        yield "distributed.replicas=1", workload, replace(setup, replicas=1)
    if setup.world > 1 and setup.strategy == "ddp" and setup.entry.takes_rule and not setup.shard_state:
        yield "distributed.shard_state=true", workload, replace(setup, shard_state=True)
    if setup.world > 1 and setup.entry.sharded_path is not None:
        for strategy in ("zero1", "zero2", "fsdp2", "zero3"):
            if strategy != setup.strategy:
                yield (
                    f"distributed.strategy={strategy}",
                    workload,
                    replace(setup, strategy=strategy, shard_state=False, replicas=1, offload=False),
                )
    if setup.strategy == "fsdp2" and not (setup.offload or setup.entry.takes_rule or setup.entry.orthogonalizes):
        yield "distributed.offload=true", workload, replace(setup, offload=True)
    if workload.recompute < 1:
        yield "model.gradient_checkpointing=true", recomputed, setup
