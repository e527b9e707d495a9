"""Adds entries to an exported folder for programs that read the names of transformers 4.

These programs are transformers 4 itself, which would silently use default rotary angles otherwise, and the converters of
CTranslate2 and llama.cpp.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from transformers import AutoConfig

NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}  # names of the GPT-NeoX family


def add_names_of_transformers_4(folder: Path) -> None:
    """Add old names to config.json and tokenizer_config.json. The configuration that transformers 5 reads stays the same."""
    path = folder / "config.json"
    before = read(folder)
    for key, value in old_names(json.loads(path.read_text(encoding="utf-8"))).items():
        written = path.read_text(encoding="utf-8")
        change(path, {key: value})
        try:
            same = read(folder) == before
        except Exception:  # for this class, the name means something else or raises a warning
            same = False
        if not same:
            path.write_text(written, encoding="utf-8")
    # transformers 4 lacks the tokenizer class that 5 writes, passes token_type_ids to every model, and pads prompts on the right.
    change(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",
            "add_bos_token": False,  # without it, llama.cpp adds BOS for tokenizers like Llama's
        },
    )


def read(folder: Path) -> dict[str, Any]:
    """Return the configuration that transformers reads from an exported folder. Raises its errors, and its warnings as errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()


def old_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a config.json under their former names, as far as the file lacks these."""
    names = {old: config[new] for old, new in (("torch_dtype", "dtype"), ("num_experts", "num_local_experts")) if new in config}
    rope = dict(config.get("rope_parameters") or {})
    if isinstance(rope.get("full_attention"), dict):  # Gemma 3: angles depend on the type of the layer
        names["rope_local_base_freq"] = (rope.get("sliding_attention") or {}).get("rope_theta")
        rope = dict(rope["full_attention"])
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            names[NEOX[key] if config["model_type"].startswith("gpt_neox") else key] = rope.pop(key)
    if rope.get("rope_type", "default") != "default":
        names["rope_scaling"] = rope
    return {name: value for name, value in names.items() if value is not None and name not in config}


def change(path: Path, entries: dict[str, Any]) -> None:
    """Add or replace entries of the mapping in a JSON file."""
    found = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
