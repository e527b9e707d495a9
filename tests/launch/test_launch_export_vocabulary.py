"""Rows of the vocabulary that no token has: an export drops them, and stays the same function of the tokens."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.tokenizer import byte_tokenizer, save_tokenizer
from launch.checkpoint.export import export
from launch.checkpoint.load import load_model
from launch.checkpoint.publish import write_manifest
from launch.distributed.buffers import persistent_buffers
from models import build_model
from models.build import model_of
from models.gpt3 import GPT3Config

sys.path.append(str(Path(__file__).parents[1] / "models"))
from tiny_models import tiny

ROWS = 320
END = "<|endoftext|>"


def make_run(folder: Path, model, tokenizer) -> Path:
    """A run's folder with one checkpoint of `model`, whose weights and biases are all random."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    checkpoint = folder / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    own = dict(model.named_parameters()) | persistent_buffers(model)
    save_file({name: tensor.detach().contiguous() for name, tensor in own.items()}, checkpoint / "model.safetensors")
    model.config.to_json_file(checkpoint / "config.json")
    write_manifest(checkpoint)
    save_tokenizer(tokenizer, folder, END)
    return checkpoint


def gpt3(**keys):
    return model_of(GPT3Config(**{"vocab_size": ROWS, "layers": 1, "width": 16, "heads": 2, "context": 32} | keys))


def hf(model_type, **keys):
    return build_model(hf=tiny(model_type) | keys, vocab_size=ROWS)


def bytes_and(*tokens: tuple[str, bool]):
    """The byte tokenizer, 257 tokens, with more behind them: (text, whether it is special)."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text, special in tokens])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "tokens", "rows"),
    [
        (gpt3, 257, 257),
        (lambda: gpt3(tie_word_embeddings=False), 257, 257),
        (lambda: hf("llama"), 257, 257),
        (lambda: hf("llama", tie_word_embeddings=True), 259, 259),
        (lambda: hf("bert"), 257, 257),  # the output layer has a bias
        (lambda: hf("phi"), 257, 257),  # the same of another kind
        (lambda: hf("marian"), 257, ROWS),  # a second vocabulary in its code
        (lambda: hf("roberta", pad_token_id=300, max_position_embeddings=400), 257, 301),  # counts from the padding
        (lambda: hf("roberta", pad_token_id=3), 259, 259),
        (lambda: hf("xglm"), 259, 259),
    ],
)
def test_rows_without_a_token_are_dropped(tmp_path, make, tokens, rows):
    tokenizer = bytes_and(*[("<tool>", False), ("<pad>", True)][: tokens - 257])
    checkpoint = make_run(tmp_path / "run", make(), tokenizer)
    notes = []
    export(checkpoint, tmp_path / "out", notes.append)
    trained, stock = load_model(checkpoint), AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()

    assert stock.config.get_text_config().vocab_size == stock.get_input_embeddings().num_embeddings == rows
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == tokens <= rows
    card = (tmp_path / "out" / "README.md").read_text()
    if rows < ROWS:
        assert f"{rows} rows; {ROWS - rows} that no token has were dropped" in card and notes == []
    else:
        assert f"{rows} rows |" in card
        assert len(notes) == 1 and "keeps 63 rows behind those of its tokens" in notes[0] and "\n" not in notes[0]

    ids = torch.arange(tokens)[None, -20:]
    with torch.no_grad():
        expected, logits = (model(ids, use_cache=False).logits[..., :tokens] for model in (trained, stock))
    assert expected.std() > 0.05
    # A stock GPT-2 adds up otherwise than a GPT-3: 1e-6 of 2. Every other model has the same bits.
    assert torch.allclose(logits, expected, atol=1e-5) if trained.config.model_type == "gpt3" else torch.equal(logits, expected)


def test_the_file_holds_nothing_of_the_rows_and_a_tied_weight_once(tmp_path):
    for tied, names in ((True, ["transformer.wte.weight"]), (False, ["lm_head.weight", "transformer.wte.weight"])):
        checkpoint = make_run(tmp_path / f"{tied}", gpt3(tie_word_embeddings=tied), byte_tokenizer())
        export(checkpoint, tmp_path / f"{tied}.out", dtype="bfloat16")
        weights = load_file(tmp_path / f"{tied}.out" / "model.safetensors")
        assert sorted(name for name, weight in weights.items() if weight.shape == (257, 16)) == names
        whole = load_file(checkpoint / "model.safetensors")["model.embed_tokens.weight"]
        assert torch.equal(weights["transformer.wte.weight"], whole[:257].bfloat16())
        parameters = sum(weight.numel() for weight in weights.values())
        assert (tmp_path / f"{tied}.out" / "model.safetensors").stat().st_size < 2 * parameters + 8192


def test_a_row_behind_a_gap_in_the_vocabulary_stays(tmp_path):
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.to_str())
    state["model"]["vocab"]["far"] = 310
    tokenizer = type(tokenizer).from_str(json.dumps(state))
    checkpoint = make_run(tmp_path / "run", gpt3(), tokenizer)
    export(checkpoint, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 311
