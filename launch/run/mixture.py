"""Opens the sources of `data.mix`, fetches remote data, and words what a run takes from each source."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from configs.evaluation import sets_of
from configs.mixture import mix_sources
from configs.schema import Config
from data.batches import Batches
from data.mixture import Mixture
from data.remote import local_folder
from data.shards import TokenShards


def open_mixture(config: Config) -> tuple[TokenShards, TokenShards]:
    """Open the training and the validation split of `data.mix`.

    Validation mixes the sources by their weights at step 0, so that the loss stays comparable when weights change. A source
    with weight 0 at step 0 needs no validation split.

    Raises:
        DataError: a source cannot be read, or the sources do not fit together.
    """
    sources = [source._replace(dir=local_data_folder(config, source.dir)) for source in mix_sources(config)]
    training = Mixture([TokenShards(source.dir, "train") for source in sources], [source.weights for source in sources])
    first = [source for source in sources if source.weights[0]]
    return training, Mixture([TokenShards(source.dir, "val") for source in first], [{0: source.weights[0]} for source in first])


def local_data_folder(config: Config, folder: str) -> str:
    """Return the path of a data folder on this machine; for a URL, its copy in the cache."""
    cache = Path(config.data.cache_dir or "~/.cache/celo2-data").expanduser()
    return local_folder(folder, cache, config.data.cache_gb * 1e9, log)


def fetch_data(config: Config) -> None:
    """Copy data folders behind URLs into the cache. Call it before the process group starts: copying may exceed its timeout.

    Raises:
        DataError: as `local_folder`.
    """
    sources = [config.data.dir] if config.data.mix is None else [source.dir for source in mix_sources(config)]
    for source in [*sources, *(further.dir for further in sets_of(config))]:
        if source is not None:
            local_data_folder(config, source)


def log(line: str) -> None:
    """Print a line about copying on stderr at once."""
    print(line, file=sys.stderr, flush=True)


def mixture_notes(batches: Batches, shards: TokenShards, steps: int) -> list[str]:
    """Return a line for each source of a mixture: its tokens, its shares of the sequences, and its epochs in the whole run."""
    if not isinstance(shards, Mixture):
        return []
    return [
        f"data.mix: {name} has {source.n_tokens:,} tokens and "
        f"{', '.join(_share(float(phase.shares[i]), phase.step) for phase in shards.phases)} of the sequences: "
        f"{batches.epochs(steps)[i]:.3g} epochs until step {steps}"
        for i, (name, source) in enumerate(zip(shards.names, shards.sources, strict=True))
    ]


def epochs_record(batches: Batches, shards: TokenShards, step: int) -> dict[str, float]:
    """Return, for metrics.jsonl, the epochs of each source of a mixture before `step`."""
    if not isinstance(shards, Mixture):
        return {}
    return {f"epochs/{name}": epochs for name, epochs in zip(shards.names, batches.epochs(step), strict=True)}


def taken_notes(batches: Batches, shards: TokenShards, step: int) -> list[str]:
    """Return a line with the sequences that the run took from each source of a mixture before `step`."""
    if not isinstance(shards, Mixture):
        return []
    counts = batches.taken(step).values() or [batches.first(step)]  # `taken` is empty for a single source
    parts = [
        f"{name} {count:,} ({epochs:.3g} epochs)"
        for name, count, epochs in zip(shards.names, counts, batches.epochs(step), strict=True)
    ]
    return [f"data.mix: sequences taken until step {step}: {', '.join(parts)}"]


def _share(share: float, step: int) -> str:
    return f"{share:.4g}" + (f" from step {step} on" if step else "")


def how_to_end(saved: dict[str, Any], now: dict[str, Any], step: int) -> str:
    """Return how to end the first source of a mixture that is left out now; empty if the difference is another one.

    Args:
        saved: the section `data` of a checkpoint's configuration.
        now: that of the run that resumes.
        step: the checkpoint's step.
    """
    before, left = saved.get("mix") or [], [source.get("dir") for source in now.get("mix") or [now]]
    ended = [source for source in before if source.get("dir") not in left]
    if not ended or not {source.get("dir") for source in before}.issuperset(left):
        return ""
    folder, weight, end = ended[0].get("dir"), ended[0].get("weight"), max(step, 1)
    given = weight if isinstance(weight, dict) else {0: weight}
    weights = {int(since): of_step for since, of_step in given.items() if int(since) < end} | {end: 0}
    shown = ", ".join(f"{since}: {of_step}" for since, of_step in sorted(weights.items()))
    return f" (a source ends at a step by its weight: {{dir: {folder}, weight: {{{shown}}}}})"


def name_of_data(data: dict[str, Any]) -> tuple[str, str]:
    """Return the option that names the data in a configuration's section `data`, and the folders that it names."""
    if data.get("mix"):
        return "data.mix", ", ".join(str(source.get("dir")) for source in data["mix"])
    return "data.dir", str(data.get("dir"))
