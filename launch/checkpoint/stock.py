"""Reads the weights of transformers folders, and says what is wrong with them.

`model.init`, `models.sample` and `launch.evaluate` accept the same folders. Nothing is downloaded, unpickled or run.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from models.experts import fit_experts

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # dtypes of usable weights
# Buffers that older versions of transformers saved: causal masks, and the frequencies of rotary positions.
OLD_BUFFER = re.compile(r"(.*\.)?((attn|attention)(\.attention)?\.(bias|masked_bias)|rotary_emb\.inv_freq)")
INTEGERS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}  # dtypes of masks and other buffers


def read_stock(path: Path, config: PretrainedConfig, dtype: torch.dtype | str) -> tuple[PreTrainedModel, str]:
    """Load the model of a folder on the CPU, in evaluation mode. Returns it and a text on weights that do not fit `config`.

    The text is empty if all weights fit. `dtype`: of the weights; "auto": as the folder says. Raises any error that transformers
    raises for missing or damaged files.
    """
    with quiet():
        model, info = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # `misfit_of` reports them by name
            output_loading_info=True,
        )
    fit_experts(model)
    return model, misfit_of(info, config)


def misfit_of(info: Mapping[str, Any], config: PretrainedConfig) -> str:
    """Return a text on weights that a folder's `config` lacks or that the folder lacks, with the remedy; empty if all fit.

    `info`: the loading info of transformers.
    """
    shapes = [f"{name} of shape {tuple(there)}, not {tuple(here)}" for name, there, here in info["mismatched_keys"]]
    unknown = [name for name in info["unexpected_keys"] if not OLD_BUFFER.fullmatch(name)]
    for problem, names in (("lacks", info["missing_keys"]), ("has unknown", unknown), ("has", shapes)):
        if names:
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            return f"{problem} {', '.join(sorted(names)[:2])}{more}: {why_not(config)}"
    return ""


def untied(model: nn.Module, names: Collection[str]) -> str:
    """Return a text on a weight that the folder stores separately although its configuration ties it; empty if there is none.

    `names`: the parameters that a model of the configuration has.
    """
    apart = sorted({name for name, _ in model.named_parameters()} - set(names))
    tied = "which its config.json ties to another weight: set tie_word_embeddings to false there"
    return f"has a {apart[0]} of its own, {tied}" if apart else ""


def why_not(config: PretrainedConfig) -> str:
    """Return the probable reason, by `config`, why weights do not fit a causal language model, and the remedy."""
    kind = next(iter(config.architectures or ()), "")
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, "")
    if kind and kind not in ((causal,) if isinstance(causal, str) else causal):
        if "For" in kind:
            return f"it is a {kind}, which is not a causal language model; name one"
        return f"it is a base model ({kind}), without the output layer; name a folder with the whole model"
    return f"its weights are not those of its config.json, a {config.model_type}; restore the config.json that belongs to them"


def dtypes_in(file: Path) -> dict[str, str]:
    """Return the dtype of each tensor in a safetensors file, by safetensors' names."""
    with safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118


def not_real(dtypes: Mapping[str, str], model: nn.Module) -> str:
    """Return the first weight whose dtype is not a plain real number, as a text; empty if there is none.

    transformers would use integer weights as they are, without the scale that a quantization stores elsewhere. Buffers such as
    masks may be integers. `model`: a model of the files' configuration, which may be without memory.
    """
    weights = {name for name, p in model.named_parameters(remove_duplicate=False) if p.is_floating_point()}
    weights |= {name.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.") for name in weights}
    for name, dtype in sorted(dtypes.items()):
        is_weight = name in weights or name.endswith(".weight")  # such as those of experts that the model stacks
        if dtype not in DTYPES and (is_weight or dtype not in INTEGERS):
            return f"{'complex' if dtype.startswith('C') else 'quantized'} weights ({name} in {dtype})"
    return ""


@contextmanager
def quiet() -> Iterator[None]:
    """In this context, transformers shows no progress bars, tables or advice. Errors are still raised."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
