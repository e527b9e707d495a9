"""Runs tasks of lm-eval (EleutherAI's lm-evaluation-harness, a separate package) on the model in training.

All data of a task must be on the machine of the first rank when a training run starts: training downloads nothing.
`lm_eval --model dummy --tasks NAME --limit 1` downloads it once.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from configs.load import ConfigError
from data import first_line
from launch.run.scoring import Ask, row

KINDS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")  # output types that need no generated text
FEWSHOT_SEED = 1234  # lm-eval's default


class LMEvalTasks:
    """Tasks and groups of lm-eval by their names."""

    name = "eval.lm_eval"

    def __init__(
        self, names: Sequence[str], include: str | None, tokenizer: Tokenizer, end: int, context: int, most: int | None
    ) -> None:
        """
        Args:
            names: names of tasks and groups.
            include: a folder with further tasks; None: none.
            end: the token that ends a document; it stands before a text that has no context.
            context: tokens of a sequence of the model.
            most: how many documents of each task to take, from the first on; None: all.

        Raises:
            ConfigError: the folder or lm-eval is missing; or a task is unknown, cannot be loaded without a network, or needs
                generated text.
        """
        if include is not None and not Path(include).is_dir():
            raise ConfigError(f"eval.lm_eval_include: {include} is not a folder")
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise ConfigError("eval.lm_eval needs lm-eval, which is not installed (pip install lm-eval)") from None
        self.tokenizer, self.end, self.context, self.most = tokenizer, end, context, most
        with offline():
            manager = TaskManager(include_path=include)
            if unknown := [name for name in names if name not in manager.all_tasks]:
                where = " and eval.lm_eval_include has" if include else " has; eval.lm_eval_include names a folder with others"
                raise ConfigError(f"eval.lm_eval: there is no task {unknown[0]!r} among those that lm-eval{where}")
            self.tasks: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
            for name in dict.fromkeys(names):
                try:
                    loaded = manager.load([name])
                except Exception as error:  # from datasets, huggingface_hub or lm-eval
                    raise ConfigError(
                        f"eval.lm_eval: the data of {name} cannot be loaded without a network ({first_line(error)}); fetch it "
                        f"once, on the machine of the first rank: lm_eval --model dummy --tasks {name} --limit 1"
                    ) from None
                for part, of_task in loaded.items():
                    self.tasks[part] |= of_task
        for name, task in self.tasks["tasks"].items():
            if task.OUTPUT_TYPE not in KINDS:
                raise ConfigError(
                    f"eval.lm_eval: {name} needs generated text ({task.OUTPUT_TYPE}), which training does not make: export the "
                    "model and run lm_eval on that (docs/exports.md)"
                )

    def __call__(self, ask: Ask) -> dict[str, float]:
        """Return every metric of every task and group, without standard errors."""
        from lm_eval.evaluator import evaluate

        for task in self.tasks["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        with offline():
            results = evaluate(self.model(ask), self.tasks, limit=self.most, bootstrap_iters=0, log_samples=False)
        return dict(numbers(results["results"]))

    def model(self, ask: Ask) -> Any:
        """Return a model in the form that lm-eval expects."""
        from lm_eval.api.model import TemplateLM
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        tokenizer, end, context = self.tokenizer, self.end, self.context

        class Model(TemplateLM):
            @property
            def eot_token_id(self) -> int:
                return end

            def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
                return tokenizer.encode(string, add_special_tokens=False).ids

            def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
                scores = ask([row(before, after, context) for _, before, after in requests])
                return [(score, likeliest > 0) for score, likeliest in scores.tolist()]

            def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
                rows, owners = [], []
                for owner, request in enumerate(requests):
                    windows = get_rolling_token_windows(self.tok_encode(request.args[0]), end, context, 1)
                    for before, after in map(make_disjoint_window, windows):
                        rows.append(row(before, after, context))
                        owners.append(owner)
                sums = [0.0] * len(requests)
                for owner, score in zip(owners, ask(rows)[:, 0].tolist(), strict=True):
                    sums[owner] += score
                return sums

            def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
                raise NotImplementedError

        return Model()


def numbers(results: dict[str, dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Yield lm-eval's results by our names: "acc,none" of a task becomes lm_eval/TASK/acc; any other filter stays in the name."""
    for task, found in results.items():
        for metric, value in found.items():
            name, _, answers = metric.partition(",")
            if isinstance(value, int | float) and not name.endswith("_stderr") and answers:
                yield f"lm_eval/{task}/{name}" + ("" if answers == "none" else f",{answers}"), float(value)


@contextmanager
def offline() -> Iterator[None]:
    """In this context, the libraries of Hugging Face read only their caches, and lm-eval shows no progress bars."""
    import datasets
    import huggingface_hub

    places = [(huggingface_hub.constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, True)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)
