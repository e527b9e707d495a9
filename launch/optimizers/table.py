"""The table of optimizers with a short name: where each comes from and what it can do.

Code that depends on what an optimizer can do reads the optimizer's entry here, and never its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from configs.schema import Optimizer as OptimizerConfig


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer. The defaults are what is assumed of a class that the configuration names by its dotted path."""

    path: str  # dotted path of the class
    package: str | None = None  # what pip calls the library, for the error message if it is missing
    arguments: dict[str, Any] = field(default_factory=dict)  # of the constructor, as the authors advise for language models
    route: Literal["hidden", "all"] = (
        "hidden"  # hidden: it updates the hidden matrices, AdamW the rest; all: it updates everything
    )
    decay: float = 1.0  # factor on optimizer.weight_decay for the parameters that it updates
    third_party: bool = True  # its state becomes tensors through the adapter in `launch.optimizers.third_party`
    sharded_path: str | None = None  # the class that updates local shards; None: it needs whole parameters
    plain_matrices: bool = False  # refuses fused and stacked matrices
    takes_rule: bool = False  # runs a rule: accepts optimizer.rule and optimizer.state_dtype, and can divide work over replicas
    all_hidden: bool = False  # treats every parameter as hidden, and so has no optimizer.adamw_lr
    idle_arguments: tuple[str, ...] = ()  # of the constructor, without effect in this entry
    asks_device: bool = False  # where its attribute `found_inf`, on the device, is 1, a step changes nothing: no host need wait
    orthogonalizes: bool = False  # the update of hidden matrices, by Newton–Schulz
    state_per_weight: int | None = None  # numbers of optimizer state for each weight that it updates; None: unknown
    # For comparisons: where a grid of learning rates begins, and what else the authors ask for.
    usual_lr: float | None = None  # what authors use for language models; None: the default of the constructor
    needs: tuple[str, ...] = ()  # section.key=value


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
    "celo2": OptimizerEntry(**CELO2, orthogonalizes=True),
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
        state_per_weight=1,
        usual_lr=1e-3,
    ),
    # arXiv 2302.06675, section 5: these betas for language models, a weight decay 3 to 10 times AdamW's, a learning rate 3 to 10
    # times below.
    "lion": OptimizerEntry(
        "pytorch_optimizer.Lion", "pytorch_optimizer", {"betas": (0.95, 0.98)}, decay=3.0, state_per_weight=1, usual_lr=2e-4
    ),
    # arXiv 2409.11321: betas (0.95, 0.95), eigenbases every 10 steps, on the matrices of the layers alone.
    "soap": OptimizerEntry("pytorch_optimizer.SOAP", "pytorch_optimizer", {"precondition_frequency": 10}, usual_lr=3e-3),
    # arXiv 1804.04235. Its learning rate is relative to the RMS of the weight.
    "adafactor": OptimizerEntry("torch.optim.Adafactor", state_per_weight=0, usual_lr=1e-2),
    # arXiv 2405.15682: it averages the weights instead of lowering the learning rate, so it must have them all. The warm-up
    # stays. A learning rate 1 to 10 times AdamW's.
    "schedule-free": OptimizerEntry(
        "schedulefree.AdamWScheduleFree",
        "schedulefree",
        route="all",
        state_per_weight=2,
        usual_lr=3e-3,
        needs=("schedule.kind=constant",),
    ),
}


def entry_of(config: OptimizerConfig) -> OptimizerEntry:
    """The entry of the optimizer that `config` names, by a short name or a dotted path; without what its arguments turn off."""
    entry = TABLE.get(config.name) or OptimizerEntry(config.name, route=config.route)
    off = (config.arguments or {}).get("orthogonalize") is False
    return replace(entry, orthogonalizes=False) if entry.orthogonalizes and off else entry


def names_that_take_a_rule() -> str:
    """For error messages: the optimizers that have a rule."""
    return " and ".join(name for name, entry in TABLE.items() if entry.takes_rule)
