"""What an exported folder says beside what transformers 5 writes, for readers that go by the names of transformers 4.

These are transformers 4 itself, which otherwise takes its defaults for rotary angles without a word, and the converters of
CTranslate2 and llama.cpp.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoConfig

NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}  # names of the GPT-NeoX family


def add_names_of_transformers_4(folder: Path) -> None:
    """Complete config.json and tokenizer_config.json. What transformers 5 reads from them stays the same."""
    before = AutoConfig.from_pretrained(folder).to_dict()
    path = folder / "config.json"
    written = path.read_text(encoding="utf-8")
    change(path, lambda config: config | old_names(config))
    if AutoConfig.from_pretrained(folder).to_dict() != before:  # a class of its own, which knows one of the names otherwise
        path.write_text(written, encoding="utf-8")
    # transformers 4 lacks the class that 5 writes, gives every model token_type_ids, and pads a batch behind its prompts.
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    change(folder / "tokenizer_config.json", lambda config: config | names | {"padding_side": "left"})


def old_names(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that say under their former names what `dtype` and `rope_parameters` say."""
    names = {"torch_dtype": config["dtype"]} if config.get("dtype") else {}
    rope = dict(config.get("rope_parameters") or {})
    if "sliding_attention" in rope and "full_attention" in rope:  # Gemma 3: angles by the type of the layer
        names["rope_local_base_freq"] = rope["sliding_attention"].get("rope_theta")
        rope = dict(rope["full_attention"])
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            names[NEOX[key] if config["model_type"].startswith("gpt_neox") else key] = rope.pop(key)
    return names | ({"rope_scaling": rope} if rope.get("rope_type", "default") != "default" else {})


def change(path: Path, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the mapping in a JSON file."""
    found = changed(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
