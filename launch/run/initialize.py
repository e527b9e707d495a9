"""`model.init`: starts a training run with the weights of another run, a transformers folder, or a model of the Hugging Face hub.

The architecture comes from that source, too. Optimizer state, step and data order start from the beginning. Only safetensors
files are read, and no code of the source is run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2Config, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from celo2.hub import explain
from celo2.rule_files import HUB
from configs.load import ConfigError
from configs.schema import Config
from configs.schema import Model as ModelSection
from data import first_line
from data.shards import TokenShards
from data.special_tokens import declared_tokens
from data.tokenizer import PROBE, encode_alike
from launch.checkpoint.folders import CHECKPOINTS, choose_checkpoint, folders_of, run_of
from launch.checkpoint.load import load_model, read_model_config, weights_file
from launch.checkpoint.state import read_state
from launch.checkpoint.stock import DTYPES, dtypes_in, not_real, quiet, read_stock, untied
from launch.checkpoint.tensors import files_of
from launch.checkpoint.trained import require_its_tokenizer
from launch.checkpoint.verify import AVERAGE, MANIFEST, MODEL, CheckpointError, list_checkpoints
from launch.run.branch import checkpoint_folders, read_origin
from launch.run.weights import FromGPT2, file_weights
from models.build import ModelError, model_errors, model_of, named_size, prepare_model
from models.foreign import ForeignCode, refuse_code
from models.function import function_differences
from models.gpt2 import from_gpt2, gpt3_config
from models.gpt3 import GPT3Config
from models.initialization import Held, Weights, without_memory

OF_AVERAGE = "average:"  # prefix of a run or checkpoint: take the average of its weights
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")  # valid keys, although the config has no such attributes
ROPE_PARTS = ("rope_theta", "partial_rotary_factor")  # former top-level keys; today they are entries of `rope_parameters`
NUMBERS = ("layers", "width", "heads", "vocab_size")  # a GPT-3's numbers, but not its context: sequences may be shorter


@dataclass(frozen=True)
class Source:
    """The source of weights: a folder with a config.json, and its description in messages."""

    path: Path
    name: str  # as the user wrote it, or the checkpoint that was chosen
    step: int | None = None  # of a checkpoint; None: a transformers folder
    note: str = ""  # the commit on the hub, or what is wrong with newer checkpoints
    file: str = MODEL  # the file with the weights; in a checkpoint it may be AVERAGE
    run: Path | None = None  # the folder of the run that the checkpoint belongs to

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer beside the weights or, for a checkpoint, in its run's folder."""
        return (self.run or self.path) / "tokenizer.json"


def begun(config: Config, run_dir: Path) -> Source | None:
    """Return a checkpoint of the training run that `config` resumes; None if the run begins. The checkpoint is not verified."""
    resume = config.checkpoint.resume
    given = [] if resume in ("auto", "never") else [Path(resume).expanduser()]
    folders = [(folder, run) for run in given for folder in folders_of(run)]  # `given` may be a checkpoint or a run
    if resume != "never":
        folders += [(folder, run_dir) for folder in checkpoint_folders(config, run_dir, read_origin(run_dir))]
    paths = [(path, run_of(path)) for path in given]
    paths += [(path, run) for folder, run in folders for path in reversed(list_checkpoints(folder))]
    return next((Source(path, str(path), step=0, run=run) for path, run in paths if (path / "config.json").is_file()), None)


def architecture_source(config: Config, run_dir: Path) -> Source | None:
    """Return the source of the architecture with `model.init`: the run itself once it has begun, else the folder of `model.init`.

    Returns None without `model.init`. From a model of the hub, only the small files are downloaded.
    """
    if config.model.init is None:
        return None
    return begun(config, run_dir) or find_source(config.model.init, weights=False)


