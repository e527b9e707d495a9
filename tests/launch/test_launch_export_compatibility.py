"""What an export says for readers of other versions, and that reading it warns of nothing."""

import json
import os
import subprocess
import sys

import pytest
from test_launch_export_vocabulary import bytes_and, gpt3, hf, make_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from data.tokenizer import byte_tokenizer
from launch.checkpoint.compatibility import old_names
from launch.checkpoint.export import export

LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("model_type", "keys", "names"),
    [
        ("llama", {"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ("llama", {"rope_theta": 2e4, "rope_scaling": {**LINEAR}}, {"rope_theta": 2e4, "rope_scaling": LINEAR}),
        ("phi", {"partial_rotary_factor": 0.75}, {"partial_rotary_factor": 0.75, "rope_theta": 10000.0}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 5e4}, {"rotary_pct": 0.5, "rotary_emb_base": 5e4}),
        ("gemma3_text", {}, {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
        ("bert", {}, {}),
    ],
)
def test_rotary_angles_under_the_names_of_transformers_4(tmp_path, model_type, keys, names):
    """transformers 4 does not know rope_parameters, and takes its defaults without a word."""
    export(make_run(tmp_path / "run", hf(model_type, **keys), byte_tokenizer()), tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in names} == names and config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert "rope_scaling" in names or "rope_scaling" not in config
    read = AutoConfig.from_pretrained(tmp_path / "out")  # transformers 5 reads what it would without them
    for key in old_names(config):
        del config[key]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert AutoConfig.from_pretrained(tmp_path / "out").to_dict() == read.to_dict()


def test_no_input_that_the_model_does_not_take_and_prompts_stand_before_what_is_written(tmp_path):
    export(make_run(tmp_path / "run", hf("llama"), bytes_and(("<pad>", True))), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer(["the cat", "a"], padding=True, return_tensors="pt")
    assert sorted(inputs) == ["attention_mask", "input_ids"]  # transformers 4 adds token_type_ids, which generate() refuses
    assert inputs["attention_mask"][1].tolist() == [0] * 6 + [1]
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["model_input_names"] == ["input_ids", "attention_mask"] and written["padding_side"] == "left"
    assert written["add_bos_token"] is False  # llama.cpp adds one otherwise, which training never saw
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(**tokenizer("a", return_tensors="pt"), max_length=9)
    both = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(**inputs, max_new_tokens=8)
    assert both[1, 6:].tolist()[: alone.shape[1]] == alone[0].tolist()


def test_reading_and_generating_warn_of_nothing(tmp_path):
    """A context as large as that of published models; a small one limits what a pipeline writes, of which generate() warns."""
    for name, model in (("gpt2", gpt3(context=512)), ("llama", hf("llama", max_position_embeddings=512))):
        export(make_run(tmp_path / f"{name}.run", model, byte_tokenizer()), tmp_path / name)
    script = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
for folder in sys.argv[1:]:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("the cat", return_tensors="pt")
    model.generate(**inputs, max_new_tokens=4), model.generate(**inputs, max_length=9)
    pipeline("text-generation", model=folder)(["the cat", "a"], max_new_tokens=4, batch_size=2)
"""
    command = [sys.executable, "-W", "error::UserWarning:transformers", "-c", script, tmp_path / "gpt2", tmp_path / "llama"]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "real_accelerator" not in line]
    assert (done.returncode, said) == (0, [])
