"""What is evaluated while a training run goes: losses on fixed sets of sequences, and the scores of tasks.

All are the same whatever the training did and however many ranks there are; losses to within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from configs.evaluation import sets_of
from configs.schema import Config
from data import DataError
from data.batches import IGNORE, MicroBatch, validation_batches
from data.remote import is_remote
from data.shards import EmptySplit, TokenShards
from data.text_bytes import bytes_of_tokens
from data.tokenizer import load_tokenizer
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
    """What a model makes of some tokens."""

    loss: float  # mean cross-entropy, nats per token
    tokens: int  # targets
    bytes: int  # of the text that they stand for; 0: unknown

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the text takes when the model predicts it, over its bytes in UTF-8; NaN where these are unknown."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan

    def record(self, name: str = "") -> dict[str, float]:
        """For metrics.jsonl; `name` of the set, empty for the main one."""
        found = {"val_loss": self.loss, "val_perplexity": self.perplexity}
        found |= {"val_bits_per_byte": self.bits_per_byte} if self.bytes else {}
        return {f"{key}/{name}" if name else key: value for key, value in found.items()}

    def text(self) -> str:
        """For a person."""
        bits = f", {self.bits_per_byte:.4f} bits per byte" if self.bytes else ""
        return f"loss {self.loss:.4f}, perplexity {self.perplexity:.4g}{bits}"


def lengths_of_tokens(shards: TokenShards) -> Tensor:
    """Bytes (V,) float64 of text that each token of a split stands for; all 0 where its tokenizer cannot tell."""
    try:
        return torch.from_numpy(bytes_of_tokens(shards))
    except DataError:
        raise
    except Exception:  # what a tokenizer raises while it decodes is its own; the loss does not need it
        return torch.zeros(shards.vocab_size, dtype=torch.float64)


def add_up(
    loss: Callable[[Tensor, Tensor], Tensor], batches: Iterable[MicroBatch], lengths: Tensor, proceed: Callable[[], bool]
) -> list[float] | None:
    """The sums of loss (nats), targets and bytes of text over `batches`; None if `proceed`, asked before each, said no."""
    sums = torch.zeros(3, dtype=torch.float64)
    for inputs, targets in batches:
        if not proceed():
            return None
        counted = targets[targets != IGNORE]
        sums += torch.tensor([loss(inputs, targets).item(), counted.numel(), lengths[counted].sum()], dtype=torch.float64)
    return sums.tolist()


class Found(NamedTuple):
    """What an evaluation found."""

    loss: float  # of the weights that train, on the main validation set
    record: dict[str, float]  # for metrics.jsonl
    lines: list[str]  # for a person


class Evaluator:
    """What of a training run is evaluated: its weights, and their average where there is one, on validation sets and tasks.

    Every rank must make it at the same place, once `context`, the tokens of a sequence, is known.

    Raises:
        ConfigError, DataError: a set or a task that cannot be used, on every rank.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, validation: TokenShards, context: int, mark: Callable[[str], None]
    ) -> None:
        """`validation`: the main set; `mark`: the heartbeat's, called before every batch."""
        self.config, self.accelerator, self.context, self.mark = config, accelerator, context, mark
        self.end = validation.eot_id
        self.sets = {"": validation, **open_sets(config, validation)}
        self.lengths = {name: lengths_of_tokens(shards) for name, shards in self.sets.items()}
        if len(self.sets) > 1:
            require_same(accelerator, self.facts)
        self.tasks: list[Task] = []  # on the first rank alone
        if config.eval.tasks or config.eval.lm_eval:
            on_first_rank(accelerator, lambda: self.tasks.extend(open_tasks(config, validation, context)), mark)

    def facts(self) -> list[Fact]:
        """What must be the same on all ranks."""
        return [
            Fact(f"the data set of eval.sets.{name}", shards.fingerprint[:12], "let it hold the same data set on every node")
            for name, shards in self.sets.items()
            if name
        ]

    def due(self, state: RunState) -> bool:
        """Whether to evaluate after the step of `state`."""
        return state.evaluated < state.step and due(state.step, self.config.eval.every, self.config.train.steps)

    def evaluate(self, strategy: Strategy, step: int, stopping: Callable[[], bool]) -> Found | None:
        """Evaluate the weights after `step`, and their average; None if it was stopped.

        `stopping`: asked before every batch whether to stop, on every rank alike.
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
        """What the weights that are in place make of every set, and if `tasks` of the tasks."""
        found = Found(math.nan, {}, [])
        strategy.loss_model.eval()
        try:
            for name in self.sets:
                of_set = self._set(strategy, name, stopping)
                found.record.update(of_set.record(name))
                found.lines.append(f"validation {of_set.text()}" if not name else f"{name}: {of_set.text()}")
                found = found if name else found._replace(loss=of_set.loss)
            if tasks:
                with torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
                    scores = Scorer(
                        strategy, self.context, self.config.train.micro_batch_size, self.end, stopping, self.mark
                    ).run_tasks(self.tasks)
                found.record.update(scores)
                found.lines.extend(in_words(scores))
        finally:
            strategy.loss_model.train()
        return found

    def _set(self, strategy: Strategy, name: str, stopping: Callable[[], bool]) -> Evaluation:
        """The weights on `eval.sequences` sequences of a set. Raises Stopped."""
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


def in_words(scores: dict[str, float]) -> list[str]:
    """A line for each task."""
    tasks: dict[str, list[str]] = {}
    for key, score in scores.items():
        task, _, metric = key.rpartition("/")
        tasks.setdefault(task, []).append(f"{metric} {score:.4f}")
    return [f"{task}: {', '.join(metrics)}" for task, metrics in tasks.items()]


def open_sets(config: Config, validation: TokenShards, fetch: bool = True) -> dict[str, TokenShards]:
    """The sets of `eval.sets` by name; without `fetch` those that are on this machine.

    Raises:
        DataError: a set that cannot be read, or that was prepared with another tokenizer than the data that is trained on.
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
    """The tasks of `eval.tasks` and `eval.lm_eval`. Raises ConfigError for one that cannot be used."""
    tokenizer, end, most = load_tokenizer(validation.folder), validation.eot_id, config.eval.task_examples
    tasks: list[Task] = [
        MultipleChoice(name, file, tokenizer, end, context, most) for name, file in (config.eval.tasks or {}).items()
    ]
    if config.eval.lm_eval:
        tasks.append(LMEvalTasks(config.eval.lm_eval, config.eval.lm_eval_include, tokenizer, end, context, most))
    return tasks


def evaluation(loss: float, targets: float, length: float) -> Evaluation:
    """From the sums over all batches.

    Raises:
        DataError: not a single target.
    """
    if not targets:
        raise DataError("there is no token to evaluate on")
    return Evaluation(loss / targets, int(targets), round(length))