def find_source(init: str, weights: bool = True) -> Source:
    """Return the folder that `model.init` names. For a model of the hub, it is a local copy, with or without weights.

    Raises:
        ConfigError: the source does not exist or cannot be downloaded, or `average:` does not name a run or checkpoint.
        CheckpointError: a run without a whole checkpoint.
    """
    if init.startswith(HUB):
        path = download(init, weights)
        return Source(path, init, note=f" (commit {path.name})")
    average = init.startswith(OF_AVERAGE)
    path = Path(init.removeprefix(OF_AVERAGE)).expanduser()
    if not path.is_dir():
        hint = f"for a model of the Hugging Face hub write model.init={HUB}{init}"
        if average or path.exists():
            hint = f"{OF_AVERAGE} takes a run or a checkpoint" if average else "name its folder"
        raise ConfigError(f"model.init: {init} is {'a file' if path.exists() else 'not there'}; {hint}")
    if (path / MANIFEST).exists() or (path / "state.json").exists() or (path / CHECKPOINTS).is_dir():
        checkpoint, run, problems = choose_checkpoint(path)
        note = f" (not a newer one: {'; '.join(problems)})" if problems else ""
        name = f"the average in {checkpoint}" if average else str(checkpoint)
        return Source(checkpoint, name, read_state(checkpoint)["step"], note, weights_file(checkpoint, average), run)
    if average:
        raise ConfigError(
            f"model.init: {path} is neither a run nor a checkpoint: only these hold an average; leave {OF_AVERAGE} out"
        )
    return Source(path, init)


