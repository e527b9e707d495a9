"""The table of optimizers with a short name: where each comes from and what it can do.

Code that depends on what an optimizer can do reads the optimizer's entry here, and never its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from configs.schema import Optimizer as OptimizerConfig


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer. The defaults apply to a class that the configuration names by its dotted path."""

    path: str  # dotted path of the class
    package: str | None = None  # name of the library for pip, for the error message if it is missing
    arguments: dict[str, Any] = field(default_factory=dict)  # of the constructor, as the authors advise for language models
    route: Literal["hidden", "matrices", "all"] = "hidden"  # what it updates (`ROUTES`); AdamW updates the rest
    one_lr: bool = False  # optimizer.lr for all that it updates, instead of optimizer.adamw_lr for embeddings and vectors
    options: dict[str, dict[str, Any]] = field(default_factory=dict)  # extra keys of a group, by kind of its parameters
    decay: float = 1.0  # factor on optimizer.weight_decay for the parameters that it updates
    averages: bool = False  # averages the weights itself, all of them: no other route, cautious decay or lookahead
    third_party: bool = True  # its state becomes tensors through the adapter in `launch.optimizers.third_party`
    sharded_path: str | None = None  # the class that updates local shards; None: it needs whole parameters
    plain_matrices: bool = False  # refuses fused and stacked matrices
    takes_rule: bool = False  # runs a rule: accepts optimizer.rule and optimizer.state_dtype, and can divide work over replicas
    all_hidden: bool = False  # treats every parameter as hidden, and so has no optimizer.adamw_lr
    idle_arguments: tuple[str, ...] = ()  # constructor arguments without effect in this entry
    asks_device: bool = False  # a step changes nothing if its `found_inf`, on the device, is 1: the host need not wait
    orthogonalizes: bool = False  # orthogonalizes the update of hidden matrices by Newton–Schulz
    width_rule: Literal["orthogonalized", "adam", "none"] = "adam"  # how rates follow the width (`launch.optimizers.width`)
    state_per_weight: int | None = None  # numbers of optimizer state for each weight that it updates; None: unknown
    # For comparisons: where a grid of learning rates begins, and what else the authors ask for.
    usual_lr: float | None = None  # what authors use for language models; None: the default of the constructor
    needs: tuple[str, ...] = ()  # section.key=value


