"""Every option of a training run in one typed schema: name, type, default, documentation and range.

`python train.py --help` prints this table. A YAML file replaces defaults, and `section.key=value` on the command line replaces
values of the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from celo2.training.configuration import (
    DECAY,
    FRACTION,
    NAME,
    NOT_EMPTY,
    POSITIVE,
    SEED,
    TIMEOUT,
    Range,
    at_least,
    option,
    section,
)

LARGEST_BATCH = 2**24  # sequences; the numbers of a batch's sequences must fit into memory
BATCH_SIZE = Range(f"at least 1 and at most {LARGEST_BATCH}", lambda x: 1 <= x <= LARGEST_BATCH)
RECOMPUTED = Range(
    "false, true, operations, or a number of blocks",
    lambda x: x.lower() in ("false", "true", "no", "yes", "off", "on", "operations") or x.isdecimal(),
)


@dataclass
class Run:
    name: str = option("run", "name of the training run; the trackers show it", NAME)
    dir: str | None = option(None, "folder of the training run; null: runs/<name>", NOT_EMPTY, path=True)
    seed: int = option(0, "seeds initialization, data order and dropout", SEED)


@dataclass
class Model:
    size: str | None = option(None, "a named size: gpt3-125m, gpt3-350m, ... (models/sizes.py); null: the numbers below")
    layers: int | None = option(None, "transformer blocks; null: the size's", at_least(1))
    width: int | None = option(None, "model width D; null: the size's", at_least(1))
    heads: int | None = option(None, "attention heads; null: the size's", at_least(1))
    context: int | None = option(None, "sequence length T in tokens; null: the size's", at_least(1))
    vocab_size: int | None = option(
        None, "rows of the embedding; null: the tokenizer's, rounded up to a multiple of 64", at_least(1)
    )
    dropout: float = option(0.0, "dropout probability everywhere", DECAY)
    gradient_checkpointing: str = option(
        "false",
        "recompute activations in the backward pass: false, true (least memory, a third more time), a number N (in every N-th "
        "block), or operations (all but matrix products and attention)",
        RECOMPUTED,
    )
    init: str | None = option(
        None,
        "initial weights: a run, checkpoint, transformers folder or hub:NAME[@REVISION]; average:RUN takes a run's average",
        path=True,
    )
    hf: dict[str, Any] | None = option(None, "instead of a GPT-3: the config of any causal LM of transformers {model_type: ...}")


@dataclass
class Data:
    dir: str | None = option(
        None, "folder that `python -m data.prepare` or `data.adopt` wrote; this or mix is required", NOT_EMPTY, path=True
    )
    mix: list[dict[str, Any]] | None = option(
        None,
        "several folders, each with a weight, or with one from given steps on: "
        "[{dir: a, weight: 0.7}, {dir: b, weight: {0: 0.3, 9000: 1.5}}]",
    )
    cache_dir: str | None = option(
        None, "copies of folders whose dir is a URL (s3://, gs://, hf://, ...); null: ~/.cache/celo2-data", NOT_EMPTY, path=True
    )
    cache_gb: float = option(100.0, "largest total size of these copies, in GB; unused copies are deleted first", POSITIVE)


OPTIMIZERS = (
    "celo2", "celo2-base", "adamw", "muon", "lion", "soap", "adafactor", "schedule-free",
    "normuon", "ademamix", "mars", "kron", "scion",
)  # fmt: skip


@dataclass
class Optimizer:
    name: str = option("celo2", f"optimizer: {', '.join(OPTIMIZERS)}, or a dotted path (torch.optim.NAdam)")
    lr: float = option(1e-3, "peak learning rate of hidden matrices (celo2: the RMS change of a weight in one step)", at_least(0))
    adamw_lr: float | None = option(
        None, "peak learning rate of embeddings, output layer, biases and norms; null: lr", at_least(0)
    )
    weight_decay: float = option(0.1, "decoupled decay of matrices and embeddings; biases and norms have none", at_least(0))
    base_width: int | None = option(
        None,
        "model width at which lr, adamw_lr and weight_decay were tuned; they are scaled to the model's width; null: not scaled",
        at_least(1),
    )
    cautious_weight_decay: bool = option(False, "decay a weight only where the update also moves it towards 0 (arXiv 2510.12402)")
    ema_nesterov: float = option(
        0.0, "EMA-Nesterov (arXiv 2605.25395): factor of the lookahead, its authors use 0.6 with muon; 0: off", at_least(0)
    )
    ema_nesterov_decay: float = option(0.99, "decay of the average of weight changes along which ema_nesterov looks ahead", DECAY)
    rule: str | None = option(
        None,
        "for celo2 and celo2-base: a shipped rule, a path, or hub:OWNER/NAME[@REVISION][:FILE]; null: the rule of that name",
        NOT_EMPTY,
        path=True,
    )
    state_dtype: Literal["fp32", "bf16"] = option("fp32", "celo2, celo2-base: state of matrices, 16 or 8 bytes a weight")
    arguments: dict[str, Any] | None = option(
        None, "further arguments of the optimizer's constructor {betas: [0.9, 0.99], num_steps: train.steps}"
    )
    route: Literal["hidden", "matrices", "all"] | None = option(
        None,
        "parameters that an optimizer from a library updates; AdamW updates the rest; null: as its authors do, or hidden for a "
        "dotted path",
    )


@dataclass
class Schedule:
    kind: Literal["cosine", "linear", "constant", "wsd"] = option(
        "cosine", "cosine, linear, constant or wsd (constant, then linear)"
    )
    warmup: float = option(0.05, "fraction of train.steps with linear warm-up from 0", FRACTION)
    final: float = option(0.1, "learning rate at the last step, as a fraction of the peak (constant: unused)", FRACTION)
    decay: float = option(0.2, "wsd: fraction of train.steps that decays, at the end", FRACTION)
    start: int = option(
        0, "step at which this schedule begins, for an extended run; its fractions refer to the steps from there on", at_least(0)
    )
    cooldown: int = option(
        0,
        "steps of a linear decay to `final` that ends the run, from the checkpoint that checkpoint.resume names; 0: none",
        at_least(0),
    )


@dataclass
class Train:
    steps: int = option(1000, "optimizer steps", at_least(1))
    tokens: int | None = option(None, "training tokens, in place of train.steps; a step takes batch_size x context", at_least(1))
    batch_size: int = option(32, "sequences in one optimizer step, over all ranks", BATCH_SIZE)
    ramp: dict[str, Any] | None = option(
        None, "other batch sizes from given steps on, counted from 0: {1000: 64, 4000: 128}; null: none"
    )
    micro_batch_size: int = option(
        32, "largest number of sequences in one forward pass of one rank; the rest is gradient accumulation", at_least(1)
    )
    on_batch_change: Literal["refuse", "allow"] = option(
        "refuse", "refuse or allow resuming with another batch_size than the checkpoint's"
    )
    grad_clip: float = option(1.0, "clip the whole gradient to this norm; 0: no clipping", at_least(0))
    precision: Literal["fp32", "bf16"] = option("fp32", "fp32 or bf16 (autocast with float32 weights; see optimizer.state_dtype)")
    compile: bool = option(False, "torch.compile of the model")
    average: dict[str, Any] | None = option(
        None, "also keep an average of the weights: {kind: ema, decay: 0.999} or {kind: tail, fraction: 0.2} (of train.steps)"
    )
    deterministic: bool = option(
        False, "use only deterministic algorithms, so that a repeated run gives the same bits, also on GPUs; slower"
    )
    max_bad_steps: int = option(10, "stop after this many steps in a row whose loss or gradient norm is not finite", at_least(1))
    spike: float = option(
        1.0, "a loss this many nats above the median of the last 50 steps is a spike; 0: no monitor", at_least(0)
    )
    on_spike: Literal["log", "rollback"] = option(
        "log", "log or rollback (to the last checkpoint, skipping the batches since, on spikes and after max_bad_steps)"
    )


@dataclass
class Distributed:
    strategy: Literal["ddp", "zero1", "zero2", "zero3", "fsdp2"] = option("ddp", "ddp, zero1, zero2, zero3 or fsdp2")
    shard_state: bool = option(False, "ddp with celo2: keep the optimizer state of a parameter on one rank")
    replicas: int = option(1, "fsdp2: copies of the model, each sharded over processes / replicas ranks", at_least(1))
    offload: bool = option(
        False, "fsdp2 with adamw: keep weights, gradients and state in host memory and run the optimizer there"
    )
    check_replicas: int = option(
        100,
        "steps between comparisons of the weights that ranks hold in common, and before each checkpoint; 0: never",
        at_least(0),
    )
    timeout: float = option(
        600.0, "seconds without a sign of life from another rank after which the run ends with an error", TIMEOUT
    )


@dataclass
class Checkpoint:
    every: int = option(500, "steps between checkpoints; 0: only at the end", at_least(0))
    minutes: float = option(0.0, "minutes between checkpoints, besides `every`; 0: by steps alone", at_least(0))
    keep: int = option(2, "newest checkpoints to keep", at_least(1))
    keep_every: int = option(0, "steps between milestones: checkpoints that are kept for good; 0: none", at_least(0))
    keep_best: bool = option(False, "also save at, and keep, the lowest validation loss so far")
    resume: str = option(
        "auto",
        "auto: from the newest whole checkpoint; never: from the beginning; or the path of a checkpoint or run to resume from",
        NOT_EMPTY,
        path=True,
    )
    shards: Literal["auto", "one"] = option(
        "auto", "auto: every rank writes a part, if all see the folder; one: the first rank writes everything"
    )
    fallback_dir: str | None = option(
        None, "a folder on another disk for checkpoints that cannot be written to run.dir; null: none", NOT_EMPTY, path=True
    )
    patience: float = option(120.0, "seconds to retry if the last checkpoint cannot be written", at_least(0))


@dataclass
class Log:
    every: int = option(10, "steps between lines of metrics.jsonl; the first and the last step always get one", at_least(1))
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "trackio", "aim"]] = option(
        [], "any of tensorboard, wandb, mlflow, comet_ml, trackio, aim"
    )
    project: str = option("celo2", "trackers: the project (experiment), which holds many runs; run.name names this one")
    group: str | None = option(None, "trackers: the group of runs that this one belongs to, such as a sweep; null: none")
    layers: int = option(
        0,
        "steps between statistics of every layer, and at the first and last, in metrics.jsonl and layers.png; 0: none",
        at_least(0),
    )
    profile: list[int] | None = option(None, "first and last step of a torch.profiler trace in <run.dir>/profile: [10, 12]")
    memory_snapshot: bool = option(False, "on a GPU: record every allocation, and write a snapshot when memory runs out")
    sample_tokens: int = option(200, "tokens of the text sample at evaluations and at the end; 0: none", at_least(0))
    sample_prompt: str = option("", "text that the sample continues; empty: the start of a document")


@dataclass
class Eval:
    every: int = option(100, "steps between evaluations, and always at the end; 0: only at the end", at_least(0))
    sequences: int = option(256, "validation sequences, evenly spread over the validation split, always the same", at_least(1))
    sets: dict[str, Any] | None = option(
        None, "further validation sets by name {code: FOLDER, old: {dir: FOLDER, split: train}}, each with eval.sequences"
    )
    tasks: dict[str, Any] | None = option(
        None, 'multiple choice by name {arc: FILE}; a line is {"question": TEXT, "choices": [TEXT, ...], "answer": NUMBER}'
    )
    lm_eval: list[str] = option(
        [], "tasks and groups of lm-eval, with data that is already on this machine [hellaswag, arc_easy]"
    )
    lm_eval_include: str | None = option(None, "a folder with further tasks for eval.lm_eval", NOT_EMPTY, path=True)
    tasks_every: int = option(0, "steps between evaluations with tasks, a multiple of every; 0: all evaluations", at_least(0))
    task_examples: int | None = option(None, "use only this many questions of each task, the first ones; null: all", at_least(1))


@dataclass
class Config:
    run: Run = section(Run)
    model: Model = section(Model)
    data: Data = section(Data)
    optimizer: Optimizer = section(Optimizer)
    schedule: Schedule = section(Schedule)
    train: Train = section(Train)
    distributed: Distributed = section(Distributed)
    checkpoint: Checkpoint = section(Checkpoint)
    log: Log = section(Log)
    eval: Eval = section(Eval)
