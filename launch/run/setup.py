"""What a run is made of and what it leaves behind: data and model from the configuration, its folder, its state."""

from __future__ import annotations

import shutil
import uuid
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from configs.load import ConfigError, to_yaml
from configs.schema import Config
from data.batches import Batches
from data.shards import TokenShards
from launch.checkpoint.save import CheckpointError, Saver, find_checkpoint, load_checkpoint, read_state, tidy, verify
from launch.distributed.strategy import Strategy
from launch.monitoring.guard import Diverged
from launch.monitoring.metrics import flat
from models import CausalLMLoss, build_model, check_matches_logits

MAX_ROLLBACKS = 10
VOCABULARY_MULTIPLE = 64  # matrix units work on multiples of 64; the rows beyond the tokenizer's are never a target


@dataclass
class RunState:
    """Where a run stands, after `step` optimizer steps."""

    step: int = 0
    tokens: int = 0  # targets trained on
    seconds: float = 0.0  # in training steps, over all starts; without evaluation and checkpoints
    evaluated: int = 0  # the step of the last evaluation
    bad_steps: int = 0  # steps that were skipped because loss or gradient norm was not finite
    rollbacks: int = 0
    skipped: list[tuple[int, int]] = field(default_factory=list)  # ranges of batches that rollbacks left out (data.order)
    tracker_ids: dict[str, str] = field(default_factory=dict)  # runs of trackers that a resume continues

    def finish_step(self, tokens: int, seconds: float, healthy: bool) -> None:
        """Count one step."""
        self.step, self.tokens, self.seconds = self.step + 1, self.tokens + tokens, self.seconds + seconds
        self.bad_steps += not healthy


def open_data(config: Config) -> tuple[TokenShards, TokenShards]:
    """The training and the validation split of `data.dir`."""
    if config.data.dir is None:
        raise ConfigError("data.dir is missing: prepare a folder with python -m data.prepare SOURCE FOLDER and name it")
    return TokenShards(config.data.dir, "train"), TokenShards(config.data.dir, "val")


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
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and longest < config.model.context:
        raise ConfigError(f"model.context is {config.model.context}, but the model has {longest} positions")
    if device != "meta":
        check_matches_logits(CausalLMLoss(model))
    return model, config.model.context


def folder_of(config: Config) -> Path:
    """The run's folder."""
    return Path(config.run.dir or f"runs/{config.run.name}")


def open_run(config: Config, accelerator: Accelerator) -> Path:
    """The run's folder, with what a killed start left behind put in order; an earlier run is never overwritten.

    Raises:
        ConfigError: the folder holds a run and `checkpoint.resume` is "never".
    """
    run_dir = folder_of(config)
    if config.checkpoint.resume == "never" and (run_dir / "metrics.jsonl").exists():
        raise ConfigError(f"{run_dir} holds a run already: choose another run.dir, or checkpoint.resume=auto to continue it")
    if accelerator.is_main_process:
        tidy(run_dir / "checkpoints")
    accelerator.wait_for_everyone()  # before the others look for what the first rank has put in order
    return run_dir


def describe_run(config: Config, run_dir: Path) -> None:
    """Write the resolved configuration and the tokenizer into the run's folder, once nothing more can refuse the start."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    shutil.copyfile(Path(config.data.dir) / "tokenizer.json", run_dir / "tokenizer.json")


def resume(config: Config, run_dir: Path, strategy: Strategy, shards: TokenShards) -> tuple[RunState, list[str]]:
    """Continue as `checkpoint.resume` says; returns the state and what a person should know.

    Raises:
        CheckpointError: a checkpoint of another model, optimizer, data set or batch order, naming the difference; or
            checkpoints of which none is whole.
    """
    notes: list[str] = []
    path: Path | None = None
    if config.checkpoint.resume == "auto":
        path, notes = find_checkpoint(run_dir / "checkpoints")
        if path is None and notes:  # starting anew would throw the run away
            raise CheckpointError(f"{run_dir}: no checkpoint is whole ({'; '.join(notes)}); choose another run.dir to start anew")
    elif config.checkpoint.resume != "never":
        path = Path(config.checkpoint.resume)
        verify(path)
    if path is None:
        return RunState(tracker_ids={"wandb": uuid.uuid4().hex} if "wandb" in config.log.trackers else {}), notes
    saved = read_state(path)
    for key, value in identity(config, shards).items():
        if saved["identity"].get(key) != value:
            raise CheckpointError(f"{path}: its {key} is {saved['identity'].get(key)}, this run's is {value}")
    if saved["step"] > config.train.steps:
        raise CheckpointError(f"{path} is at step {saved['step']}, beyond train.steps={config.train.steps}")
    load_checkpoint(path, strategy)
    before, now = flat(saved["config"]), flat(asdict(config))
    changes = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
    notes.append(f"resumed from {path}" + (f" with {', '.join(changes)}" if changes else ""))
    return state_from(saved), notes


def state_from(saved: dict[str, Any]) -> RunState:
    """The run's state in a checkpoint's state.json."""
    state = RunState(**{f.name: saved[f.name] for f in fields(RunState)})
    return replace(state, skipped=[(start, stop) for start, stop in state.skipped])


def roll_back(run_dir: Path, state: RunState, batches: Batches, strategy: Strategy, saver: Saver) -> RunState:
    """Go back to the newest checkpoint, to go on from there without the batches that were taken since.

    Raises:
        Diverged: no checkpoint to go back to, or too many rollbacks.
    """
    saver.wait()
    strategy.accelerator.wait_for_everyone()
    path, _ = find_checkpoint(run_dir / "checkpoints")
    if path is None:
        raise Diverged(f"step {state.step}: no checkpoint to roll back to")
    if state.rollbacks >= MAX_ROLLBACKS:
        raise Diverged(f"step {state.step}: {MAX_ROLLBACKS} rollbacks did not help")
    load_checkpoint(path, strategy)
    back = state_from(read_state(path))
    start, stop = batches.data_step(back.step), batches.data_step(state.step - 1) + 1
    skipped = [r for r in state.skipped if not start <= r[0] < stop] + [(start, stop)]  # the new range holds those inside it
    strategy.accelerator.wait_for_everyone()  # the checkpoint is about to be written anew, with what is left out
    return replace(back, bad_steps=state.bad_steps, rollbacks=state.rollbacks + 1, skipped=skipped)


def identity(config: Config, shards: TokenShards) -> dict[str, Any]:
    """What must not change between the starts of one run, because the data of a step would be others."""
    return {
        "data set": shards.fingerprint,
        "run.seed": config.run.seed,
        "train.batch_size": config.train.batch_size,
        "model.context": config.model.context,
        "optimizer.name": config.optimizer.name,
    }


def saved_state(config: Config, state: RunState, shards: TokenShards) -> dict[str, Any]:
    """The contents of a checkpoint's state.json."""
    return asdict(state) | {"identity": identity(config, shards), "config": asdict(config)}
