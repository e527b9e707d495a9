"""The table of `--plan` over numbers of GPUs: memory, bytes sent, seconds, GPU hours."""

from __future__ import annotations

from dataclasses import replace

from data.batches import fit_micro_batch
from launch.planning.cost import Setup, Workload, sent_bytes, step_time
from launch.planning.machines import Machine
from launch.planning.memory import peaks
from launch.planning.units import amount, duration, size

WORLDS = tuple(1 << i for i in range(11))  # 1 .. 1024


def short_of(workload: Workload, setup: Setup, machine: Machine) -> str:
    """Which memory does not suffice at the peak over start, step and saves: "GPU" or "host"; "" if both suffice."""
    device, host = peaks(workload, setup)
    if device >= machine.memory:
        return "GPU"
    return "host" if host * min(setup.world, machine.gpus_per_node) >= machine.host_memory else ""


def on(setup: Setup, world: int, batch: int) -> Setup:
    """`setup` on `world` ranks for a global batch of `batch` sequences; its micro-batch is a maximum."""
    micro = fit_micro_batch(batch, world, setup.micro_batch)
    return replace(setup, world=world, micro_batch=micro, accumulation=batch // (world * micro))


def cost_lines(
    workload: Workload, setup: Setup, batch: int, machine: Machine, worlds: tuple[int, ...] = WORLDS, steps: int = 1
) -> list[str]:
    """A table over the numbers of GPUs in `worlds` for `steps` steps with a global batch of `batch` sequences.

    "a GPU" and "host" are the peaks of one rank over start, step and saves. The table leaves out numbers of GPUs that do not
    divide the batch, or that the replicas do not divide.
    """
    precision, peak = "bf16" if setup.bf16 else "fp32", machine.peak(setup.bf16)
    lines = [
        f"cost        {setup.strategy}, {setup.optimizer}, {precision}, {batch} x {workload.context} tokens a step "
        f"on {machine.name} (estimate)",
        f"{'GPUs':>6} {'micro':>9} {'a GPU':>8} {'host':>8} {'fits':>5} {'sent':>8} {'compute':>9} {'waiting':>9} "
        f"{'optimizer':>9} {'step':>9} {'tokens/s':>11} {'MFU':>6} {'in all':>8} {'GPU hours':>10}",
    ]
    for world in fitting_worlds(setup, batch, worlds):
        here = on(setup, world, batch)
        device, host = peaks(workload, here)
        short = short_of(workload, here, machine)
        seconds = step_time(workload, here, machine)
        speed = batch * workload.context / seconds.total
        utilization = speed * workload.flops_per_token / (world * peak)
        times = (seconds.compute, seconds.exposed, seconds.optimizer, seconds.total)
        lines.append(
            f"{world:>6} {f'{here.accumulation} x {here.micro_batch}':>9} {cell(size(device), 8)} {cell(size(host), 8)} "
            f"{'no' if short else 'yes':>5} {cell(size(sum(sent_bytes(workload, here).values())), 8)} "
            f"{' '.join(cell(duration(time), 9) for time in times)} {speed:>11,.0f} {utilization:>6.1%} "
            f"{cell(duration(steps * seconds.total), 8)} {amount(world * steps * seconds.total / 3600):>10}"
        )
    if len(lines) == 2:
        lines.append(f"       train.batch_size {batch} divides over none of {', '.join(map(str, worlds))} GPUs")
    return lines


def cell(quantity: str, width: int) -> str:
    """A number and its unit as one word of a table."""
    return quantity.replace(" ", "").rjust(width)


def fitting_worlds(setup: Setup, batch: int, worlds: tuple[int, ...] = WORLDS) -> list[int]:
    """The numbers of GPUs that divide the batch, and that the replicas divide."""
    return [world for world in worlds if batch % world == 0 and world % setup.replicas == 0]
