"""Loads checkpoints that `launch.checkpoint.verify` has found whole, into a strategy or as a model."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from celo2.distributed.shard import LocalShard
from celo2.state import REPLICATED
from configs.average import average_of
from configs.schema import Config, Train
from data.files import read_json
from launch.checkpoint.state import read_state
from launch.checkpoint.tensors import TensorFiles, files_of, is_there, read_tensors
from launch.checkpoint.verify import AVERAGE, MODEL, OPTIMIZER, CheckpointError
from launch.checkpoint.writer import Progress, no_progress
from launch.distributed.buffers import persistent_buffers
from launch.distributed.gather import keeps_state
from launch.distributed.strategy import Strategy
from models.experts import fit_experts
from models.foreign import ForeignCode, refuse_code, without_auto_map


def optimizer_bytes(path: Path) -> int | None:
    """Return the bytes of optimizer state in a checkpoint, from the headers of its files; None if the files are not whole."""
    size = 0
    try:
        for file in files_of(path / OPTIMIZER):
            with file.open("rb") as opened:
                header = int.from_bytes(opened.read(8), "little")
            of_file = file.stat().st_size - 8 - header
            if of_file < 0:
                return None
            size += of_file
    except (OSError, ValueError):
        return None
    return size


def load_checkpoint(path: Path, strategy: Strategy, progress: Progress = no_progress) -> None:
    """Fill this rank's weights and optimizer state from a checkpoint, tensor by tensor through CPU memory.

    `progress` is called after each tensor.

    Raises:
        CheckpointError: the checkpoint is of another model or optimizer (the message names the difference), or a file has the
            right hash but invalid content.
    """
    try:
        with torch.no_grad():
            load_weights(path, strategy, progress)
            load_optimizer_state(path, strategy, progress)
            load_average(path, strategy, progress)
    except CheckpointError:
        raise
    except (ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    strategy.weights_changed()


def load_weights(path: Path, strategy: Strategy, progress: Progress = no_progress) -> None:
    """Fill this rank's weights and buffers."""
    with TensorFiles(path / MODEL) as file:
        require_same_names(path, "weights", [*strategy.shards, *strategy.buffers], file.keys())
        for name, shard in strategy.shards.items():
            require_same_shape(path, name, shard.local_shard.shape, file.get_slice(name).get_shape())
            shard.weight.copy_(read_shard(file, name, shard.local_shard))
            progress()
        for name, buffer in strategy.buffers.items():
            require_same_shape(path, name, buffer.shape, file.get_slice(name).get_shape())
            buffer.copy_(file.get_tensor(name))


def load_optimizer_state(path: Path, strategy: Strategy, progress: Progress = no_progress) -> None:
    """Fill the optimizer state that this rank keeps. Existing state keeps its dtype, whatever dtype was saved."""
    with TensorFiles(path / OPTIMIZER) as file:
        saved: dict[str, list[str]] = defaultdict(list)
        for entry in file.keys():  # noqa: SIM118
            name, _, key = entry.rpartition("/")
            if name not in strategy.shards:
                raise CheckpointError(f"{path}: optimizer state of '{name}', a parameter that the model lacks")
            saved[name].append(key)
        for name, shard in strategy.shards.items():
            if not keeps_state(strategy, shard):
                continue
            state = strategy.optimizer.state.get(shard.weight) or None  # None: made in the first step
            if state is not None:
                # `count` exists only with bfloat16 accumulators. If none was saved, it starts at 0.
                names = state.keys() - {"count"}, set(saved[name]) - {"count"}
                require_same_names(path, f"optimizer state of '{name}'", *names)
                if "count" in state:
                    state["count"].zero_()
            for key in saved[name]:
                entry = f"{name}/{key}"
                value = file.get_tensor(entry) if key in REPLICATED else read_shard(file, entry, shard.local_shard)
                if state is None:
                    strategy.optimizer.state[shard.weight][key] = value.to(shard.weight.device)
                elif key in state:
                    require_same_shape(path, entry, state[key].shape, value.shape)
                    state[key].copy_(value)
                progress()


def load_average(path: Path, strategy: Strategy, progress: Progress = no_progress) -> None:
    """Fill the average of the weights, if the training run keeps one.

    The average starts from nothing if the checkpoint has none of the same kind, or one that began earlier. The latter happens to
    a tail average when a run is extended.
    """
    average = strategy.average
    if average is None:
        return
    average.begin_anew()
    state = read_state(path)
    saved, train = state.get("average", {}), state["config"]["train"]
    if saved.get("kind") != average.options.kind:
        return
    options = average_of(Config(train=Train(steps=train["steps"], average=train["average"])))
    if options is None or options.start < average.options.start:
        return
    with TensorFiles(path / AVERAGE) as file:
        require_same_names(path, "average", [*strategy.shards, *strategy.buffers], file.keys())
        for name, shard in strategy.shards.items():
            require_same_shape(path, name, shard.local_shard.shape, file.get_slice(name).get_shape())
            average.means[name].copy_(read_shard(file, name, shard.local_shard))
            progress()
    average.go_on(saved["members"])


