"""Writes the model card of an export: README.md, which says what the model is and how it was trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from celo2.training.configuration import options
from celo2.training.metrics import read_metrics
from celo2.training.yaml_values import dump_yaml
from configs.length import batch_sizes
from configs.schema import Config
from launch.checkpoint.folders import Chosen
from launch.checkpoint.journal import wrote
from launch.checkpoint.state import read_state
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
{commands}
License: not stated. Whoever publishes this model chooses one, and names the data's.
"""

COMMANDS = """
## Use

```python
from transformers import pipeline

print(pipeline("text-generation", model="FOLDER OR OWNER/NAME")("The", max_new_tokens=50)[0]["generated_text"])
```

## Training

`python train.py config.yaml`, and `python -m models.export RUN FOLDER`, with these settings; all others were the defaults.

```yaml
{settings}```
"""
PLACES = ("run.dir", "data.cache_dir", "checkpoint.resume", "checkpoint.fallback_dir")  # paths on the training machine


def write_card(folder: Path, chosen: Chosen, model: PreTrainedModel, rows: int, average: bool = False) -> None:
    """Write README.md into an exported `folder`, without the facts that the checkpoint lacks.

    `rows`: the vocabulary rows in training, V. `average`: the exported weights are the average.
    """
    config, checkpoint = model.config, chosen.path
    kept = config.get_text_config().vocab_size
    facts: dict[str, Any] = {
        "architecture": f"{type(model).__name__} ({config.model_type})",
        "parameters": f"{model.num_parameters():,}, {str(model.dtype).removeprefix('torch.')}",
        "vocabulary": f"{kept:,} rows" + (f"; {rows - kept:,} that no token has were dropped" if rows > kept else ""),
        "context": longest_context(config) and f"{longest_context(config):,} tokens",
    }
    name, commands = chosen.run.name, ""
    if (checkpoint / "state.json").is_file():
        saved = read_state(checkpoint)
        try:
            metrics = read_metrics(chosen.run / "metrics.jsonl") if wrote(chosen.run, checkpoint) else []
            name, told = training_facts(saved, metrics, "average/val_loss" if average else "val_loss")
            if average:
                of_average = saved["average"]
                told["weights"] = f"an average ({of_average['kind']}) over {of_average['members']:,} steps"
            commands = COMMANDS.format(settings=fenced(dump_yaml(own_settings(saved["config"]))))
        except (LookupError, TypeError, ValueError, AttributeError):
            raise CheckpointError(f"{checkpoint / 'state.json'} is damaged: it is not what a training run writes") from None
        facts |= told
    table = "\n".join(f"| {what} | {plain(fact)} |" for what, fact in facts.items() if fact is not None)
    (folder / "README.md").write_text(CARD.format(name=plain(name), table=table, commands=commands), encoding="utf-8")


def training_facts(saved: dict[str, Any], metrics: list[dict[str, Any]], loss: str) -> tuple[str, dict[str, Any]]:
    """Return the run's name, and facts about its training from the state of a checkpoint.

    `loss`: the key of the validation loss in `metrics`.
    """
    trained = saved["config"]
    optimizer, sizes = trained["optimizer"], batch_sizes(trained["train"]).text("sequences")
    rule = optimizer.get("rule") and f", rule {optimizer['rule']}"
    return trained["run"]["name"], {
        "data": f"{data_of(trained['data'])}, hash {saved['identity']['data set'][:12]}",
        "training": f"{saved['step']:,} steps of {sizes}, {saved['tokens']:,} tokens",
        "optimizer": f"{optimizer['name']}{rule or ''}, peak learning rate {optimizer['lr']:g}",
        "training loss": last_loss(metrics, saved["step"], "loss"),
        "validation loss": last_loss(metrics, saved["step"], loss),
        "seed": trained["run"]["seed"],
    }


def plain(fact: Any) -> str:
    """Return a text from a checkpoint escaped for Markdown: one line, no HTML, no link, no new table column."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(str(fact).split()))


def data_of(data: dict[str, Any]) -> str:
    """Return the names of the prepared folders."""
    if not data.get("mix"):
        return Path(str(data["dir"])).name
    return ", ".join(f"{Path(str(source['dir'])).name} (weight {weight_text(source['weight'])})" for source in data["mix"])


def weight_text(weight: Any) -> str:
    """Return the weight of a source of a mixture as a text, with the step of each change."""
    steps = weight if isinstance(weight, dict) else {0: weight}
    return ", ".join(f"{value:g}" + (f" from step {step} on" if int(step) else "") for step, value in steps.items())


def own_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are not the defaults, without PLACES. Of other paths, only the last part is kept."""
    found: dict[str, Any] = {}
    for name, default, _ in options(Config):
        section, _, key = name.partition(".")
        value = config.get(section, {}).get(key, default)
        if value != default and name not in PLACES:
            found.setdefault(section, {})[key] = without_folders(value)
    return found


def without_folders(value: Any) -> Any:
    """Return `value` from JSON with absolute paths cut to their last part, and the steps in mappings as numbers."""
    if isinstance(value, dict):
        return {int(key) if key.isdecimal() else key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value


def fenced(text: str) -> str:
    """Return a text that cannot end the code block that contains it."""
    return text.replace("```", "'''")


def last_loss(metrics: list[dict[str, Any]], step: int, key: str) -> str | None:
    """Return the last loss up to `step` as a text; None if there is none."""
    known = [r for r in metrics if r.get(key) is not None and r["step"] <= step]
    if not known:
        return None
    bits = known[-1].get(key.replace("val_loss", "val_bits_per_byte")) if key != "loss" else None
    more = f", {bits:.4f} bits per byte" if bits is not None else ""
    return f"{known[-1][key]:.4f} nats a token{more}, after step {known[-1]['step']:,}"
