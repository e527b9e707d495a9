"""Compares what must be equal on all ranks, at the start of a training run and at every rollback.

Without this check, a node with another configuration, data set, checkpoint, rule or version would silently train something else.
Paths may differ between the nodes (`PATHS`): their contents are compared instead.
"""

from __future__ import annotations

import hashlib
import platform
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from accelerate import Accelerator

import celo2
import configs
import data
import launch
import models
from celo2.distributed.collectives import gather_objects
from configs.load import ConfigError
from configs.schema import Config
from data.mixture import Mixture
from data.shards import TokenShards
from launch.checkpoint.folders import CHECKPOINTS
from launch.checkpoint.verify import MANIFEST, CheckpointError, list_checkpoints, sha256, step_of, verify
from launch.monitoring.trackers import flat
from launch.optimizers.build import rule_of
from launch.optimizers.table import entry_of
from launch.optimizers.third_party import find_class
from launch.run.agreement import rule_hash

PATHS = (
    "run.dir",
    "data.dir",
    "data.mix",
    "data.cache_dir",
    "optimizer.rule",
    "model.init",
    "checkpoint.fallback_dir",
    "eval.lm_eval_include",  # only the first rank reads it, like the files of eval.tasks
)  # options that may differ between nodes
PACKAGES = ("torch", "numpy", "transformers", "accelerate")
NAMED = 4  # the most values, ranges of ranks or hosts that a message names


def is_path(option: str) -> bool:
    """Return whether the value of a dotted option may differ between nodes."""
    return option in PATHS or option.startswith("eval.tasks.") or (option.startswith("eval.sets.") and option.endswith(".dir"))


class Fact(NamedTuple):
    """Something that must be the same on every rank."""

    name: str
    value: str
    remedy: str


def facts_of(config: Config, pinned: Config, shards: TokenShards, checkpoint: Path | None, run_dir: Path) -> list[Fact]:
    """Return the facts about this rank's training that must be equal on all ranks.

    Args:
        config: the configuration as given.
        pinned: the same with its rule pinned (`launch.run.pinned_rule`).
        shards: the training split of its data set.
        checkpoint: the checkpoint to resume from, as a path of this rank; None: the run begins.
        run_dir: the run's folder, as a path of this rank.
    """
    options = {key: value for key, value in flat(asdict(config)).items() if not is_path(key)}
    facts = [
        Fact(key, "null" if value == "None" else str(value), f"give every rank the same {key}") for key, value in options.items()
    ]
    given = "null" if config.model.init is None else "given"
    facts.append(Fact("model.init", given, "give it to every rank or to none"))
    option = "data.dir" if config.data.mix is None else "data.mix"
    facts.append(Fact(f"the data set of {option}", shards.fingerprint[:12], f"let {option} hold the same data set on every node"))
    if isinstance(shards, Mixture):
        order = ", ".join(source.fingerprint[:12] for source in shards.sources)
        weights = "; ".join(f"{' : '.join(map(str, phase.shares))} from step {phase.step}" for phase in shards.phases)
        facts.append(Fact("the order of the sources of data.mix", order, "name the sources in one order on every rank"))
        facts.append(Fact("the weights of data.mix", weights, "give every rank the same weights"))
    if entry_of(config.optimizer).takes_rule:
        remedy = "let optimizer.rule be the same file on every node"
        facts.append(Fact("the rule of the optimizer", rule_hash(rule_of(pinned.optimizer))[:12], remedy))
    facts.append(checkpoint_fact(checkpoint, run_dir))
    facts += [Fact(name, found, f"install the same {name} on every node") for name, found in versions(config).items()]
    facts.append(Fact("the code of this project", code_hash(), "check out the same commit on every node"))
    if own := getattr(sys.modules[find_class(entry_of(config.optimizer).path).__module__], "__file__", None):
        facts.append(Fact(f"the code of {config.optimizer.name}", sha256(Path(own))[:12], f"give every node the same {own}"))
    return facts


