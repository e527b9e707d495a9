"""The tokenizer's way from preparation through a training run into an export, for every kind of tokenizer."""

import json

import pytest
from safetensors.torch import save_file
from tokenizer_zoo import ZOO, corpus
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

import train
from data.prepare import prepare
from data.shards import TokenShards
from data.tokenizer import copy_tokenizer
from launch.checkpoint.export import export
from launch.checkpoint.publish import write_manifest
from models import build_model

LLAMA = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture
def prepared(tmp_path):
    """prepared(name): the texts of a small corpus, and their shards with a tokenizer of the zoo."""

    def run(name):
        tok, config, _ = ZOO[name]
        (tmp_path / "tok").mkdir()
        tok.save(str(tmp_path / "tok" / "tokenizer.json"))
        if config is not None:
            (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(config))
        texts = corpus(20)
        (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        options = {"tokenizer": tmp_path / "tok", "val_fraction": 0.2, "workers": 1, "log": lambda line: None}
        return texts, prepare(tmp_path / "c.jsonl", tmp_path / "data", **options)

    return run


def documents(folder) -> set[tuple[int, ...]]:
    """The documents of both splits, as tokens without the end of text."""
    found = []
    for split in ("train", "val"):
        shards = TokenShards(folder, split)
        found.append([])
        for token in shards.read(0, shards.n_tokens).tolist():
            if token == shards.eot_id:
                found.append([])
            else:
                found[-1].append(token)
    return {tuple(document) for document in found if document}


def write_run(folder, data, hf, context):
    """A training run's folder with one checkpoint, as train.py leaves it."""
    shards = TokenShards(data, "train")
    model = build_model(size=None if hf else "gpt3-tiny", hf=hf, vocab_size=-(-shards.vocab_size // 64) * 64)
    checkpoint = folder / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, checkpoint / "model.safetensors")
    model.config.to_json_file(checkpoint / "config.json")
    config = {"run": {"name": "tiny", "seed": 0}, "model": {"context": context}, "data": {"dir": str(data)}}
    config |= {"train": {"batch_size": 1}, "optimizer": {"name": "adamw", "lr": 1e-3}}
    state = {"step": 1, "tokens": 0, "identity": {"data set": shards.fingerprint}, "config": config}
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_manifest(checkpoint)
    copy_tokenizer(data, folder, shards.eot_id)
    return folder


class Ends(LogitsProcessor):
    """Makes the end of text certain once there are `length` tokens."""

    def __init__(self, end: int, length: int):
        self.end, self.length = end, length

    def __call__(self, ids, scores):
        scores[:, self.end] = 1e9 if ids.shape[1] >= self.length else -1e9
        return scores


def check_export(folder, texts, data, context):
    """AutoTokenizer cuts text into the tokens of training, nothing before it; generation stops at the end of text."""
    shards = TokenShards(data, "train")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    end = shards.eot_id
    assert {tuple(tokenizer(text)["input_ids"]) for text in texts} == documents(data)
    for text in texts[:5]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]).strip() in (text, text.lower())
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == end
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == config.bos_token_id == end
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id is not None
    embedding = model.get_input_embeddings()
    assert model.config.pad_token_id == tokenizer.pad_token_id or (
        tokenizer.pad_token_id == end and embedding.padding_idx is None
    )
    assert getattr(embedding, "padding_idx", None) != end
    batch = tokenizer(["the cat sat on a mat", "the"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()
    assert tokenizer.model_max_length == context
    prompt = tokenizer("the", return_tensors="pt")["input_ids"]
    written = model.generate(prompt, max_new_tokens=20, logits_processor=[Ends(end, prompt.shape[1] + 3)])
    assert written.shape[1] == prompt.shape[1] + 4 and written[0, -1] == end
    assert model.generate(max_new_tokens=2)[0, 0] == end  # without a prompt
    return model


@pytest.mark.parametrize("name", ZOO)
def test_every_tokenizer_keeps_its_end_of_text(prepared, tmp_path, name):
    texts, data = prepared(name)
    hf = LLAMA if list(ZOO).index(name) % 3 else None
    context = 24 if hf else 128
    export(write_run(tmp_path / "run", data, hf, context if hf else None), tmp_path / "out")
    model = check_export(tmp_path / "out", texts, data, context)
    assert model.config.max_position_embeddings == context


def test_a_run_of_a_former_version_is_exported_the_same(prepared, tmp_path):
    """Its folder has no tokenizer_config.json, and its tokenizer.json is the one that was given, with a BOS."""
    texts, data = prepared("llama")
    run = write_run(tmp_path / "run", data, LLAMA, 24)
    (run / "tokenizer_config.json").unlink()
    ZOO["llama"][0].save(str(run / "tokenizer.json"))
    export(run, tmp_path / "out")
    check_export(tmp_path / "out", texts, data, 24)


POSITIONS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 96}


@pytest.mark.parametrize(
    ("hf", "kept"),
    [
        ({"model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 1, "intermediate_size": 16, **POSITIONS}, False),
        ({"model_type": "gpt_neox", "intermediate_size": 16, **POSITIONS}, False),
        ({"model_type": "opt", "ffn_dim": 16, "word_embed_proj_dim": 16, **POSITIONS}, True),  # learned positions
        ({"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 96}, True),
        ({**LLAMA, **POSITIONS, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, True),  # angles depend on it
    ],
)
def test_the_trained_context_is_written_where_the_function_stays(prepared, tmp_path, hf, kept):
    texts, data = prepared("own bpe")
    run = write_run(tmp_path / "run", data, hf, 24)
    export(run, tmp_path / "out")
    model = check_export(tmp_path / "out", texts, data, 24)
    assert model.config.max_position_embeddings == (96 if kept else 24)


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_prepared_trained_exported(prepared, tmp_path, name):
    texts, data = prepared(name)
    (tmp_path / "c.yaml").write_text(
        json.dumps(
            {
                "run": {"name": "t", "dir": str(tmp_path / "run")},
                "model": {"hf": LLAMA, "context": 24},
                "data": {"dir": str(data)},
                "train": {"steps": 3, "batch_size": 2, "micro_batch_size": 2},
                "optimizer": {"name": "adamw", "lr": 1e-2},
                "log": {"sample_tokens": 5, "sample_prompt": "the cat"},
            }
        )
    )
    assert train.main([str(tmp_path / "c.yaml")]) == 0
    assert "</s>" not in (tmp_path / "run" / "sample.txt").read_text()
    export(tmp_path / "run", tmp_path / "out")
    check_export(tmp_path / "out", texts, data, 24)
