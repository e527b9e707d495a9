"""The model card of an export: README.md, which says what the model is and how it was trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from celo2.training.metrics import read_metrics
from launch.checkpoint.load import read_state
from launch.checkpoint.verify import CheckpointError
from models import longest_context

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {name}

A causal language model. It continues text, and was not tuned to follow instructions.

| | |
|---|---|
{table}

License: not stated. Whoever publishes this model chooses one, and names the data's.
"""


def write_card(folder: Path, checkpoint: Path, model: PreTrainedModel, rows: int, average: bool = False) -> None:
    """Write README.md into an exported `folder`; what the checkpoint does not say is left out.

    `rows`: trained ones, V. `average`: the weights are the average of those that trained.
    """
    config = model.config
    kept = config.get_text_config().vocab_size
    facts: dict[str, Any] = {
        "architecture": f"{type(model).__name__} ({config.model_type})",
        "parameters": f"{model.num_parameters():,}, {str(model.dtype).removeprefix('torch.')}",
        "vocabulary": f"{kept:,} rows" + (f"; {rows - kept:,} that no token has were dropped" if rows > kept else ""),
        "context": longest_context(config) and f"{longest_context(config):,} tokens",
    }
    name = checkpoint.parent.parent.name
    if (checkpoint / "state.json").is_file():
        saved = read_state(checkpoint)
        try:
            name, told = training_facts(checkpoint, saved, "average/val_loss" if average else "val_loss")
            if average:
                of_average = saved["average"]
                told["weights"] = f"an average ({of_average['kind']}) over {of_average['members']:,} steps"
        except (LookupError, TypeError, ValueError, AttributeError):
            raise CheckpointError(f"{checkpoint / 'state.json'} is damaged: it is not what a training run writes") from None
        facts |= told
    table = "\n".join(f"| {what} | {plain(fact)} |" for what, fact in facts.items() if fact is not None)
    (folder / "README.md").write_text(CARD.format(name=plain(name), table=table), encoding="utf-8")


def training_facts(checkpoint: Path, saved: dict[str, Any], loss: str) -> tuple[str, dict[str, Any]]:
    """The run's name, and what the state of a checkpoint says of the training. `loss`: its key in metrics.jsonl."""
    trained = saved["config"]
    optimizer = trained["optimizer"]
    rule = optimizer.get("rule") and f", rule {optimizer['rule']}"
    return trained["run"]["name"], {
        "data": f"{Path(str(trained['data']['dir'])).name}, hash {saved['identity']['data set'][:12]}",
        "training": f"{saved['step']:,} steps of {trained['train']['batch_size']} sequences, {saved['tokens']:,} tokens",
        "optimizer": f"{optimizer['name']}{rule or ''}, peak learning rate {optimizer['lr']:g}",
        "validation loss": validation_loss(checkpoint.parent.parent / "metrics.jsonl", saved["step"], loss),
        "seed": trained["run"]["seed"],
    }


def plain(fact: Any) -> str:
    """A text from a checkpoint as Markdown shows it: one line, no HTML, no link, no further column."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(str(fact).split()))


def validation_loss(metrics: Path, step: int, key: str) -> str | None:
    """The last one up to `step`, for a person to read; None without one."""
    records = read_metrics(metrics) if metrics.is_file() else []
    known = [r for r in records if r.get(key) is not None and r["step"] <= step]
    return f"{known[-1][key]:.4f} nats a token, after step {known[-1]['step']:,}" if known else None
