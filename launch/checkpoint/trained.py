"""Loads a trained model and its tokenizer from a run, one of its checkpoints, or an exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer
from transformers import PretrainedConfig, PreTrainedModel

from data import DataError
from data.files import read_json
from data.shards import read_index
from data.special_tokens import CONFIG, declared_tokens, end_of_text
from data.tokenizer import json_hash, load_tokenizer, token_id, tokenizer_hash
from launch.checkpoint.folders import CHECKPOINTS, Chosen, choose_checkpoint
from launch.checkpoint.load import load_model, read_model_config
from launch.checkpoint.state import read_state, require_state
from launch.checkpoint.stock import dtypes_in, not_real, quiet, read_stock, untied
from launch.checkpoint.tensors import files_of, is_there
from launch.checkpoint.verify import MANIFEST, MODEL, CheckpointError
from models import LossMismatch, ModelError, choose_loss, longest_context
from models.build import model_of
from models.initialization import without_memory

UNLIMITED = 10**9  # transformers writes 10**30 for a tokenizer without a limit


class TrainedModel(NamedTuple):
    """A model on the CPU in evaluation mode, with its tokenizer and the facts that its use needs."""

    path: Path  # the checkpoint, or the exported folder
    model: PreTrainedModel
    tokenizer: Tokenizer
    end: int  # the token that ends a document
    context: int | None  # T, tokens of a training sequence; None: unknown
    notes: list[str]  # what is wrong with newer checkpoints
    guess: str = ""  # a note, if `end` is a guess
    bf16: bool = False  # whether the run computes in bfloat16 by autocast; unknown, hence False, for an exported folder

    def context_of(self, asked: int | None) -> int:
        """Return the tokens of a sequence: `asked` if given, else as in training.

        Raises:
            CheckpointError: the length is unknown, or longer than the model accepts.
        """
        context, longest = asked or self.context, longest_context(self.model.config)
        if context is None:
            raise CheckpointError(f"{self.path} does not say how long a sequence is: give --context")
        if longest is not None and context > longest:
            raise CheckpointError(f"--context {context}: {self.path} accepts at most {longest} tokens")
        return context


def open_trained(path: str | Path, average: bool = False) -> TrainedModel:
    """Load the model of a run (its newest whole checkpoint), of a checkpoint, or of a folder that `models.export` wrote.

    Any other transformers folder is accepted, too, if it has safetensors and a tokenizer.json. `average`: load the average of the
    weights of a run or checkpoint.

    Raises:
        CheckpointError: `path` is none of these, is damaged, or has no tokenizer; or the model is not causal or not finite.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no folder {path}")
    known = (MANIFEST, "state.json", CHECKPOINTS)
    if not any((path / name).exists() for name in known) and (path / "config.json").is_file():
        if average:
            raise CheckpointError(f"{path} is an exported folder, with one kind of weights: leave --average out")
        return finite(open_export(path))
    if not any((path / name).exists() for name in known) and not is_there(path / MODEL):
        raise CheckpointError(f"{path} is neither a training run, nor a checkpoint, nor an exported folder")
    return finite(open_checkpoint(choose_checkpoint(path), average))


def finite(trained: TrainedModel) -> TrainedModel:
    """Return `trained`. Raises CheckpointError if one of its weights contains a number that is not finite."""
    for name, p in trained.model.named_parameters():
        if p.is_floating_point() and not p.isfinite().all():
            raise CheckpointError(f"{trained.path} has numbers in {name} that are not finite: take another model or checkpoint")
    return trained


def open_checkpoint(chosen: Chosen, average: bool = False) -> TrainedModel:
    """Load the model of a whole checkpoint, and the tokenizer of its run."""
    path, tokenizer = chosen.path, read_tokenizer(chosen.run)
    saved = read_state(path)
    require_state(path, saved)
    config = saved["config"]
    end, guess = end_of_run(tokenizer, chosen.run, config["data"])
    require_its_tokenizer(path, chosen.run)
    model = load_model(path, average=average)
    context, bf16 = config["model"]["context"] or longest_context(model.config), config["train"].get("precision") == "bf16"
    return TrainedModel(path, model, tokenizer, end, context, chosen.problems, guess, bf16)


def open_export(path: Path) -> TrainedModel:
    """Load the model of a transformers folder. Nothing is downloaded, unpickled, or run from it."""
    if (path / "adapter_config.json").exists():  # transformers would load the base model that the adapter names
        raise CheckpointError(f"{path} holds an adapter: merge it into its model, and name that folder")
    tokenizer = read_tokenizer(path)
    with quiet():
        config = read_model_config(path)
    try:
        with quiet():
            stored, _ = without_memory(lambda: model_of(config))
        dtypes = {name: dtype for file in files_of(path / MODEL) for name, dtype in dtypes_in(file).items()}
        if getattr(config, "quantization_config", None) is None and (problem := not_real(dtypes, stored)):
            raise CheckpointError(
                f"{path} has {problem}, and its config.json does not say how they are meant: name another model"
            )
        model, problem = read_stock(path, config, "auto")
        problem = problem or untied(model, {name for name, _ in stored.named_parameters()})
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises many types of errors for missing or damaged files
        raise CheckpointError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    if problem:
        raise CheckpointError(f"{path} {problem}")
    try:
        with suppress(LossMismatch):  # matters only in training
            choose_loss(model)
    except ModelError as error:
        raise CheckpointError(f"{path}: {error}") from error
    end, rows = end_of_export(tokenizer, config, path), model.get_input_embeddings().weight.shape[0]
    if end >= rows:
        raise CheckpointError(
            f"{path}: its tokenizer ends a document with token {end}, its model knows {rows}: put its own tokenizer there"
        )
    lengths = [length for length in (longest_context(model.config), trained_length(path)) if length]
    return TrainedModel(path, model.eval(), tokenizer, end, min(lengths, default=None), [])


