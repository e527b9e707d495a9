"""Makes the parts of a training run from its configuration: data, model and folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from celo2 import Celo2, save_rule
from celo2.training.folder import check_own
from celo2.training.lock import FolderLock
from configs.length import batch_sizes
from configs.load import ConfigError, to_yaml
from configs.schema import Config
from data.batches import Batches, fit_micro_batch, prefetch
from data.files import replace_text
from data.shards import TokenShards
from data.tokenizer import copy_tokenizer
from launch.checkpoint.folders import CHECKPOINTS, FALLBACK, claim, is_outside, require_own
from launch.checkpoint.verify import MODEL, step_of
from launch.checkpoint.writer import Progress, no_progress
from launch.distributed.birth import WithProgress, with_weights
from launch.distributed.first_rank import on_first_rank
from launch.run.agreement import RULE_FILE
from launch.run.branch import Start, begin_line, checkpoint_folders
from launch.run.initialize import (
    architecture,
    architecture_source,
    begun,
    check_tokenizer,
    find_source,
    load_source,
    model_options,
    weight_files,
)
from launch.run.mixture import local_data_folder, open_mixture
from launch.run.state import RunState
from launch.run.weights import file_weights
from models import build_model, choose_loss, longest_context
from models.build import model_of, prepare_model
from models.gpt3 import GPT3Config
from models.initialization import Weights, outline

VOCABULARY_MULTIPLE = 64  # matrix units work on multiples of 64; the additional rows are never a target


def open_data(config: Config) -> tuple[TokenShards, TokenShards]:
    """Open the training and the validation split of `data.dir` or `data.mix`."""
    if config.data.mix is not None:
        return open_mixture(config)
    if config.data.dir is None:
        raise ConfigError("data.dir is missing: prepare a folder with python -m data.prepare SOURCE FOLDER and name it")
    folder = local_data_folder(config, config.data.dir)
    return TokenShards(folder, "train"), TokenShards(folder, "val")


def open_batches(
    config: Config, shards: TokenShards, context: int, state: RunState, accelerator: Accelerator
) -> tuple[Batches, Iterator]:
    """Return the batches of the run, and an iterator over this rank's micro-batches from the step of `state` on."""
    sizes = batch_sizes(vars(config.train))
    batches = Batches(shards, context, sizes, config.run.seed, state.step, state.sequences, state.sources)
    stream = prefetch(
        batches,
        state.step,
        config.train.steps,
        accelerator.process_index,
        accelerator.num_processes,
        config.train.micro_batch_size,
        pin_memory=accelerator.device.type == "cuda",
    )
    return batches, stream


