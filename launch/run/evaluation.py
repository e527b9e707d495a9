"""Evaluation during a training run: losses on fixed sets of sequences, and the scores of tasks.

The sequences and tasks are always the same. Scores do not depend on the number of ranks, and losses only by rounding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.evaluation import sets_of
from configs.schema import Config
from data import DataError
from data.batches import IGNORE, MicroBatch, validation_batches, validation_counts
from data.remote import is_remote
from data.shards import EmptySplit, TokenShards
from data.text_bytes import bytes_of_tokens
from data.tokenizer import json_hash, load_tokenizer
from launch.distributed.first_rank import on_first_rank
from launch.distributed.strategy import Strategy
from launch.optimizers.build import set_mode
from launch.run.lm_eval_tasks import LMEvalTasks
from launch.run.mixture import local_data_folder
from launch.run.multiple_choice import MultipleChoice
from launch.run.ranks import Fact, require_same
from launch.run.schedule import due
from launch.run.scoring import Scorer, Stopped, Task
from launch.run.state import RunState


class Evaluation(NamedTuple):
    """The loss of a model on some tokens."""

    loss: float  # mean cross-entropy, nats per token
    tokens: int  # number of targets
    bytes: int  # bytes of the text that the targets stand for; 0: unknown

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The total loss in bits, divided by the bytes of the text in UTF-8; NaN if the bytes are unknown."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan

    def record(self, name: str = "") -> dict[str, float]:
        """Return the entries for metrics.jsonl. `name`: of the validation set; empty for the main one."""
        found = {"val_loss": self.loss, "val_perplexity": self.perplexity}
        found |= {"val_bits_per_byte": self.bits_per_byte} if self.bytes else {}
        return {f"{key}/{name}" if name else key: value for key, value in found.items()}

    def text(self) -> str:
        """Return a text for the terminal."""
        bits = f", {self.bits_per_byte:.4f} bits per byte" if self.bytes else ""
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.4g}{bits}"


def lengths_of_tokens(shards: TokenShards) -> Tensor:
    """Return the bytes of text that each token of a split stands for, (V,) float64; all 0 if the tokenizer cannot tell."""
    try:
        return torch.from_numpy(bytes_of_tokens(shards))
    except DataError:
        raise
    except Exception:  # tokenizers raise errors of many types in decoding; the loss does not need the lengths
        return torch.zeros(shards.vocab_size, dtype=torch.float64)


def add_up(
    loss: Callable[[Tensor, Tensor], Tensor], batches: Iterable[MicroBatch], lengths: Tensor, proceed: Callable[[], bool]
) -> list[float] | None:
    """Return the sums of loss (nats), targets and bytes of text over `batches`; None if `proceed()` was False before a batch."""
    sums = torch.zeros(3, dtype=torch.float64)
    for inputs, targets in batches:
        if not proceed():
            return None
        counted = targets[targets != IGNORE]
        sums += torch.tensor([loss(inputs, targets).item(), counted.numel(), lengths[counted].sum()], dtype=torch.float64)
    return sums.tolist()


class Found(NamedTuple):
    """The result of an evaluation."""

    loss: float  # of the current weights (not their average) on the main validation set
    record: dict[str, float]  # for metrics.jsonl
    lines: list[str]  # for the terminal


class Evaluator:
    """Evaluates the weights of a training run, and their average if there is one, on validation sets and tasks.

    Every rank must construct it at the same point, once `context` (tokens of a sequence) is known.

    Raises:
        ConfigError, DataError: on every rank, for a set or a task that cannot be used.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, validation: TokenShards, context: int, mark: Callable[[str], None]
    ) -> None:
        """`validation`: the main validation set. `mark`: the heartbeat's; it is called before every batch."""
        self.config, self.accelerator, self.context, self.mark = config, accelerator, context, mark
        self.end, self.validation = validation.eot_id, hash_of_set(validation, context, config.eval.sequences)
        self.sets = {"": validation, **open_sets(config, validation)}
        self.lengths = {name: lengths_of_tokens(shards) for name, shards in self.sets.items()}
        if len(self.sets) > 1:
            require_same(accelerator, self.facts)
        self.tasks: list[Task] = []  # empty on all ranks but the first
        if config.eval.tasks or config.eval.lm_eval:
            on_first_rank(accelerator, lambda: self.tasks.extend(open_tasks(config, validation, context)), mark)

    def notes(self, state: RunState) -> list[str]:
        """Return a note if the last evaluation was on another validation set, so that its loss cannot be compared."""
        if not self.config.checkpoint.keep_best or state.validation in (None, self.validation):
            return []
        return [
            "eval.sequences or the weights of data.mix have changed, and so has the validation set: checkpoint.keep_best "
            "compares only losses on the new set"
        ]

    def facts(self) -> list[Fact]:
        """Return the facts that must be the same on all ranks."""
        return [
            Fact(f"the data set of eval.sets.{name}", shards.fingerprint[:12], "let it hold the same data set on every node")
            for name, shards in self.sets.items()
            if name
        ]

    def due(self, state: RunState) -> bool:
        """Return whether to evaluate after the step of `state`."""
        return state.evaluated < state.step and due(state.step, self.config.eval.every, self.config.train.steps)

    def evaluate(self, strategy: Strategy, step: int, stopping: Callable[[], bool]) -> Found | None:
        """Evaluate the weights after `step`, and their average. Returns None if the evaluation was stopped.

        `stopping`: asked before every batch whether to stop; it gives the same answer on every rank.
        """
        average, every = strategy.average, self.config.eval.tasks_every
        tasks = bool(self.config.eval.tasks or self.config.eval.lm_eval) and (
            not every or due(step, every, self.config.train.steps)
        )
        set_mode(strategy.optimizer, "eval")
        try:
            found = self._weights(strategy, tasks, stopping)
            if average is not None and average.begun:
                with average.in_place(strategy.weights_changed):
                    of_average = self._weights(strategy, tasks, stopping)
                found.record.update({f"average/{key}": value for key, value in of_average.record.items()})
                found.lines.extend(f"average: {line}" for line in of_average.lines)
            return found
        except Stopped:
            return None

    @torch.no_grad()
    def _weights(self, strategy: Strategy, tasks: bool, stopping: Callable[[], bool]) -> Found:
        """Evaluate the weights that the model has now on every validation set, and on the tasks if `tasks` is True."""
        found = Found(math.nan, {}, [])
        strategy.loss_model.eval()
        try:
            for name in self.sets:
                of_set = self._set(strategy, name, stopping)
                found.record.update(of_set.record(name))
                found.lines.append(f"validation {of_set.text()}" if not name else f"{name}: {of_set.text()}")
                found = found if name else found._replace(loss=of_set.loss)
            if tasks:
                with torch.compiler.set_stance("force_eager"):  # else each sequence length would be compiled
                    scores = Scorer(
                        strategy, self.context, self.config.train.micro_batch_size, self.end, stopping, self.mark
                    ).run_tasks(self.tasks)
                found.record.update(scores)
                found.lines.extend(in_words(scores))
        finally:
            strategy.loss_model.train()
        return found

    def _set(self, strategy: Strategy, name: str, stopping: Callable[[], bool]) -> Evaluation:
        """Evaluate the current weights on `eval.sequences` sequences of a validation set. Raises Stopped."""
        shards = self.sets[name]
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        rows = self.config.train.micro_batch_size

        def proceed() -> bool:
            self.mark("evaluation")
            return not stopping()

        batches = validation_batches(shards, self.context, self.config.eval.sequences, 1, rank, world, micro_batch_size=rows)
        sums = add_up(strategy.loss, batches, self.lengths[name], proceed)
        if sums is None:
            raise Stopped
        total = torch.tensor(sums, dtype=torch.float64, device=self.accelerator.device)
        return evaluation(*self.accelerator.reduce(total, "sum").tolist())