def checkpoint_fact(checkpoint: Path | None, run_dir: Path) -> Fact:
    """Return the fact about the checkpoint to resume from, as this rank sees it: step and manifest, if its files are right.

    `checkpoint` is None if the run begins. Then a checkpoint in this rank's folder belongs to another run and is reported.
    """
    if checkpoint is None:
        found = list_checkpoints(run_dir / CHECKPOINTS)
        value = f"step {step_of(found[-1])} in {run_dir}" if found else "none"
    else:
        try:
            verify(checkpoint, hashes=False)
            value = f"step {step_of(checkpoint)} with the manifest {sha256(checkpoint / MANIFEST)[:12]}"
        except CheckpointError as error:
            value = f"unusable ({error})"
    return Fact("the checkpoint to resume from", value, "let run.dir be one folder that every node reads, or copy it to each")


def versions(config: Config) -> dict[str, str]:
    """Return the versions of Python and of the packages on which the results depend."""
    deepspeed = ["deepspeed"] if config.distributed.strategy.startswith("zero") else []
    found = {"Python": platform.python_version()}
    for name in (*PACKAGES, *deepspeed):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # the package was imported from a folder, not installed
            found[name] = str(getattr(sys.modules.get(name), "__version__", "unknown"))
    return found


def code_hash() -> str:
    """Return a hash of the names and contents of this project's Python files."""
    digest = hashlib.sha256()
    for package in (celo2, configs, data, launch, models):
        folder = Path(str(package.__file__)).parent
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder.parent).as_posix()}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def require_same(accelerator: Accelerator, facts: Callable[[], list[Fact]]) -> None:
    """Compare the facts that `facts` returns on all ranks. Every rank must call it.

    Raises:
        ConfigError: on every rank, with the first fact that differs, its values, their ranks and a remedy.
    """
    if accelerator.num_processes == 1:
        return
    everyone = gather_objects((socket.gethostname(), facts()), dist.group.WORLD)  # type: ignore[arg-type]
    if problem := first_difference([host for host, _ in everyone], [facts for _, facts in everyone]):
        raise ConfigError(problem)


def first_difference(hosts: list[str], everyone: list[list[Fact]]) -> str | None:
    """Return a line on the first fact that differs between ranks and the number of further ones; None if all are equal."""
    by_rank = [{fact.name: fact for fact in facts} for facts in everyone]
    names = dict.fromkeys(name for facts in by_rank for name in facts)
    differing = [name for name in names if len({facts[name].value if name in facts else None for facts in by_rank}) > 1]
    if not differing:
        return None
    name = differing[0]
    ranks_of: dict[str, list[int]] = {}
    for rank, facts in enumerate(by_rank):
        ranks_of.setdefault(facts[name].value if name in facts else "not given", []).append(rank)
    shown = [f"{' '.join(value.split())} on {in_words(ranks, hosts)}" for value, ranks in ranks_of.items()]
    remedy = next(facts[name].remedy for facts in by_rank if name in facts)
    more = f" (and {len(differing) - 1} more: {shortened(differing[1:])})" if differing[1:] else ""
    return f"the ranks differ: {name} is {shortened(shown)}{more}; {remedy}"


def in_words(ranks: list[int], hosts: list[str]) -> str:
    """Return ranks and hosts as a text: "rank 3 (node1)", "ranks 0-7, 16 (node0, node2)"."""
    ranges: list[tuple[int, int]] = []
    for rank in ranks:
        if ranges and ranges[-1][1] == rank - 1:
            ranges[-1] = (ranges[-1][0], rank)
        else:
            ranges.append((rank, rank))
    numbers = shortened([str(first) if first == last else f"{first}-{last}" for first, last in ranges])
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers} ({shortened(list(dict.fromkeys(hosts[rank] for rank in ranks)))})"


def shortened(words: list[str]) -> str:
    """Return the first NAMED of `words` as a text, and how many more there are."""
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return ", ".join(words[:NAMED]) + more