def vocabulary(config: Config, tokenizer_size: int) -> int:
    """Return the rows of the embedding for a tokenizer of `tokenizer_size` tokens; with `model.init`, the smallest possible."""
    wanted = config.model.vocab_size
    if wanted is not None and wanted < tokenizer_size:
        raise ConfigError(f"model.vocab_size is {wanted}, but the data has tokens up to {tokenizer_size - 1}")
    if config.model.init is not None:
        return tokenizer_size
    return wanted or -(-tokenizer_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def build_from_config(config: Config, vocab_size: int, device: str | None = None) -> tuple[PreTrainedModel, int]:
    """Build the model of `config`. Returns it and the context T (tokens) on which it trains.

    With `model.init`, only the architecture comes from there, not the weights (see `make_model`).
    """
    options = asdict(config.model) | {"vocab_size": vocab_size, "device": device}
    del options["init"]
    source = architecture_source(config, run_folder(config))
    if source is not None:
        model = model_of(architecture(config.model, source, vocab_size), device)
        return prepare_model(model, config.model.gradient_checkpointing), checked_context(config, model)
    with model_options():
        model = build_model(**options | ({} if config.model.hf is None else {"context": None}))
    return model, model.config.max_position_embeddings if config.model.hf is None else checked_context(config, model)


class Made(NamedTuple):
    """The model to train, without memory for its parameters."""

    model: PreTrainedModel
    weights: Weights  # the weights to start with
    context: int  # T, tokens
    taken: str = ""  # a line on the weights that `model.init` gave; empty if the run does not begin with them
    files: list[Path] = []  # noqa: RUF012  the files of these weights


def checked_context(config: Config, model: PreTrainedModel) -> int:
    """Return the context T for training `model`. Raises ConfigError if it is missing or exceeds the model's positions."""
    longest = longest_context(model.config)
    context = config.model.context
    if isinstance(model.config, GPT3Config):
        context = context or longest
    if context is None:
        raise ConfigError("model.context is missing: say how many tokens a training sequence has")
    if longest is not None and longest < context:
        raise ConfigError(f"model.context is {context}, but the model has {longest} positions")
    return context


def make_model(
    config: Config, shards: TokenShards, checkpoint: Path | None = None, progress: Callable[[], None] = no_progress
) -> Made:
    """Build the model to train, without memory for its parameters, and find the source of its weights.

    The source is the initialization of the architecture, `model.init`, or the checkpoint from which the run resumes, if its
    files hold this model's weights. `progress` is called whenever weights are made or read.
    """
    vocab_size = vocabulary(config, shards.vocab_size)
    if config.model.init is None or begun(config, run_folder(config)):
        model, weights = outline(lambda: build_from_config(config, vocab_size)[0], config.run.seed)
        made = Made(model, weights, checked_context(config, model))
    else:
        source = find_source(config.model.init)
        wanted = architecture(config.model, source, vocab_size)
        tokenizer = check_tokenizer(source, shards)
        model, weights, taken = load_source(source, wanted, config.model.gradient_checkpointing)
        made = Made(model, weights, checked_context(config, model), f"{taken}; {tokenizer}", weight_files(source))
    if not isinstance(model.config, GPT3Config):
        with_weights(model, WithProgress(weights, progress), choose_loss)
    saved = file_weights(checkpoint / MODEL, model) if checkpoint is not None else None
    return made._replace(weights=WithProgress(saved or weights, progress))


def run_folder(config: Config) -> Path:
    """Return the folder of the training run."""
    return Path(config.run.dir or f"runs/{config.run.name}")


@contextmanager
def lock_run(config: Config, accelerator: Accelerator, mark: Callable[..., None]) -> Iterator[None]:
    """Lock the run's folder on the first rank, in this context. `mark` is the heartbeat's.

    If another process trains there, or the folder belongs to something else, every rank raises the same error.
    """

    def lock() -> Path:
        folder = run_folder(config)
        path = stack.enter_context(FolderLock(folder)).path
        check_own(folder, Config, "step", CHECKPOINTS, "config.yaml")
        require_own(folder / CHECKPOINTS, folder)
        return path

    with ExitStack() as stack:
        mark("locking the run's folder", True)
        on_first_rank(accelerator, lock, mark)
        yield


def describe_run(
    config: Config,
    run_dir: Path,
    shards: TokenShards,
    optimizer: torch.optim.Optimizer,
    start: Start,
    progress: Progress = no_progress,
) -> None:
    """Write configuration, tokenizer, rule and origin into the run's folder. Call it when nothing can refuse the start any more.

    `progress` is called after each copied file.
    """
    if start.begins and start.origin is not None:
        begin_line(run_dir, start.origin, progress)
    (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    if is_outside(run_dir):
        claim(run_dir / CHECKPOINTS, run_dir)
    finished = not start.begins and start.checkpoint is not None and step_of(start.checkpoint) == config.train.steps
    if not (finished and (run_dir / "config.yaml").is_file()):  # of a finished run, keep the one it trained with
        replace_text(run_dir / "config.yaml", to_yaml(config))
    if config.checkpoint.fallback_dir is not None:
        second = checkpoint_folders(config, run_dir, start.origin)[1].absolute()
        replace_text(run_dir / FALLBACK, str(second))
        with suppress(OSError):  # a disk that cannot be written now
            second.mkdir(parents=True, exist_ok=True)
        claim(second, run_dir)
    copy_tokenizer(shards.folder, run_dir, shards.eot_id)
    if isinstance(optimizer, Celo2):  # keep a copy, because the original file may change or disappear
        save_rule(optimizer.rule, run_dir / RULE_FILE)


def describe_training(config: Config, parameters: int, optimizer: torch.optim.Optimizer, batches: Batches, world: int) -> str:
    """Return a line on model size, optimizer, data and batch size."""
    rule = ""
    if isinstance(optimizer, Celo2):
        name = f", rule {config.optimizer.rule}" if config.optimizer.rule else ""
        rule = f"{name} ({'; '.join(filter(None, (optimizer.rule.description, optimizer.rule.source)))})"
    largest, sizes = config.train.micro_batch_size, batches.sizes
    micro = fit_micro_batch(sizes.sizes[-1], world, largest)
    lowered = f" (train.micro_batch_size is at most {largest}; this divides the batch)" if micro < largest else ""
    ramp = f" at the end (train.ramp: {sizes.text()})" if len(sizes.sizes) > 1 else ""
    return (
        f"{config.run.name}: {parameters:,} parameters, {config.optimizer.name}{rule}; "
        f"{batches.tokens_per_epoch:,} tokens an epoch, {sizes.sizes[-1]} x {batches.context} tokens a step{ramp} = "
        f"{world} process(es) x {sizes.sizes[-1] // (world * micro)} micro-batch(es) of {micro}{lowered}"
    )
