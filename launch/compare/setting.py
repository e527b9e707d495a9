"""What a report says of its runs beside their losses: the setting at its top, and where their configurations differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from celo2.training.yaml_values import read_yaml, untyped
from configs.load import ConfigError

PLACES = ("run.", "log.", "checkpoint.")  # where a run lies and what is kept of it


def setting_of(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Model, data, batch, tokens and machine of the runs; results of earlier versions may lack some."""
    said: dict[str, str] = {}
    configs = configurations(results["runs"])
    if configs:
        said["model"] = same(list(map(model_of, configs)))
        said["data"] = same([data_of(c) for c in configs])
        said["batch"] = same([f"{c['train.batch_size']} sequences a step, {c['train.precision']}" for c in configs])
    tokens = f"{results['compared_at_tokens']:,.0f}"
    steps = {f"{run['validation']['step'][-1]:,}" for run in results["runs"] if run["validation"]["step"]}
    said["tokens"] = f"compared at {tokens}" + (f", after {same(sorted(steps))} steps" if steps else "")
    return [*said.items(), ("machine", results["device"])]


def configurations(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The configurations of `runs` as section.key: value; without those that earlier versions did not keep."""
    found = []
    for run in runs:
        try:
            tree = untyped(read_yaml(run["config"], "configuration"), "configuration") if run.get("config") else None
        except ConfigError:
            continue
        if isinstance(tree, dict):
            found.append({f"{s}.{k}": v for s, part in tree.items() if isinstance(part, dict) for k, v in part.items()})
    return found


def model_of(config: Mapping[str, Any]) -> str:
    """A model in words."""
    if config.get("model.hf"):
        return str(config["model.hf"].get("model_type", "transformers"))
    numbers = [f"{key} {config[f'model.{key}']}" for key in ("layers", "width", "heads", "context") if config.get(f"model.{key}")]
    return ", ".join([*([str(config["model.size"])] if config.get("model.size") else []), *numbers])


def data_of(config: Mapping[str, Any]) -> str:
    """The names of the data's folders."""
    mix = config.get("data.mix") or [{"dir": config.get("data.dir")}]
    return " + ".join(str(part.get("dir")).rstrip("/").rpartition("/")[2] for part in mix)


def same(texts: Sequence[str]) -> str:
    """The one text that all share, or all different texts, joined by "or"."""
    return " or ".join(dict.fromkeys(texts))


def differing(results: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Labels, and the keys in which their first runs' configurations differ, with the value of each."""
    first: dict[str, Mapping[str, Any]] = {}
    for run in results["runs"]:
        first.setdefault(run["label"], run)
    kept = {label: found[0] for label, run in first.items() if (found := configurations([run]))}
    keys = sorted({key for config in kept.values() for key in config if not key.startswith(PLACES)})
    table = [(key, [str(config.get(key, "–")) for config in kept.values()]) for key in keys]
    return list(kept), [(key, values) for key, values in table if len(set(values)) > 1]