def read_shard(file: TensorFiles, entry: str, local_shard: LocalShard) -> Tensor:
    """Read the part of the tensor `entry` (..., *shape) that belongs to a local shard (..., n), which may be all of it."""
    if local_shard.whole:
        return file.get_tensor(entry)
    part, shape = file.get_slice(entry), local_shard.shape
    row = math.prod(shape[1:])
    first, last = local_shard.start // row, -(-local_shard.stop // row)
    leading = len(part.get_shape()) - len(shape)
    rows = part[(*[slice(None)] * leading, slice(first, max(first, last)))]
    flat = rows.reshape(*rows.shape[:leading], -1)
    return flat[..., local_shard.start - first * row : local_shard.stop - first * row]


def require_same_names(path: Path, what: str, own: Collection[str], saved: Collection[str]) -> None:
    """Raise CheckpointError if two sets of names differ. The message gives one name of the difference."""
    missing, extra = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    if missing or extra:
        which = f"'{missing[0]}' is missing from" if missing else f"this run has no '{extra[0]}', which is in"
        raise CheckpointError(f"{path} is from another model or optimizer: {which} its {what}; {weights_alone(path)}")


def require_same_shape(path: Path, name: str, own: Sequence[int], saved: Sequence[int]) -> None:
    """Raise CheckpointError if a saved tensor has another shape."""
    if tuple(own) != tuple(saved):
        problem = f"'{name}' has shape {tuple(saved)} there and {tuple(own)} in this run"
        raise CheckpointError(f"{path} is from another model: {problem}; {weights_alone(path)}")


def weights_alone(path: Path) -> str:
    """Return, for error messages, the remedy for a checkpoint that does not fit."""
    return f"choose another run.dir and set model.init={path} to start from its weights and architecture"


def read_config(path: Path) -> dict[str, Any]:
    """Return the entries of config.json in `path`. Raises CheckpointError if the file is missing or damaged."""
    file = path / "config.json"
    try:
        return dict(read_json(file))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"cannot read {file}: {' '.join(str(error).split())}") from None


def read_model_config(path: Path) -> PretrainedConfig:
    """Return the transformers configuration in `path`. Never runs code from outside.

    Raises:
        CheckpointError: the file is missing, cannot be read, or needs code from outside.
    """
    file = path / "config.json"
    try:
        refuse_code(read_config(path), str(file))
        return without_auto_map(AutoConfig.from_pretrained(file, trust_remote_code=False))
    except (ForeignCode, CheckpointError) as error:
        raise CheckpointError(str(error)) from None
    except Exception as error:  # transformers raises many types of errors
        raise CheckpointError(f"cannot read {file}: {' '.join(str(error).split())}") from error


def weights_file(path: Path, average: bool) -> str:
    """Return the file name of a checkpoint's weights or of their average. Raises CheckpointError if there is no average."""
    if average and not is_there(path / AVERAGE):
        raise CheckpointError(
            f"{path} holds no average of the weights: train with train.average, and choose a checkpoint from after its start"
        )
    return AVERAGE if average else MODEL


def load_model(path: Path, config: PretrainedConfig | None = None, average: bool = False) -> PreTrainedModel:
    """Load the model of a checkpoint on the CPU, in the checkpoint's dtype and in evaluation mode.

    `config` replaces the checkpoint's own configuration: the same function, but perhaps with another dropout. `average`: load
    the average of the weights.

    Raises:
        CheckpointError: a file is missing or cannot be read, or the weights do not fit the configuration.
    """
    weights_name = weights_file(path, average)
    for name in ("config.json", weights_name):
        if not is_there(path / name):
            raise CheckpointError(f"{path} has no {name}")
    config = config or read_model_config(path)
    try:
        weights = read_tensors(path / weights_name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    try:
        model = AutoModelForCausalLM.from_config(config)
        fit_experts(model)
    except Exception as error:  # model classes raise many types of errors for invalid values
        raise CheckpointError(f"{path / 'config.json'} describes no model: {' '.join(str(error).split())}") from error
    own = dict(model.named_parameters()) | persistent_buffers(model)
    for problem, names in (
        ("lacks", own.keys() - weights.keys()),
        ("has unknown", weights.keys() - own.keys()),
        ("has misshapen", {n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape}),
    ):
        if names:
            raise CheckpointError(f"{path / weights_name} {problem} weights: {', '.join(sorted(names)[:3])}")
    for name, tensor in own.items():
        tensor.data = weights[name]  # takes the checkpoint's dtype
    return model.eval()