# Kinds of parameters by route: hidden matrices; embeddings, position tables and the output layer; biases and norms.
ROUTES = {"hidden": ("hidden",), "matrices": ("hidden", "embeddings"), "all": ("hidden", "embeddings", "vectors")}
STEPS = "train.steps"  # as a constructor argument: stands for the number train.steps
ADAMW: dict[str, Any] = {"betas": (0.9, 0.95), "eps": 1e-8, "fused": True}
CELO2: dict[str, Any] = {
    "path": "celo2.Celo2",
    "sharded_path": "celo2.Celo2",
    "third_party": False,
    "takes_rule": True,
    "asks_device": True,
    "state_per_weight": 4,
    "usual_lr": 1e-3,  # arXiv 2602.19142: 3e-4 to 1e-3; an update has RMS 1
}
TABLE = {
    "celo2": OptimizerEntry(**CELO2, orthogonalizes=True, width_rule="orthogonalized"),
    "celo2-base": OptimizerEntry(**CELO2, all_hidden=True, idle_arguments=("betas", "eps", "ns_dtype", "orthogonalize")),
    # Learning rate: 6e-4 at 125M, more for smaller models (arXiv 2005.14165, table 2.1).
    "adamw": OptimizerEntry(
        "torch.optim.AdamW",
        sharded_path="torch.optim.AdamW",
        third_party=False,
        route="all",
        asks_device=True,  # where it is fused
        arguments=ADAMW,
        state_per_weight=2,
        usual_lr=1e-3,
    ),
    # match_rms_adamw (arXiv 2502.16982) makes an update as large as AdamW's. ShardedMuon always does, without the argument.
    "muon": OptimizerEntry(
        "torch.optim.Muon",
        sharded_path="launch.optimizers.sharded_muon.ShardedMuon",
        arguments={"adjust_lr_fn": "match_rms_adamw"},
        third_party=False,
        plain_matrices=True,
        orthogonalizes=True,
        width_rule="orthogonalized",
        state_per_weight=1,
        usual_lr=1e-3,
    ),
    # arXiv 2302.06675, section 5: these betas for language models, a weight decay 3 to 10 times AdamW's, a learning rate 3 to 10
    # times below, for all parameters.
    "lion": OptimizerEntry(
        "pytorch_optimizer.Lion",
        "pytorch_optimizer",
        {"betas": (0.95, 0.98)},
        route="all",
        one_lr=True,
        decay=3.0,
        state_per_weight=1,
        usual_lr=2e-4,
    ),
    # arXiv 2409.11321: betas (0.95, 0.95), eigenbases every 10 steps, on the matrices of the layers alone.
    "soap": OptimizerEntry("pytorch_optimizer.SOAP", "pytorch_optimizer", {"precondition_frequency": 10}, usual_lr=3e-3),
    # arXiv 1804.04235, for all parameters. Its learning rate is relative to the RMS of the weight.
    "adafactor": OptimizerEntry("torch.optim.Adafactor", route="all", one_lr=True, state_per_weight=0, usual_lr=1e-2),
    # arXiv 2405.15682: it averages the weights instead of lowering the learning rate, so it must update all of them. The warm-up
    # stays. A learning rate 1 to 10 times AdamW's.
    "schedule-free": OptimizerEntry(
        "schedulefree.AdamWScheduleFree",
        "schedulefree",
        route="all",
        averages=True,
        state_per_weight=2,
        usual_lr=3e-3,
        needs=("schedule.kind=constant",),
    ),
    # arXiv 2510.05491: Muon, with the rows of the update scaled alike; RMS 0.2 (algorithm 1), so that AdamW's learning rates fit.
    "normuon": OptimizerEntry(
        "pytorch_optimizer.NorMuon",
        "pytorch_optimizer",
        {"momentum": 0.95, "beta2": 0.95, "update_scale": "match_rms"},
        options={"hidden": {"use_muon": True}},
        plain_matrices=True,
        width_rule="orthogonalized",
        state_per_weight=1,
        usual_lr=1e-3,
    ),
    # arXiv 2409.03137: AdamW with a second, slow momentum, phased in over the whole run. AdamW's learning rates.
    "ademamix": OptimizerEntry(
        "pytorch_optimizer.AdEMAMix",
        "pytorch_optimizer",
        {"betas": (0.9, 0.999, 0.9999), "alpha": 5.0, "t_alpha_beta3": STEPS, "weight_decouple": True},
        route="all",
        state_per_weight=3,
        usual_lr=1e-3,
    ),
    # arXiv 2411.10438, MARS-AdamW with gradients computed once: everything but vectors; at 125M a learning rate of 6e-3 and a
    # decay of 0.01 where AdamW has 0.1.
    "mars": OptimizerEntry(
        "pytorch_optimizer.MARS",
        "pytorch_optimizer",
        {"betas": (0.95, 0.99), "gamma": 0.025},
        route="matrices",
        one_lr=True,
        decay=0.1,
        state_per_weight=3,
        usual_lr=6e-3,
    ),
    # arXiv 1512.04202 as kron_torch: everything, with a learning rate about a third of Adam's.
    "kron": OptimizerEntry("pytorch_optimizer.Kron", "pytorch_optimizer", route="all", one_lr=True, usual_lr=3e-4),
    # arXiv 2502.07529: spectral norm of radius 50 for layers, sign of radius 3,000 for embeddings and output, with the constraint
    # in place of decay. Its models have no vectors; AdamW trains them here.
    "scion": OptimizerEntry(
        "pytorch_optimizer.SCION",
        "pytorch_optimizer",
        {"momentum": 0.1, "constraint": True},
        route="matrices",
        one_lr=True,
        options={"hidden": {"norm_type": 2, "scale": 50.0}, "embeddings": {"norm_type": 4, "scale": 3000.0}},  # LMONorm
        decay=0.0,
        plain_matrices=True,
        width_rule="none",  # designed so that the same rates suit every width
        state_per_weight=1,
        usual_lr=2.0**-12,
    ),
}


def entry_of(config: OptimizerConfig) -> OptimizerEntry:
    """The entry of the optimizer that `config` names, by a short name or a dotted path; without what its arguments turn off."""
    entry = TABLE.get(config.name) or OptimizerEntry(config.name)
    off = (config.arguments or {}).get("orthogonalize") is False
    entry = replace(entry, orthogonalizes=False, width_rule="adam") if entry.orthogonalizes and off else entry
    return replace(entry, route=config.route) if config.route and chooses_route(config) else entry


def chooses_route(config: OptimizerConfig) -> bool:
    """Whether `optimizer.route` says what the optimizer updates."""
    entry = TABLE.get(config.name)
    return entry is None or (entry.third_party and not entry.averages)


def uses_adamw_lr(config: OptimizerConfig) -> bool:
    """Whether some parameters have the learning rate `optimizer.adamw_lr`."""
    entry = entry_of(config)
    return not entry.all_hidden and not (entry.one_lr and entry.route == "all")


def decays(config: OptimizerConfig) -> bool:
    """Whether `optimizer.weight_decay` decays anything: what the optimizer updates, or embeddings that AdamW updates."""
    entry = entry_of(config)
    return entry.decay > 0 or entry.route == "hidden"


def rate_of_the_rest(config: OptimizerConfig) -> float:
    """The peak learning rate of all but hidden matrices: `optimizer.adamw_lr` where it is set and in use, else `optimizer.lr`."""
    return config.adamw_lr if config.adamw_lr is not None and uses_adamw_lr(config) else config.lr


def names_that_take_a_rule() -> str:
    """For error messages: the optimizers that have a rule."""
    return " and ".join(name for name, entry in TABLE.items() if entry.takes_rule)
