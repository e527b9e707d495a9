"""The summary of a run: a picture of the loss and a sample of the model's text, at evaluations and at the end.

During the run, summaries take at most about a tenth of the time: an evaluation soon after the last summary writes none.

An error in this module never stops a training run; it becomes a warning.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from celo2.training.metrics import read_metrics
from configs.schema import Config
from data.files import replacing
from data.tokenizer import load_tokenizer
from launch.checkpoint.load import load_model
from launch.checkpoint.verify import list_checkpoints, step_of
from launch.checkpoint.writer import Progress, no_progress
from launch.run.layers_picture import draw_layers
from launch.run.sampling import after, sample_text

SAMPLE_SECONDS = 60.0  # a sample is cut off after this time, because the other ranks wait for the first one
SHARE = 0.1  # most of the run's time that summaries during the run may take
Say = Callable[[str], None]


@contextmanager
def warning(what: str, say: Say) -> Iterator[None]:
    """In this context, any exception becomes a warning line, which begins with `what`."""
    try:
        yield
    except Exception as error:
        say(f"warning: {what}: {' '.join(str(error).split()) or type(error).__name__}")


class Summary:
    """Writes `loss.png` and `sample.txt` into a run's folder, and prints the last lines of a run. Only the first rank uses it.

    Args:
        folders: the folders with the checkpoints of the run.
        end: the token that ends a document.
        context: tokens of a sequence, T.
        say: shows a line to the user.
        stopping: whether to cut a sample off.
        progress: the heartbeat's; it is called during the work.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        folders: Sequence[Path],
        end: int,
        context: int,
        say: Say,
        stopping: Callable[[], bool],
        progress: Progress = no_progress,
    ) -> None:
        self.config, self.run_dir, self.folders, self.end, self.context = config, run_dir, folders, end, context
        self.say, self.stopping, self.progress = say, stopping, progress
        self.due = 0.0  # earliest time of the next summary during the run, on the clock of time.monotonic

    def update(self, model: PreTrainedModel | None) -> None:
        """Write a summary during the run: the loss so far and a sample of `model`. Does nothing soon after the last one."""
        begin = time.monotonic()
        if begin >= self.due:
            self.write(model)
            end = time.monotonic()
            self.due = end + (end - begin) / SHARE

    def write(self, model: PreTrainedModel | None) -> str | None:
        """Draw the loss so far and write a sample of `model`, if there is one. Returns the sample."""
        with warning("no loss.png", self.say):
            records = read_metrics(self.run_dir / "metrics.jsonl")
            draw_losses(records, self.run_dir / "loss.png", self.config.run.name)
        if self.config.log.layers:
            with warning("no layers.png", self.say):
                draw_layers(records, self.run_dir / "layers.png", self.config.run.name)
        self.progress()
        if model is None or not self.config.log.sample_tokens:
            return None
        with warning("no sample.txt", self.say):
            log, seed = self.config.log, self.config.run.seed
            tokenizer = load_tokenizer(self.run_dir / "tokenizer.json")
            cut_off = after(SAMPLE_SECONDS, self.stopping)

            def stopping() -> bool:
                self.progress()
                return cut_off()

            text = sample_text(
                model,
                tokenizer,
                self.end,
                self.context,
                log.sample_prompt,
                log.sample_tokens,
                seed,
                stopping=stopping,
                note=self.say,
            )
            with replacing(self.run_dir / "sample.txt") as file:
                file.write(f"{text}\n".encode())
            return text
        return None

    def finish(self, device: torch.device) -> None:
        """Write the summary at the end: the loss, a sample of the newest checkpoint, and a line with both losses."""
        model = None
        if self.config.log.sample_tokens:
            with warning("no sample.txt", self.say):
                found = [path for folder in self.folders for path in list_checkpoints(folder)]
                model = load_model(max(found, key=step_of)).to(device)
        text = self.write(model)
        if text is not None:
            name = self.run_dir / "sample.txt"
            self.say(f"\na sample of at most {self.config.log.sample_tokens} tokens ({name}):\n{text}\n")
        with warning("no last line", self.say):
            self.say(last_line(read_metrics(self.run_dir / "metrics.jsonl"), self.run_dir / "loss.png"))


def last_line(records: list[dict[str, Any]], curve: Path) -> str:
    """Return both losses in words. A loss that was not finite is null in metrics.jsonl."""

    def text(loss: float | None) -> str:
        return "not finite" if loss is None else f"{loss:.3f}"

    training = [r["loss"] for r in records if "loss" in r]
    validation = [r["val_loss"] for r in records if "val_loss" in r]
    parts = [f"training loss {text(training[0])} -> {text(training[-1])}"] if training else []
    parts += [f"validation loss {text(loss)}" for loss in validation[-1:]]
    parts += [f"{r['seconds']:.0f} s in training steps" for r in records[::-1] if "seconds" in r][:1]
    return ", ".join(parts) + (f"; curve: {curve}" if curve.exists() else "")


def draw_losses(records: list[dict], path: Path, title: str) -> None:
    """Draw training and validation loss over tokens. Draws nothing if no loss is finite."""
    training = [(r["tokens"], r["loss"]) for r in records if r.get("loss") is not None]
    validation = [(r["tokens"], r["val_loss"]) for r in records if r.get("val_loss") is not None]
    if not training and not validation:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120)  # a layout engine would take as long as the drawing
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if training:
        axes.plot(*zip(*training, strict=True), linewidth=1, color="#9ecae1", label="training")
    if validation:
        label = f"validation, last {validation[-1][1]:.3f}"
        axes.plot(*zip(*validation, strict=True), marker="o", markersize=3, color="#08519c", label=label)
    axes.set(xlabel="tokens", ylabel="cross-entropy per token, nats")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as file:
        figure.savefig(file, format="png")
