"""`model.init`: a run that begins with the weights of another run, a folder of transformers or the hub."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from data.prepare import prepare
from launch.checkpoint.export import export

QUICK = ["train.steps=1", "eval.every=1", "eval.sequences=8", "log.sample_tokens=0"]
FROZEN = ["optimizer.lr=0", "optimizer.adamw_lr=0", "optimizer.weight_decay=0"]  # the first evaluation is that of the source
BARE = [f"model.{key}=null" for key in ("layers", "width", "heads", "context")]
QWEN = {"model_type": "qwen3", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
QWEN |= {"head_dim": 16, "intermediate_size": 64, "vocab_size": 320}


def gpt2(**keys):
    torch.manual_seed(3)
    return GPT2LMHeadModel(GPT2Config(**{"vocab_size": 257, "n_positions": 48, "n_embd": 32, "n_layer": 2, "n_head": 2} | keys))


def qwen(**keys):
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**QWEN, **keys))


def taken(run) -> str:
    (line,) = [line for line in run.out.splitlines() if line.startswith("began with the weights")]
    return line


def weights(run, folder="run", step=1):
    return load_file(run.tmp_path / folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")


def config(run, folder="run", step=1):
    return json.loads((run.tmp_path / folder / "checkpoints" / f"step_{step:08d}" / "config.json").read_text())


def refused(result, *messages):
    status, _, err = result
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    for message in messages:
        assert message in err, err


def test_from_a_run_a_checkpoint_and_an_export(run):
    """All three are the same weights: the first validation loss is the source's, and so are the weights without learning.

    The rows that no token has are not in the export, so that its loss is lower.
    """
    _, records, _ = run("train.steps=3", *QUICK[1:], folder="source")
    loss = [r["val_loss"] for r in records if "val_loss" in r][-1]
    source = run.tmp_path / "source"
    checkpoint = source / "checkpoints" / "step_00000003"
    export(source, run.tmp_path / "stock")
    before = load_file(checkpoint / "model.safetensors")
    for init, keys, text in (
        (
            source,
            BARE,
            f"of step 3 of {checkpoint}: {sum(w.numel() for w in before.values()):,} in float32; its tokenizer is that",
        ),
        (checkpoint, [], f"of step 3 of {checkpoint}: "),
        (run.tmp_path / "stock", BARE, f"the weights of {run.tmp_path / 'stock'}: "),
    ):
        status, records, err = run(*QUICK, *FROZEN, *keys, f"model.init={init}", folder=f"{init.name}-begun")
        assert status == 0, err
        assert text in taken(run)
        assert [r["step"] for r in records if "loss" in r] == [1] and records[0]["tokens"] <= 8 * 32
        (found,) = [r["val_loss"] for r in records if "val_loss" in r]
        after = weights(run, f"{init.name}-begun")
        rows = 257 if init.name == "stock" else 320
        assert len(after["model.embed_tokens.weight"]) == rows
        assert found < loss - 0.01 if rows == 257 else found == pytest.approx(loss, rel=1e-6)
        assert before.keys() == after.keys()
        assert all(torch.equal(weight[: len(after[name])], after[name]) for name, weight in before.items())

    # Continued, the run is its own: the source may be gone, and nothing is taken again.
    shutil.rmtree(run.tmp_path / "stock")
    again = [*BARE, f"model.init={run.tmp_path / 'stock'}", "train.steps=2", *QUICK[1:]]
    status, records, err = run(*again, folder="stock-begun")
    assert status == 0 and "began with" not in run.out and "resumed from" in run.out, err
    assert [r["step"] for r in records if "loss" in r] == [1, 2]
    refused(run(*again, f"model.init={source}", folder="stock-begun"), "model.init is ", f"{source} now")
    refused(run("train.steps=4", f"model.init={checkpoint}", folder="source"), "model.init is not set in the checkpoint")


def test_a_gpt2_becomes_a_gpt3_or_stays_one(run):
    """A folder of transformers, in bfloat16 and in several files; the context may be shorter than the positions."""
    model = gpt2().to(torch.bfloat16)
    folder = run.tmp_path / "gpt2"
    model.save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    init = f"model.init={folder}"
    assert run(*QUICK, *FROZEN, *BARE, "model.context=32", "model.dropout=0.1", init)[0] == 0
    line = taken(run)
    assert "in bfloat16, trained in float32; it has no tokenizer to compare" in line
    values = weights(run)
    assert values["model.embed_tokens.weight"].dtype == torch.float32
    assert torch.equal(values["model.layers.1.mlp.up_proj.weight"], model.transformer.h[1].mlp.c_fc.weight.T.float())
    own = config(run)
    assert (own["model_type"], own["context"], own["dropout"]) == ("gpt3", 48, 0.1)
    # Sizes that agree are welcome, and named ones too; model.hf keeps the GPT-2.
    refused(run(*QUICK, init, "model.layers=3", folder="b"), "model.layers is 3, there 2; leave model.layers out")
    refused(
        run(*QUICK, *BARE, init, "model.size=gpt3-tiny", folder="b"),
        "width is 64, there 32; heads is 4, there 2; leave model.size",
    )
    refused(run(*QUICK, init, "model.context=64", folder="b"), "model.context is 64, but the model has 48 positions")
    assert (
        run(*QUICK, *FROZEN, *BARE, "model.hf={model_type: gpt2, resid_pdrop: 0}", "model.context=32", init, folder="stock")[0]
        == 0
    )
    own = config(run, "stock")
    assert (own["model_type"], own["resid_pdrop"], own["attn_pdrop"]) == ("gpt2", 0, 0.1)


def test_any_causal_model_and_what_contradicts_it(run):
    model = qwen(rope_theta=5e4)
    folder = run.tmp_path / "qwen"
    model.save_pretrained(folder)
    common = [*QUICK, *BARE[:3], f"model.init={folder}"]
    assert run(*common, *FROZEN, "model.hf={rope_theta: 50000, attention_dropout: 0.1}")[0] == 0
    after = weights(run)
    assert all(torch.equal(value, after[name]) for name, value in model.named_parameters() if name in after)
    own = config(run)
    assert (own["rope_parameters"]["rope_theta"], own["attention_dropout"]) == (50000, 0.1)
    # Continued without its source: the architecture is the run's own.
    status, _, err = run(*common, "train.steps=2", f"model.init={folder}", "checkpoint.every=1")
    assert status == 0 and "resumed from" in run.out and "began with" not in run.out, err
    assert config(run, step=2)["rope_parameters"] == own["rope_parameters"]
    for change, message in (
        ("model.hf={rope_theta: 10000}", "model.hf.rope_theta is 10000, there 50000"),
        ("model.hf={hidden_act: gelu}", "model.hf.hidden_act is gelu, there silu; leave model.hf.hidden_act out"),
        ("model.hf={model_type: llama}", "model.hf.model_type is llama, there qwen3"),
        ("model.hf={hiden_act: silu}", "hiden_act"),
        ("model.layers=2", "model.layers is 2, there a qwen3 has no such key"),
        ("model.dropout=0.1", "model.dropout is 0.1"),
        ("model.vocab_size=384", "model.vocab_size is 384, there 320"),
    ):
        refused(run(*common, change, folder="b"), message)


def damaged(folder, what):
    path = folder / "model.safetensors"
    tensors, settings = load_file(path), json.loads((folder / "config.json").read_text())
    name = "transformer.h.0.mlp.c_fc.weight"
    if what == "missing":
        del tensors[name]
    elif what == "unknown":
        tensors["transformer.h.7.mlp.c_fc.weight"] = torch.ones(3)
    elif what == "misshapen":
        tensors[name] = tensors[name][:, :-1].clone()
    elif what == "activation":
        settings["n_layer"] = 3
    elif what == "not finite":
        tensors[name][3, 4] = float("inf")
    elif what == "small":
        tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:200].clone()
        settings["vocab_size"] = 200
    elif what == "bert":
        settings = {"model_type": "t5", "vocab_size": 257}
    elif what == "code":
        settings = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}, "vocab_size": 257}
        (folder / "code.py").write_text("raise SystemExit('was run')")
    elif what == "quantized":
        settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    save_file(tensors, path, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings))
    if what == "pickled":
        torch.save(tensors, folder / "pytorch_model.bin")
        path.unlink()
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif what == "empty":
        path.unlink()
    elif what == "no config":
        (folder / "config.json").unlink()
    elif what == "adapter":
        (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "lacks transformer.h.0.mlp.c_fc.weight: its weights are not those of its config.json"),
        ("unknown", "has unknown transformer.h.7.mlp.c_fc.weight"),
        ("misshapen", "has transformer.h.0.mlp.c_fc.weight of shape (32, 127), not (32, 128)"),
        ("activation", "lacks transformer.h.2."),
        ("not finite", "has numbers in model.layers.0.mlp.up_proj.weight that are not finite"),
        ("small", "has a vocabulary of 200, the data one of 257: prepare the data with the tokenizer of these weights"),
        ("bert", "is a t5, which is not a causal language model"),
        ("code", "config.json"),
        ("quantized", "has quantized weights"),
        ("pickled", "holds only pickled weights (pytorch_model.bin), which are never read"),
        ("cut", "is damaged"),
        ("empty", "has no model.safetensors"),
        ("no config", "has no config.json: it is neither a run nor a checkpoint"),
        ("adapter", "holds an adapter"),
    ],
)
def test_what_is_no_model_for_this_is_one_line(run, what, message):
    folder = run.tmp_path / "source"
    gpt2().save_pretrained(folder)
    damaged(folder, what)
    refused(run(*QUICK, *BARE, f"model.init={folder}"), message, str(folder))
    assert not list(run.tmp_path.glob("run/checkpoints/*"))


def test_a_head_of_its_own_where_the_configuration_ties_it_is_refused(run):
    """transformers unties it, and the checkpoints would hold a weight that their configuration has no place for."""
    folder = run.tmp_path / "source"
    qwen().save_pretrained(folder)
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | {"tie_word_embeddings": True}))
    message = (
        "has a lm_head.weight of its own, which its config.json ties to another weight: set tie_word_embeddings to false there"
    )
    refused(run(*QUICK, *BARE[:3], f"model.init={folder}"), message)
    (folder / "config.json").write_text(json.dumps(own | {"tie_word_embeddings": False}))
    assert run(*QUICK, *BARE[:3], f"model.init={folder}")[0] == 0
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= weights(run).keys()
    # The same numbers twice are one weight.
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(own | {"tie_word_embeddings": True}))
    assert run(*QUICK, *BARE[:3], f"model.init={folder}", folder="tied")[0] == 0
    assert "lm_head.weight" not in weights(run, "tied")
    assert run(*QUICK, "train.steps=2", *BARE[:3], f"model.init={folder}", folder="tied")[0] == 0


@pytest.mark.parametrize(
    ("dtype", "kind", "name"),
    [
        (torch.int8, "quantized", "I8"),
        (torch.uint8, "quantized", "U8"),
        (torch.float8_e4m3fn, "quantized", "F8_E4M3"),
        (torch.complex64, "complex", "C64"),
    ],
)
def test_weights_that_are_no_plain_real_numbers_are_refused(run, dtype, kind, name):
    folder = run.tmp_path / "source"
    qwen().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    weight = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {weight: tensors[weight].to(dtype)}, folder / "model.safetensors", {"format": "pt"})
    refused(
        run(*QUICK, *BARE[:3], f"model.init={folder}"),
        f"has {kind} weights ({weight} in {name}), which cannot be trained: name the original model",
    )


def test_the_plan_refuses_what_the_files_show(run):
    folder = run.tmp_path / "source"
    model = qwen()
    model.save_pretrained(folder)
    common = [*QUICK, *BARE[:3], f"model.init={folder}", "--plan"]
    assert run(*common)[0] == 0
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"].to(torch.int8)}, path, {"format": "pt"})
    refused(run(*common), "has quantized weights (model.norm.weight in I8), which cannot be trained")
    path.write_bytes(path.read_bytes()[:-10])
    refused(run(*common), "is damaged")
    path.unlink()
    refused(run(*common), "has no model.safetensors: name a folder that save_pretrained() wrote, whole")
    torch.save(tensors, folder / "pytorch_model.bin")
    refused(run(*common), "holds only pickled weights")


def test_a_mask_of_whole_numbers_beside_the_weights_is_none(run):
    """Old files of GPT-2 hold the causal mask, as bytes."""
    folder = run.tmp_path / "source"
    gpt2().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 48, 48, dtype=torch.uint8) for i in range(2)}
    save_file(tensors | masks, folder / "model.safetensors", {"format": "pt"})
    assert run(*QUICK, *BARE, "model.context=32", f"model.init={folder}")[0] == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("{attention_dropout: abc}", "model.hf: qwen3: Validation error for field 'attention_dropout'"),
        ("{hidden_act: [silu]}", "model.hf: qwen3: Validation error for field 'hidden_act'"),
        ("{attention_dropout: 2.0}", "qwen3: attention_dropout must be a probability, 0 <= attention_dropout < 1, got 2.0"),
        ("{attn_implementation: a/b}", "model.hf: attn_implementation names a repository, 'a/b', whose code is never run"),
        ("{attn_implementation: fast}", 'qwen3: Specified `attn_implementation="fast"` is not supported'),
    ],
)
def test_values_that_no_model_takes_are_one_line(run, keys, message):
    folder = run.tmp_path / "source"
    qwen().save_pretrained(folder)
    refused(run(*QUICK, *BARE[:3], f"model.init={folder}", f"model.hf={keys}"), message)


def test_how_the_function_is_computed_may_be_chosen(run):
    folder = run.tmp_path / "source"
    qwen().save_pretrained(folder)
    common = [*QUICK, *FROZEN, *BARE[:3], f"model.init={folder}"]
    losses = []
    for name in ("eager", "sdpa"):
        status, records, err = run(*common, f"model.hf={{attn_implementation: {name}}}", folder=name)
        assert status == 0, err
        losses.append(next(r["val_loss"] for r in records if "val_loss" in r))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_numbers_of_a_gpt2_that_do_not_fit_are_one_line(run):
    folder = run.tmp_path / "source"
    gpt2().save_pretrained(folder)
    own = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(own | {"n_head": 5}))
    message = f"model.init: the config.json of {folder} describes no model: 5 heads do not divide the width 32"
    refused(run(*QUICK, *BARE, f"model.init={folder}"), message)


NO_CAUSAL = "it is a {}, which is not a causal language model; name one"
NO_HEAD = "it is a base model ({}), without the output layer; name a folder with the whole model"


@pytest.mark.parametrize(
    ("cls", "keys", "message"),
    [
        ("Qwen3ForSequenceClassification", {**QWEN, "pad_token_id": 0}, NO_CAUSAL),
        ("BartForConditionalGeneration", {"model_type": "bart", "d_model": 32, "vocab_size": 320}, NO_CAUSAL),
        ("Qwen3Model", QWEN, NO_HEAD),
    ],
)
def test_what_a_folder_says_of_itself_is_named(run, cls, keys, message):
    folder = run.tmp_path / "source"
    getattr(transformers, cls)(AutoConfig.for_model(**keys)).save_pretrained(folder)
    refused(run(*QUICK, *BARE[:3], f"model.init={folder}"), "lacks lm_head.weight", message.format(cls))


def test_names_that_lead_nowhere(run, tmp_path):
    refused(
        run("model.init=gpt2"), "model.init: gpt2 is not there; for a model of the Hugging Face hub write model.init=hub:gpt2"
    )
    (tmp_path / "a.safetensors").write_bytes(b"")
    refused(run(f"model.init={tmp_path / 'a.safetensors'}"), "is a file; name its folder")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    refused(run(f"model.init={tmp_path / 'empty'}"), "holds no whole checkpoint")


def test_another_tokenizer_is_refused(run, prepared):
    """Tokens with other ids, tokens that are missing, and the same tokens cut in another way."""
    folder = run.tmp_path / "source"
    gpt2(vocab_size=320).save_pretrained(folder)
    init = [*QUICK, *BARE, f"model.init={folder}"]
    shutil.copy(prepared / "tokenizer.json", folder)
    assert run(*init)[0] == 0  # its embedding has more rows than the data has tokens
    assert taken(run).endswith("its tokenizer is that of the data")
    tokenizer = json.loads((prepared / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(run(*init, folder="b"), "is not the data's: 'a' is 97 in the data, 98 in the model; prepare the data with it")
    bpe = prepare(
        str(prepared.parent / "text.jsonl"), run.tmp_path / "bpe", tokenizer="bpe", vocab_size=300, val_fraction=0.2, workers=1
    )
    shutil.copy(bpe / "tokenizer.json", folder)
    refused(run(*init, folder="b"), "is not the data's: ")
    lower = json.loads((bpe / "tokenizer.json").read_text()) | {"normalizer": {"type": "Lowercase"}}
    Tokenizer.from_str(json.dumps(lower)).save(str(folder / "tokenizer.json"))
    refused(run(*init, f"data.dir={bpe}", folder="b"), "tokenizes the data differently from the data's own tokenizer")
    short = Tokenizer.from_file(str(bpe / "tokenizer.json"))
    short.enable_truncation(8)  # as many published files have it
    short.enable_padding(length=8)
    short.save(str(folder / "tokenizer.json"))
    assert run(*init, f"data.dir={bpe}", folder="short")[0] == 0 and taken(run).endswith("its tokenizer is that of the data")


def test_the_newest_whole_checkpoint_is_taken(run):
    run("train.steps=6", *QUICK[1:], "checkpoint.every=3", folder="source")
    newest = run.tmp_path / "source" / "checkpoints" / "step_00000006" / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    assert run(*QUICK, f"model.init={run.tmp_path / 'source'}")[0] == 0
    line = taken(run)
    assert "of step 3 of " in line and "step_00000003 (not a newer one: " in line
