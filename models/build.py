"""A model from a configuration: a GPT-3 by name or by numbers, or any causal language model of transformers."""

import difflib
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from models.experts import fit_experts
from models.foreign import ForeignCode, refuse_code
from models.function import flat, is_dropout
from models.gpt3 import GPT3Config
from models.recompute import recompute
from models.sizes import SIZES

# transformers accepts these of any configuration without listing them: the old spelling of `rope_parameters`.
ROPE_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}
# config.head_dim, self.config.head_dim, getattr(config, "head_dim", None), kwargs.pop("head_dim", None)
READS = re.compile(r"""config\.(\w+)|(?:getattr\((?:self\.)?config,|kwargs\.(?:pop|get)\()\s*["'](\w+)""")
# Where configurations say how many tokens a model can read, in the order of precedence.
CONTEXT_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "max_target_positions", "n_ctx", "seq_length",
)  # fmt: skip
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class ModelError(ValueError):
    """A model that cannot be built from what the user asked for. The message is one line.

    `argument`: the argument of `build_model` that is wrong, if it is one of them.
    """

    def __init__(self, message: str, argument: str | None = None) -> None:
        super().__init__(message)
        self.argument = argument


def build_model(
    *,
    size: str | None = None,
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    context: int | None = None,
    vocab_size: int,
    dropout: float = 0.0,
    gradient_checkpointing: bool | int | str = False,
    hf: dict | None = None,
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """A freshly initialized causal language model, in training mode; its weights follow from torch.manual_seed.

    Either a GPT-3: `size` names one of `models.sizes.SIZES`, and `layers`, `width`, `heads`, `context` (tokens)
    override its numbers, or are all given without it; `dropout` is a probability. Or any model of transformers, without
    the network: `hf` is {"model_type": "qwen3", and any keys of that model's configuration}. In `hf`, `vocab_size` is
    filled in unless given, and special token ids are None unless given: the defaults belong to somebody else's
    tokenizer, and a padding id would freeze that token's embedding.

    `device`: where the parameters are made; "meta" makes shapes without memory. (Random numbers differ between kinds of
    device.) Raises ModelError for everything that a user can get wrong.
    """
    _require_count("vocab_size", vocab_size)
    shape = {"layers": layers, "width": width, "heads": heads, "context": context}
    shape = {name: value for name, value in shape.items() if value is not None}
    if hf is None:
        config = _gpt3_config(size, shape, vocab_size, dropout)
    else:
        of_gpt3 = [*(["size"] if size is not None else []), *shape, *(["dropout"] if dropout else [])]
        if of_gpt3:
            without = " ".join(f"model.{name}={0 if name == 'dropout' else 'null'}" for name in of_gpt3)
            raise ModelError(
                f"hf and {', '.join(of_gpt3)} exclude each other: write the model's own keys into hf, and leave the others out "
                f"({without})",
                "hf",
            )
        config = _hf_config(hf, vocab_size)
    return prepare_model(model_of(config, device), gradient_checkpointing)


def model_of(config: PretrainedConfig, device: str | torch.device | None = None) -> PreTrainedModel:
    """A freshly initialized causal language model of a configuration of transformers."""
    for key, value in flat(config.to_dict()).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_dropout(key) and number and not 0 <= value < 1:
            raise ModelError(f"{config.model_type}: {key} must be a probability, 0 <= {key} < 1, got {value!r}")
    with torch.device(device) if device is not None else nullcontext(), model_errors(config.model_type, config):
        return AutoModelForCausalLM.from_config(config)


def prepare_model(model: PreTrainedModel, gradient_checkpointing: bool | int | str) -> PreTrainedModel:
    """`model` in training mode, with gradient checkpointing (`models.recompute`); its experts run whatever their sizes."""
    fit_experts(model)
    try:
        recompute(model, gradient_checkpointing)
    except ValueError as error:
        raise ModelError(str(error), "gradient_checkpointing") from None
    return model.train()


def named_size(name: str) -> Any:
    """The numbers of a named size. Raises ModelError for an unknown one."""
    if name not in SIZES:
        near = nearest(name, SIZES)
        raise ModelError(f"unknown size {name!r}{f'{near} Sizes' if near else '; sizes'} are {', '.join(SIZES)}", "size")
    return SIZES[name]


def _gpt3_config(size: str | None, shape: dict, vocab_size: int, dropout: float) -> GPT3Config:
    if size is not None:
        shape = {**vars(named_size(size)), **shape}
    missing = [name for name in ("layers", "width", "heads", "context") if name not in shape]
    if missing:
        raise ModelError(f"give a size, or all of layers, width, heads, context: {', '.join(missing)} missing", "size")
    for name, value in shape.items():
        _require_count(name, value)
    if not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise ModelError(f"dropout must be a probability, 0 <= dropout < 1, got {dropout!r}", "dropout")
    try:
        return GPT3Config(vocab_size=vocab_size, dropout=float(dropout), **shape)
    except ValueError as error:  # heads that do not divide the width
        raise ModelError(str(error), "heads") from None


def _hf_config(hf: dict, vocab_size: int) -> PretrainedConfig:
    keys = dict(hf)
    try:
        refuse_code(keys, "model.hf")
    except ForeignCode as error:
        raise ModelError(str(error)) from None
    model_type = keys.pop("model_type", None)
    if model_type is None:
        raise ModelError('hf needs a model_type, such as {"model_type": "qwen3"}', "hf")
    if not isinstance(model_type, str):
        raise ModelError(f"hf.model_type must be a name, such as qwen3, got {model_type!r}", "hf")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        if model_type in CONFIG_MAPPING_NAMES:
            raise ModelError(f"{model_type!r} is a model of transformers, but not a causal language model", "hf")
        near = nearest(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ModelError(f"transformers has no causal language model of model_type {model_type!r}{near}", "hf")
    with model_errors(model_type):
        default = AutoConfig.for_model(model_type)
    if "vocab_size" not in default.to_dict():
        return _hf_config(_text_model(default, keys), vocab_size)
    _require_known(default, keys, model_type)
    keys.setdefault("vocab_size", vocab_size)
    _require_count("vocab_size", keys["vocab_size"])
    if keys["vocab_size"] < vocab_size:
        raise ModelError(f"hf.vocab_size {keys['vocab_size']} is smaller than the tokenizer's {vocab_size}", "hf")
    for name in SPECIAL_TOKENS:
        if name not in keys and _accepts(default, {name: None}):
            keys[name] = None
    with model_errors(model_type):
        return type(default)(**keys)


def _text_model(composite: PretrainedConfig, keys: dict) -> dict:
    """What to write into `hf` for the text model inside a composite of several models: its keys are in `text_config`."""
    is_composite = f"{composite.model_type!r} is a composite, whose vocabulary belongs to its text model"
    text_type = ""
    with suppress(ValueError):  # two of them
        text_type = composite.get_text_config().model_type
    if text_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or text_type == composite.model_type:
        raise ModelError(f"{is_composite}, which transformers does not offer by itself", "hf")
    if keys.keys() != {"text_config"} or not isinstance(keys["text_config"], dict):
        message = f"{is_composite}; did you mean {text_type!r}? Or give that model's keys alone, in hf.text_config"
        raise ModelError(message, "hf")
    return {"model_type": text_type, **keys["text_config"]}


def _require_known(config: PretrainedConfig, keys: dict, where: str) -> None:
    """Raise ModelError for a key that neither the configuration declares nor the code of the model reads."""
    known = {*config.to_dict(), *config.attribute_map, "attn_implementation", "experts_implementation"}
    known -= {"model_type", "transformers_version"}
    known |= ROPE_KEYS if hasattr(config, "rope_parameters") else set()
    if not keys.keys() <= known:
        known |= _read_by_the_code(config)
    for key, value in keys.items():
        if key not in known:
            raise ModelError(f"{where} has no configuration key {key!r}{nearest(key, known)}", "hf")
        if isinstance(value, dict) and key in config.sub_configs and getattr(config, key) is not None:
            _require_known(getattr(config, key), value, f"{where}.{key}")


def _read_by_the_code(config: PretrainedConfig) -> set[str]:
    """Keys that the modules of a model type read of its configuration, whether or not the class declares them (`head_dim`)."""
    package = type(config).__module__.rpartition(".")[0]
    folder = Path(inspect.getfile(type(config))).parent
    if not package.startswith("transformers.models."):
        return set()
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    read = {name for pair in READS.findall(source) for name in pair if name}
    return {name for name in read if not name.startswith("_") and not hasattr(PretrainedConfig, name)}


def _accepts(config: PretrainedConfig, keys: dict) -> bool:
    """Whether a configuration class takes these values beside its defaults."""
    try:
        type(config)(**keys)
    except Exception:
        return False
    return True


def longest_context(config: PretrainedConfig) -> int | None:
    """The most tokens that a model can read, or None if nothing limits it."""
    text = config.get_text_config()
    limits = (getattr(text, name, None) for name in CONTEXT_KEYS)
    return next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)  # -1: none, of XLNet


@contextmanager
def model_errors(model_type: str, config: PretrainedConfig | None = None) -> Iterator[None]:
    """Raise ModelError for any error of transformers while it makes a configuration or a model, except out of memory."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        hint = without_value(config, error) if config is not None else ""
        raise ModelError(f"{model_type}: {one_line(error)}{hint}", "hf" if config is None else None) from error


def without_value(config: PretrainedConfig, error: Exception) -> str:
    """The keys that have no value, as a hint where an error speaks of None: some architectures have no default for them."""
    unused = PretrainedConfig().to_dict().keys() | {"bos_token_id", "eos_token_id"}
    empty = [key for key, value in config.to_dict().items() if value is None and key not in unused]
    return f"; keys without a value are {', '.join(empty)}" if empty and "None" in str(error) else ""


def one_line(error: Exception) -> str:
    """The message of an error in one line, with its class if the message is a single word or empty."""
    text = textwrap.shorten(str(error), 240, placeholder=" ...")
    return text if " " in text else f"{type(error).__name__} {text}".strip()


def _require_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{name} must be a positive integer, got {value!r}", name)


def nearest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?" if one of the `known` words is near, else nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.75)
    return f"; did you mean {near[0]!r}?" if near else ""