def read_tokenizer(folder: Path) -> Tokenizer:
    """Load the tokenizer.json of a run or an exported folder."""
    try:
        return load_tokenizer(folder / "tokenizer.json")
    except DataError as error:
        raise CheckpointError(str(error)) from error


def end_of(tokenizer: Tokenizer, folder: Path) -> int:
    """Return the id of the end of text: the eos_token of the folder's tokenizer_config.json, else a token with a usual name."""
    remedy = f"name one of its tokens as eos_token in {folder / CONFIG}"
    try:
        return token_id(tokenizer, end_of_text(tokenizer, declared_tokens(folder), remedy=remedy))
    except DataError as error:
        raise CheckpointError(f"{folder}: {error}") from error


def end_of_export(tokenizer: Tokenizer, config: PretrainedConfig, folder: Path) -> int:
    """Return the id of the end of text in an exported folder.

    It is the token that the tokenizer's files declare, as for `model.init`; else the one that the model's configuration names;
    else a token with a usual name.
    """
    try:
        declared = declared_tokens(folder).get("eos_token")
    except DataError as error:
        raise CheckpointError(str(error)) from error
    said = config.eos_token_id[0] if isinstance(config.eos_token_id, list) and config.eos_token_id else config.eos_token_id
    if declared is None and isinstance(said, int) and tokenizer.id_to_token(said) is not None:
        return said
    return end_of(tokenizer, folder)


def require_its_tokenizer(checkpoint: Path, run: Path) -> None:
    """Raise CheckpointError if a checkpoint was trained with another tokenizer than that in the folder `run`.

    So it is with a checkpoint that was copied from another run. Nothing is compared where a file is missing or cannot be read, or
    where an earlier version stored no hash.
    """
    path = run / "tokenizer.json"
    try:
        trained_with = read_state(checkpoint)["identity"]["tokenizer"]
        found = json_hash(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return
    if trained_with not in (None, found):
        raise CheckpointError(
            f"{checkpoint} was trained with another tokenizer than {path}: name the checkpoint in the folder of its own run, or "
            "bring its tokenizer.json back"
        )


def end_of_run(tokenizer: Tokenizer, run: Path, data: Mapping[str, Any]) -> tuple[int, str]:
    """Return the id of the end of text in a training run, and a note if it is a guess.

    The run's tokenizer_config.json names it. If it does not, as in runs of earlier versions and incomplete copies, the
    end of text is that of the data; and if the data is gone, a token with a usual name. This is a guess unless the tokenizer has
    only one special token.

    Args:
        tokenizer: the run's.
        run: its folder.
        data: the section `data` of its configuration.

    Raises:
        CheckpointError: there is no such token.
    """
    try:
        named = "eos_token" in declared_tokens(run)
    except DataError as error:
        raise CheckpointError(str(error)) from error
    if not named:
        for folder in (data.get("dir"), *(source.get("dir") for source in data.get("mix") or [])):
            if (end := end_of_data(folder, tokenizer)) is not None:
                return end, ""
    end = end_of(tokenizer, run)
    if named or sum(token.special for token in tokenizer.get_added_tokens_decoder().values()) == 1:
        return end, ""
    found = f"{run} has no {CONFIG} that names the end of text, and its data does not tell it"
    remedy = f'if it is another token, write {{"eos_token": TOKEN}} to {run / CONFIG}'
    return end, f"{found}; taking {tokenizer.id_to_token(end)!r}, a usual name; {remedy}"


def end_of_data(folder: Any, tokenizer: Tokenizer) -> int | None:
    """Return the end of text of prepared data; None if it is gone, or has since been prepared with another tokenizer."""
    try:
        index = read_index(Path(folder)) if isinstance(folder, str) and folder else None
    except (DataError, OSError):
        return None
    if index is None or index["tokenizer_sha256"] != tokenizer_hash(tokenizer):
        return None
    return index["end_of_text_id"] if tokenizer.id_to_token(index["end_of_text_id"]) is not None else None


def trained_length(folder: Path) -> int | None:
    """Return the text length in an exported tokenizer, which may be less than the model's positions; None if unknown."""
    path = folder / "tokenizer_config.json"
    try:
        found = dict(read_json(path)).get("model_max_length") if path.is_file() else None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from None
    return found if isinstance(found, int) and 0 < found < UNLIMITED else None
