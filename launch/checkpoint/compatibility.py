"""What an exported folder says beside what transformers 5 writes, for readers that go by the names of transformers 4.

These are transformers 4 itself, which otherwise takes its defaults for rotary angles without a word, and the converters of
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
    """Complete config.json and tokenizer_config.json. What transformers 5 reads from them stays the same."""
    path = folder / "config.json"
    before = read(folder)
    for key, value in old_names(json.loads(path.read_text(encoding="utf-8"))).items():
        written = path.read_text(encoding="utf-8")
        change(path, {key: value})
        try:
            same = read(folder) == before
        except Exception:  # a class that takes this name for something else, or warns of it
            same = False
        if not same:
            path.write_text(written, encoding="utf-8")
    # transformers 4 lacks the class that 5 writes, gives every model token_type_ids, and pads a batch behind its prompts.
    change(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "padding_side": "left",
            "add_bos_token": False,  # llama.cpp adds one to a tokenizer like Llama's unless it is told
        },
    )


def read(folder: Path) -> dict[str, Any]:
    """The configuration that transformers reads from an exported folder. Raises whatever it raises, and its warnings, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()


def old_names(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that say under former names what some of its entries say."""
    names = {old: config[new] for old, new in (("torch_dtype", "dtype"), ("num_experts", "num_local_experts")) if new in config}
    rope = dict(config.get("rope_parameters") or {})
    if isinstance(rope.get("full_attention"), dict):  # Gemma 3: angles by the type of the layer
        names["rope_local_base_freq"] = (rope.get("sliding_attention") or {}).get("rope_theta")
        rope = dict(rope["full_attention"])
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            names[NEOX[key] if config["model_type"].startswith("gpt_neox") else key] = rope.pop(key)
    if rope.get("rope_type", "default") != "default":
        names["rope_scaling"] = rope
    return {name: value for name, value in names.items() if value is not None and name not in config}


def change(path: Path, entries: dict[str, Any]) -> None:
    """Add entries to the mapping in a JSON file, or replace them."""
    found = json.loads(path.read_text(encoding="utf-8")) | entries
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
