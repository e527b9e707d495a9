"""Checks of a configuration before anything is built, for training and for `--plan` alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from celo2.rule_files import RuleError
from celo2.training.configuration import Written
from celo2.training.folder import UnsafeFolder, check_no_file
from celo2.training.idle import refuse_idle
from configs.evaluation import sets_of
from configs.length import batch_sizes
from configs.load import ConfigError
from configs.mixture import mix_sources
from configs.schema import Config
from data.batches import fit_micro_batch
from data.shards import TokenShards
from data.tokenizer import load_tokenizer
from launch.checkpoint.folders import CHECKPOINTS
from launch.checkpoint.verify import MANIFEST, list_checkpoints
from launch.optimizers.build import check_optimizer
from launch.optimizers.idle import IDLE
from launch.optimizers.table import entry_of
from launch.run.pinned_rule import copy_of_run, with_pinned_rule
from launch.run.setup import run_folder

DTYPE_KEYS = ("dtype", "torch_dtype")


def check(config: Config, written: Written, world: int) -> list[str]:
    """Check `config` for `world` processes. `written`: the options that the file and the command line give.

    Returns notes on settings that have no effect or that the optimizer's authors advise against.

    Raises:
        ConfigError, DataError, RuleError: the configuration is invalid, or training would ignore a written option.
    """
    notes = [*refuse_idle(config, IDLE, written), *unmet_needs(config)]
    try:
        check_optimizer(with_pinned_rule(config).optimizer)
    except RuleError as error:
        copy = copy_of_run(config)
        raise RuleError(f"{error}; this run has a copy: optimizer.rule={copy}" if copy else str(error)) from None
    strategy, copies = config.distributed.strategy, config.distributed.replicas
    if strategy != "ddp" and entry_of(config.optimizer).sharded_path is None:
        raise ConfigError(
            f"optimizer.name {config.optimizer.name} does not support sharded parameters: use distributed.strategy=ddp"
        )
    if config.distributed.offload and (entry_of(config.optimizer).takes_rule or entry_of(config.optimizer).orthogonalizes):
        raise ConfigError(
            f"distributed.offload: optimizer.name {config.optimizer.name} must run on the GPU, only adamw can run on the host; "
            "to save GPU memory use more ranks, or optimizer.state_dtype=bf16 for a rule"
        )
    if world % copies:
        raise ConfigError(f"distributed.replicas is {copies}, which does not divide {world} processes")
    if config.schedule.kind == "wsd" and config.schedule.warmup + config.schedule.decay > 1:
        raise ConfigError("schedule.warmup and schedule.decay are more than 1 together: the decay would begin in the warm-up")
    if config.schedule.start >= config.train.steps and not config.schedule.cooldown:
        raise ConfigError(f"schedule.start is {config.schedule.start}, but the run ends after train.steps={config.train.steps}")
    window, last = config.log.profile, config.train.steps
    in_order = window is None or (len(window) == 2 and 1 <= window[0] <= window[1])
    if not in_order or (window is not None and window[1] > last and not config.schedule.cooldown):
        raise ConfigError(f"log.profile is {window}, expected a first and a last step, such as [10, 12], between 1 and {last}")
    check_model_keys(config)
    check_folders(config)
    if not config.schedule.cooldown:
        late = changes_after(config, last)
        notes += [f"{name} changes at step {step}, which the run with train.steps={last} does not reach" for name, step in late]
    for size in batch_sizes(vars(config.train)).sizes:
        name = "train.batch_size" if size == config.train.batch_size else "a size of train.ramp"
        fit_micro_batch(size, world, config.train.micro_batch_size, name)
    return notes


def unmet_needs(config: Config) -> list[str]:
    """Return a note on each option that differs from the value for which the optimizer was made."""
    notes = []
    for need in entry_of(config.optimizer).needs:
        option, _, wanted = need.partition("=")
        section, _, key = option.partition(".")
        given = getattr(getattr(config, section), key)
        if str(given) != wanted:
            notes.append(f"optimizer.name {config.optimizer.name} is made for {need}, but {option} is {given}")
    return notes


def changes_after(config: Config, last: int) -> list[tuple[str, int]]:
    """Return (option, step) for changes of batch size and of mixture weights that come too late for a run of `last` steps."""
    weights = [] if config.data.mix is None else [(f"data.mix[{i}].weight", s.weights) for i, s in enumerate(mix_sources(config))]
    found: list[tuple[str, Mapping]] = [("train.ramp", config.train.ramp or {}), *weights]
    return [(name, int(step)) for name, changes in found for step in changes if int(step) >= last]


def prompt_notes(config: Config, shards: TokenShards, context: int) -> list[str]:
    """Return a note if the prompt of the sample fills the whole context (tokens). It is only a note: training can go ahead."""
    if not (config.log.sample_tokens and config.log.sample_prompt):
        return []
    length = len(load_tokenizer(shards.folder).encode(config.log.sample_prompt, add_special_tokens=False).ids)
    if length < context:
        return []
    return [f"log.sample_prompt has {length} tokens, the context {context}: the model will see the last {context // 2} of them"]


def check_folders(config: Config) -> None:
    """Raise ConfigError if a folder of the run is a file, lies below a file, or belongs to another run or to the data."""
    folders: dict[str, str | Path | None] = {"run.dir": run_folder(config)}
    folders |= {"checkpoint.fallback_dir": config.checkpoint.fallback_dir, "data.cache_dir": config.data.cache_dir}
    for option, folder in folders.items():
        try:
            if folder is not None:
                check_no_file(Path(folder).expanduser())
        except UnsafeFolder as error:
            raise ConfigError(f"{option}: {error}") from None
    for option in ("run.dir", "checkpoint.fallback_dir"):
        if (folder := folders[option]) is not None and (taken := among_checkpoints(Path(folder).resolve())) is not None:
            raise ConfigError(
                f"{option} {folder} is in {taken}, whose run deletes old checkpoints with all that is in them: name another "
                "folder; to resume from a checkpoint, use checkpoint.resume"
            )
    data = [config.data.dir] if config.data.mix is None else [source.dir for source in mix_sources(config)]
    data += [validation.dir for validation in sets_of(config)]
    run = run_folder(config)
    if run.resolve() in [Path(name).resolve() for name in data if name is not None]:
        raise ConfigError(f"run.dir {run} is the folder of the data: choose another run.dir")


def among_checkpoints(folder: Path) -> Path | None:
    """Return the checkpoint or checkpoint folder that contains, or is, the resolved `folder`; None if there is none."""
    for path in (folder, *folder.parents):
        if is_checkpoint(path) or (path.name == CHECKPOINTS and any(map(is_checkpoint, list_checkpoints(path)))):
            return path
    return None


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a checkpoint, under any name."""
    return (path / MANIFEST).is_file() and (path / "state.json").is_file()


def check_model_keys(config: Config) -> None:
    """Raise ConfigError for keys of `model.hf` that contradict another option."""
    hf = config.model.hf or {}
    for name, keys in [("model.hf", hf), *((f"model.hf.{key}", value) for key, value in hf.items() if isinstance(value, dict))]:
        for key in DTYPE_KEYS:
            if str(keys.get(key, "float32")).removeprefix("torch.") not in ("float32", "fp32"):
                raise ConfigError(
                    f"{name}.{key} is {keys[key]}, but train.precision decides, which is {config.train.precision}: weights are "
                    "float32, and bf16 is autocast; leave the key out"
                )
    if config.model.vocab_size is not None and hf.get("vocab_size", config.model.vocab_size) != config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size}, but model.hf.vocab_size is {hf['vocab_size']}: give one"
        )