def hash_of_set(shards: TokenShards, context: int, sequences: int) -> str:
    """Return a hash of the sequences of `context` tokens on which a split is evaluated, `sequences` of them."""
    sources, counts = validation_counts(shards, context, sequences)
    return json_hash(json.dumps([context, sorted(zip((source.fingerprint for source in sources), counts, strict=True))]))


def in_words(scores: dict[str, float]) -> list[str]:
    """Return a line for each task."""
    tasks: dict[str, list[str]] = {}
    for key, score in scores.items():
        task, _, metric = key.rpartition("/")
        tasks.setdefault(task, []).append(f"{metric} {score:.4f}")
    return [f"{task}: {', '.join(metrics)}" for task, metrics in tasks.items()]


def open_sets(config: Config, validation: TokenShards, fetch: bool = True) -> dict[str, TokenShards]:
    """Open the validation sets of `eval.sets`, by name. Without `fetch`, sets behind a URL are left out.

    Raises:
        DataError: a set cannot be read, or was prepared with another tokenizer than the training data.
    """
    sets = {}
    for name, folder, split in sets_of(config):
        if is_remote(folder) and not fetch:
            continue
        try:
            sets[name] = shards = TokenShards(local_data_folder(config, folder), split)
        except EmptySplit as error:
            advice = f"; take its split train: {{dir: {folder}, split: train}}" if split == "val" else ""
            raise DataError(f"eval.sets.{name}: {error.found}{advice}") from None
        except DataError as error:
            raise DataError(f"eval.sets.{name}: {error}") from None
        if shards.tokenizer_hash != validation.tokenizer_hash or shards.eot_id != validation.eot_id:
            raise DataError(
                f"eval.sets.{name}: {folder} has another tokenizer than {validation.folder}: prepare it with "
                f"--tokenizer {validation.folder}"
            )
    return sets


def open_tasks(config: Config, validation: TokenShards, context: int) -> list[Task]:
    """Open the tasks of `eval.tasks` and `eval.lm_eval`. Raises ConfigError for a task that cannot be used."""
    tokenizer, end, most = load_tokenizer(validation.folder), validation.eot_id, config.eval.task_examples
    tasks: list[Task] = [
        MultipleChoice(name, file, tokenizer, end, context, most) for name, file in (config.eval.tasks or {}).items()
    ]
    if config.eval.lm_eval:
        tasks.append(LMEvalTasks(config.eval.lm_eval, config.eval.lm_eval_include, tokenizer, end, context, most))
    return tasks


def evaluation(loss: float, targets: float, length: float) -> Evaluation:
    """Return the Evaluation from the sums of loss (nats), targets and bytes over all batches.

    Raises:
        DataError: there is no target.
    """
    if not targets:
        raise DataError("there is no token to evaluate on")
    return Evaluation(loss / targets, int(targets), round(length))
