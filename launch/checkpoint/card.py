"""The model card of an export: README.md, which says what the model is and how it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from celo2.training.metrics import read_metrics
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


def write_card(folder: Path, checkpoint: Path, model: PreTrainedModel, rows: int) -> None:
    """Write README.md into an exported `folder`; what the checkpoint does not say is left out. `rows`: trained ones, V."""
    config = model.config
    kept = config.get_text_config().vocab_size
    facts: dict[str, Any] = {
        "architecture": f"{type(model).__name__} ({config.model_type})",
        "parameters": f"{model.num_parameters():,}, {str(model.dtype).removeprefix('torch.')}",
        "vocabulary": f"{kept:,} rows" + (f"; {rows - kept:,} that no token has were dropped" if rows > kept else ""),
        "context": longest_context(config) and f"{longest_context(config):,} tokens",
    }
    name, state = checkpoint.parent.parent.name, checkpoint / "state.json"
    if state.is_file():
        saved = json.loads(state.read_text(encoding="utf-8"))
        trained = saved["config"]
        name, optimizer = trained["run"]["name"], trained["optimizer"]
        rule = optimizer.get("rule") and f", rule {optimizer['rule']}"
        facts |= {
            "data": f"{Path(str(trained['data']['dir'])).name}, hash {saved['identity']['data set'][:12]}",
            "training": f"{saved['step']:,} steps of {trained['train']['batch_size']} sequences, {saved['tokens']:,} tokens",
            "optimizer": f"{optimizer['name']}{rule or ''}, peak learning rate {optimizer['lr']:g}",
            "validation loss": validation_loss(checkpoint.parent.parent / "metrics.jsonl", saved["step"]),
            "seed": trained["run"]["seed"],
        }
    table = "\n".join(f"| {what} | {fact} |" for what, fact in facts.items() if fact is not None)
    (folder / "README.md").write_text(CARD.format(name=name, table=table), encoding="utf-8")


def validation_loss(metrics: Path, step: int) -> str | None:
    """The last one up to `step`, for a person to read; None without one."""
    records = read_metrics(metrics) if metrics.is_file() else []
    known = [r for r in records if r.get("val_loss") is not None and r["step"] <= step]
    return f"{known[-1]['val_loss']:.4f} nats a token, after step {known[-1]['step']:,}" if known else None