def download(init: str, weights: bool) -> Path:
    """Download a model of the Hugging Face hub, `hub:NAME` or `hub:NAME@REVISION`. Returns the local copy."""
    from huggingface_hub import snapshot_download

    name, _, revision = init.removeprefix(HUB).partition("@")
    patterns = ["*.json", "*.model", "merges.txt", *(["model*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # offline, no such name or revision, gated, a bad name: the library raises many kinds
        raise ConfigError(
            f"model.init: {init} cannot be read from the Hugging Face hub ({explain(error, name)}); without a network, give the "
            "folder of a downloaded copy"
        ) from None


def source_config(source: Source) -> PretrainedConfig:
    """Return the model configuration of a source. Raises ConfigError unless it is a plain, unquantized causal language model."""
    if (source.path / "adapter_config.json").exists():
        raise ConfigError(f"model.init: {source.name} holds an adapter: merge it into its model, and name that folder")
    if not (source.path / "config.json").is_file():
        raise ConfigError(
            f"model.init: {source.name} has no config.json: it is neither a run nor a checkpoint, and not a folder that "
            "save_pretrained() wrote"
        )
    with quiet():  # no advice on special tokens
        config = read_model_config(source.path)
    known = config.model_type in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "gpt3")
    if not known or type(getattr(config, "vocab_size", None)) is not int:
        raise ConfigError(
            f"model.init: {source.name} is a {config.model_type}, which is not a causal language model of transformers"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"model.init: {source.name} has quantized weights, which cannot be trained: name the original model")
    config._name_or_path, config.dtype = "", None  # the weights become float32, as those of every training run
    return config


def architecture(model: ModelSection, source: Source, vocab_size: int) -> PretrainedConfig:
    """Return the configuration of the model to train: the source's, for a GPT-3 with the dropout of `model`.

    A GPT-2 becomes the GPT-3 that computes the same function, unless `model.hf` is given.

    Raises:
        ConfigError: a key of `model` contradicts the source, or the source's vocabulary is smaller than `vocab_size`.
    """
    found = source_config(source)
    config = found
    if isinstance(found, GPT2Config) and model.hf is None:
        try:
            config = gpt3_config(found, model.dropout) or found
        except Exception as error:  # of the class, for numbers that do not fit
            raise ConfigError(f"model.init: the config.json of {source.name} describes no model: {first_line(error)}") from error
    if config.vocab_size < vocab_size:
        raise ConfigError(
            f"model.init: {source.name} has a vocabulary of {config.vocab_size}, the data one of {vocab_size}: "
            "prepare the data with the tokenizer of these weights"
        )
    with model_options():
        size = vars(named_size(model.size)) if model.size is not None else {}
    asked = [(f"model.{key}", key, getattr(model, key) or size.get(key)) for key in NUMBERS]
    asked = [("model.size", key, value) if getattr(model, key) is None else (name, key, value) for name, key, value in asked]
    there: dict[str, Any] = {"vocab_size": config.vocab_size}
    differences: list[tuple[str, str]] = []  # (option to leave out, reason)
    if isinstance(config, GPT3Config):
        there = {key: getattr(config, key) for key in NUMBERS}
        config.dropout = model.dropout
        if model.hf is not None:
            differences.append(("model.hf", "model.hf is given, but the model there is a gpt3"))
    else:
        asked.append(("model.dropout", "dropout", model.dropout or None))
        config, of_hf = with_keys(config, dict(model.hf or {}))
        names = {key: f"model.hf.{key.removeprefix('rope_parameters.')}" for key in of_hf}
        differences += [(names[key], f"{names[key]} is {new}, there {old}") for key, (old, new) in of_hf.items()]
    for name, key, value in asked:
        if value is not None and value != there.get(key):
            what = key if name == "model.size" else name
            found = there.get(key, f"a {config.model_type} has no such key")
            differences.append((name, f"{what} is {value}, there {found}"))
    if differences:
        text, keys = "; ".join(text for _, text in differences), ", ".join(dict(differences))
        raise ConfigError(f"model.init: the architecture comes from {source.name}: {text}; leave {keys} out")
    return config


@contextmanager
def model_options() -> Iterator[None]:
    """Make a ModelError name the wrong option: `model.` and the argument of `models.build_model`."""
    try:
        yield
    except ModelError as error:
        if error.argument is None:
            raise
        raise ModelError(f"model.{error.argument}: {error}", error.argument) from error


def with_keys(config: PretrainedConfig, keys: dict[str, Any]) -> tuple[PretrainedConfig, dict[str, tuple[Any, Any]]]:
    """Return `config` with `keys` replaced, and the keys that would change its function, each with the old and the new value.

    Raises:
        ModelError: values that the class of `config` refuses.
        ConfigError: a key that asks for code from outside.
    """
    try:
        refuse_code({"model_type": config.model_type} | keys, "model.hf")
    except ForeignCode as error:
        raise ConfigError(str(error)) from None
    before = config.to_dict()
    tree = config.to_dict()
    asked = keys.pop("model_type", config.model_type)
    if asked != config.model_type:
        return config, {"model_type": (config.model_type, asked)}
    known = (*ROPE_PARTS, *IMPLEMENTATIONS)
    unknown = {key for key in keys if not hasattr(config, config.attribute_map.get(key, key)) and key not in known}
    for key, value in keys.items():
        if key in ROPE_PARTS or (key == "rope_scaling" and isinstance(value, dict)):
            tree["rope_parameters"] = {**(tree.get("rope_parameters") or {}), **({key: value} if key in ROPE_PARTS else value)}
        else:
            tree[config.attribute_map.get(key, key)] = value
    with model_options(), model_errors(config.model_type):
        changed = type(config).from_dict(tree)
    return changed, function_differences(before, changed) | {key: ("not a key", keys[key]) for key in unknown}


def load_source(
    source: Source, config: PretrainedConfig, gradient_checkpointing: bool | str
) -> tuple[PreTrainedModel, Weights, str]:
    """Return the model of `config` without memory for its parameters, the weights of the source, and a line that describes them.

    The weights are read in slices if the files store them as the model has them, else as a whole model.

    Raises:
        ConfigError: weights that are missing, pickled, damaged, or do not fit the configuration.
        CheckpointError: the same for a checkpoint.
    """
    convert = isinstance(config, GPT3Config) and source.step is None and source_config(source).model_type == "gpt2"
    stored, _ = without_memory(lambda: model_of(source_config(source) if convert else config))
    stored_in = stored_dtypes(source, stored)
    found = file_weights(source.path / source.file, stored)
    if found is None:
        model = whole_model(source, config, convert, {name for name, _ in stored.named_parameters()})
        weights: Weights = Held(model, {name for name, p in model.named_parameters() if not p.isfinite().all()})
    elif convert:
        model, _ = without_memory(lambda: model_of(config))
        weights = FromGPT2(found, {name: tuple(p.shape) for name, p in stored.named_parameters()}, config.layers)
    else:
        model, weights = stored, found
    dtypes = " and ".join(sorted({DTYPES.get(dtype, dtype) for dtype in stored_in.values()}))
    step = "" if source.step is None else f" of step {source.step:,}"
    line = f"began with the weights{step} of {source.name}{source.note}: {model.num_parameters():,} in {dtypes}"
    return prepare_model(model, gradient_checkpointing), weights, line + ("" if dtypes == "float32" else ", trained in float32")


def whole_model(source: Source, config: PretrainedConfig, convert: bool, names: Collection[str]) -> PreTrainedModel:
    """Return the model with the weights of the source, in float32, on the CPU. `convert`: the source is a GPT-2.

    `names`: the parameters that a model of the source's configuration has.
    """
    model: PreTrainedModel
    if source.step is not None:
        model = load_model(source.path, config, source.file == AVERAGE).float()
    else:
        model = from_pretrained(source, source_config(source) if convert else config)
        if problem := untied(model, names):
            raise ConfigError(f"model.init: {source.name} {problem}")
        if convert:
            model = from_gpt2(model, config)
    return model


def weight_files(source: Source) -> list[Path]:
    """Return the safetensors files of a source. Raises ConfigError if one is missing or the index is damaged."""
    try:
        files = files_of(source.path / source.file)
    except ValueError as error:
        raise ConfigError(f"model.init: {error}: download or export the model again") from None
    missing = [file.name for file in files if not file.is_file()]
    if not missing:
        return files
    pickled = sorted(path.name for path in source.path.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled and missing == [MODEL]:
        raise ConfigError(
            f"model.init: {source.name} holds only pickled weights ({pickled[0]}), which are never read: if you trust it, load "
            "it with transformers and write it again with save_pretrained(), which makes safetensors"
        )
    raise ConfigError(f"model.init: {source.name} has no {missing[0]}: name a folder that save_pretrained() wrote, whole")


def stored_dtypes(source: Source, model: PreTrainedModel) -> dict[str, str]:
    """Return the dtype of each tensor in the files of a source. `model`: the source's model, which may be without memory.

    Raises ConfigError for files that are missing or damaged, and for weights that are not plain real numbers.
    """
    found: dict[str, str] = {}
    for path in weight_files(source):
        try:
            found |= dtypes_in(path)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"model.init: {path} is damaged ({first_line(error)}): copy or download it again") from None
    if problem := not_real(found, model):
        raise ConfigError(f"model.init: {source.name} has {problem}, which cannot be trained: name the original model")
    return found


def check_files(config: Config, run_dir: Path) -> None:
    """Raise ConfigError if the headers of the files of `model.init` show that they cannot be used.

    Nothing is checked for a model of the hub, or once the run has begun.
    """
    init = config.model.init
    if init is not None and not init.startswith(HUB) and begun(config, run_dir) is None:
        source = find_source(init)
        stored_dtypes(source, without_memory(lambda: model_of(source_config(source)))[0])


def from_pretrained(source: Source, config: PretrainedConfig) -> PreTrainedModel:
    """Load the model of a transformers folder. Raises ConfigError unless its weights are exactly those of `config`."""
    try:
        model, problem = read_stock(source.path, config, torch.float32)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers raises many types of errors
        raise ConfigError(f"model.init: {source.name} cannot be loaded: {first_line(error)}") from error
    if problem:
        raise ConfigError(f"model.init: {source.name} {problem}")
    return model


def check_tokenizer(source: Source, shards: TokenShards) -> str:
    """Return a text on the tokenizer. Raises ConfigError unless the source's tokenizer encodes the data as the data's does.

    Each token of the data's tokenizer must have the same id in the source's, which may have more tokens.
    """
    own = Tokenizer.from_file(str(shards.folder / "tokenizer.json"))
    try:
        require_its_tokenizer(source.path, source.tokenizer_file.parent)
    except CheckpointError as error:
        raise ConfigError(f"model.init: {error}") from None
    other = read_tokenizer(source)
    if other is None:
        return "it has no tokenizer to compare with that of the data"
    remedy = "prepare the data with it (data.prepare --tokenizer)"
    theirs = other.get_vocab(with_added_tokens=True)
    for token, number in sorted(own.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]):
        if theirs.get(token) != number:
            found = f"{token!r} is {number} in the data, {theirs.get(token, 'missing')} in the model"
            raise ConfigError(f"model.init: the tokenizer of {source.name} is not the data's: {found}; {remedy}")
    other.no_truncation()
    other.no_padding()
    if not encode_alike(own, other, shards.read(0, min(PROBE, shards.n_tokens)).tolist()):
        raise ConfigError(
            f"model.init: the tokenizer of {source.name} tokenizes the data differently from the data's own tokenizer; {remedy}"
        )
    there, here = declared_tokens(source.tokenizer_file.parent).get("eos_token"), own.id_to_token(shards.eot_id)
    same = "its tokenizer is that of the data"
    return same if there in (None, here) else f"{same}, but the data's documents end with {here!r}, the model's with {there!r}"


def read_tokenizer(source: Source) -> Tokenizer | None:
    """Load the tokenizer of a source; None if there is none that can be loaded."""
    if source.tokenizer_file.is_file():
        try:
            return Tokenizer.from_file(str(source.tokenizer_file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ConfigError(f"model.init: {source.tokenizer_file} is damaged: {first_line(error)}") from None
    if source.step is not None or not any((source.path / name).exists() for name in ("vocab.json", "tokenizer.model")):
        return None
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source.path, local_files_only=True, trust_remote_code=False).backend_tokenizer
    except Exception:  # an old or incomplete format: there is nothing to compare with
        return None
