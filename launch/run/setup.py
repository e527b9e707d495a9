"""What a training run is made of: its data, its model and its folder, from the configuration."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from celo2 import Celo2
from configs.load import ConfigError, to_yaml
from configs.schema import Config
from data.batches import Batches, prefetch
from data.shards import TokenShards
from launch.checkpoint.save import remove_leftovers
from launch.run.state import RunState
from models import build_model, choose_loss, longest_context

VOCABULARY_MULTIPLE = 64  # matrix units work on multiples of 64; the rows beyond the tokenizer's are never a target


def open_data(config: Config) -> tuple[TokenShards, TokenShards]:
    """The training and the validation split of `data.dir`."""
    if config.data.dir is None:
        raise ConfigError("data.dir is missing: prepare a folder with python -m data.prepare SOURCE FOLDER and name it")
    return TokenShards(config.data.dir, "train"), TokenShards(config.data.dir, "val")


def open_batches(
    config: Config, shards: TokenShards, context: int, state: RunState, accelerator: Accelerator
) -> tuple[Batches, Iterator]:
    """The order of the batches, and a stream of this rank's micro-batches from the step of `state` on."""
    batches = Batches(shards, context, config.train.batch_size, config.run.seed, state.skipped)
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
    """Rows of the embedding for a tokenizer of `tokenizer_size` tokens."""
    wanted = config.model.vocab_size
    if wanted is None:
        return -(-tokenizer_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if wanted < tokenizer_size:
        raise ConfigError(f"model.vocab_size is {wanted}, but the data has tokens up to {tokenizer_size - 1}")
    return wanted


def build_from_config(config: Config, vocab_size: int, device: str | None = None) -> tuple[PreTrainedModel, int]:
    """The model of `config` and the context T (tokens) it trains on."""
    options = asdict(config.model) | {"vocab_size": vocab_size, "device": device}
    if config.model.hf is None:
        model = build_model(**options)
        return model, model.config.max_position_embeddings
    if config.model.context is None:
        raise ConfigError("model.context is missing: with model.hf, say how many tokens a training sequence has")
    model = build_model(**options | {"context": None})
    longest = longest_context(model.config)
    if longest is not None and longest < config.model.context:
        raise ConfigError(f"model.context is {config.model.context}, but the model has {longest} positions")
    if device != "meta":
        choose_loss(model)
    return model, config.model.context


def run_folder(config: Config) -> Path:
    """The folder of the training run."""
    return Path(config.run.dir or f"runs/{config.run.name}")


def open_run(config: Config, accelerator: Accelerator) -> Path:
    """The run's folder, without the leftovers of a killed process. An earlier run is never overwritten.

    Raises:
        ConfigError: the folder holds a run and `checkpoint.resume` is "never".
    """
    run_dir = run_folder(config)
    if config.checkpoint.resume == "never" and (run_dir / "metrics.jsonl").exists():
        raise ConfigError(f"{run_dir} holds a run already: choose another run.dir, or checkpoint.resume=auto to continue it")
    if accelerator.is_main_process:
        remove_leftovers(run_dir / "checkpoints")
    accelerator.wait_for_everyone()  # before the other ranks look for checkpoints
    return run_dir


def describe_run(config: Config, run_dir: Path, shards: TokenShards) -> None:
    """Write the resolved configuration and the tokenizer into the run's folder, once nothing more can refuse the start."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    shutil.copyfile(shards.folder / "tokenizer.json", run_dir / "tokenizer.json")


def describe_training(config: Config, parameters: int, optimizer: torch.optim.Optimizer, batches: Batches, world: int) -> str:
    """The line that says what is trained, on what, with what."""
    rule = f" ({optimizer.rule.description})" if isinstance(optimizer, Celo2) else ""
    accumulation = config.train.batch_size // (world * config.train.micro_batch_size)
    return (
        f"{config.run.name}: {parameters:,} parameters, {config.optimizer.name}{rule}; "
        f"{batches.tokens_per_epoch:,} tokens an epoch, {config.train.batch_size} x {batches.context} tokens a step = "
        f"{world} process(es) x {accumulation} micro-batch(es) of {config.train.micro_batch_size}"
    )
