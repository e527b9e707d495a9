"""Trained models from wherever they are: the end of text that their run says, and folders that are refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_launch_mixture import mix, other  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

from data.prepare import prepare
from data.shards import read_index
from launch.checkpoint.export import export
from launch.checkpoint.trained import open_trained
from launch.checkpoint.verify import CheckpointError
from launch.evaluate import main as evaluate
from models import build_model
from models.sample import main as sample

ENDS = ("<|endoftext|>", "<|stop|>")
SMALL = ("train.steps=1", "log.sample_tokens=0", "eval.sequences=4")


@pytest.fixture(scope="module")
def two_ends(tmp_path_factory):
    """The same texts with the same tokenizer, once for each token of ENDS at the end of a document."""
    folder = tmp_path_factory.mktemp("ends")
    rows = [{"text": f"{n} green bottles " * 20} for n in range(30)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"val_fraction": 0.2, "workers": 1, "log": lambda line: None}
    bpe = prepare(folder / "text.jsonl", folder / "bpe", tokenizer="bpe", vocab_size=300, end_token=ENDS[1], **options)
    made = json.loads((bpe / "tokenizer.json").read_text())
    stop = next(token for token in made["added_tokens"] if token["content"] == ENDS[1])
    made["added_tokens"].append(stop | {"content": ENDS[0], "id": 300})
    (folder / "tok").mkdir()
    (folder / "tok" / "tokenizer.json").write_text(json.dumps(made))
    return [
        prepare(folder / "text.jsonl", folder / f"{n}", tokenizer=folder / "tok", end_token=ENDS[n], **options) for n in (0, 1)
    ]


def test_runs_with_a_mixture(run, prepared, other, capsys):  # noqa: F811
    status, _, _ = run(*SMALL, *mix((prepared, 0.7), (other, 0.3)))
    folder = run.tmp_path / "run"
    assert status == 0 and open_trained(folder).end == read_index(prepared)["end_of_text_id"]
    assert sample([str(folder), "--tokens", "3"]) == 0
    assert evaluate([str(folder), str(prepared)]) == 0


@pytest.mark.parametrize("now", ["moved", "replaced"])
def test_the_run_says_what_ends_a_document(run, prepared, two_ends, tmp_path, now):
    data = tmp_path / "data"
    shutil.copytree(two_ends[1], data)
    assert run(*SMALL, f"data.dir={data}")[0] == 0
    shutil.rmtree(data)
    if now == "replaced":
        shutil.copytree(prepared, data)
    trained = open_trained(tmp_path / "run")
    assert trained.end == trained.tokenizer.token_to_id(ENDS[1]) == read_index(two_ends[1])["end_of_text_id"]
    # Runs of former versions do not say it: their data does if it is still theirs, and else the name.
    (tmp_path / "run" / "tokenizer_config.json").unlink()
    assert open_trained(tmp_path / "run").end == trained.tokenizer.token_to_id(ENDS[0])
    shutil.rmtree(data, ignore_errors=True)
    shutil.copytree(two_ends[1], data)
    assert open_trained(tmp_path / "run").end == trained.end


def test_a_tokenizer_without_an_end_names_a_remedy_that_exists(run, tmp_path):
    assert run(*SMALL)[0] == 0
    folder = tmp_path / "run"
    (folder / "tokenizer_config.json").write_text("{}")
    made = json.loads((folder / "tokenizer.json").read_text())
    for token in made["added_tokens"]:
        token["content"] = "<other>"
    (folder / "tokenizer.json").write_text(json.dumps(made))
    with pytest.raises(CheckpointError, match=r"name one of its tokens as eos_token in .*tokenizer_config.json") as error:
        open_trained(folder)
    assert "--end-token" not in str(error.value)


def test_data_with_another_end_of_text(run, two_ends, tmp_path, capsys):
    assert run(*SMALL, f"data.dir={two_ends[0]}")[0] == 0
    assert evaluate([str(tmp_path / "run"), str(two_ends[0])]) == 0
    capsys.readouterr()
    assert evaluate([str(tmp_path / "run"), str(two_ends[1])]) == 2
    err = capsys.readouterr().err
    assert (
        f"{two_ends[1]} ends its documents with '<|stop|>'" in err and "prepare the data with --end-token '<|endoftext|>'" in err
    )
    status, _, _ = run(*SMALL, f"data.dir={two_ends[1]}", f"model.init={tmp_path / 'run'}", folder="second")
    assert status == 0 and "but the data's documents end with '<|stop|>', the model's with '<|endoftext|>'" in run.out


def test_data_of_a_tokenizer_with_other_merges_is_refused(run, two_ends, tmp_path, capsys):
    """Its tokens have the same ids, but it cuts texts into other tokens."""
    assert run(*SMALL, f"data.dir={two_ends[0]}")[0] == 0
    made = json.loads((two_ends[0] / "tokenizer.json").read_text())
    made["model"]["merges"] = made["model"]["merges"][:5]
    (tmp_path / "few.json").write_text(json.dumps(made))
    options = {"val_fraction": 0.2, "workers": 1, "log": lambda line: None}
    few = prepare(two_ends[0].parent / "text.jsonl", tmp_path / "few", tokenizer=tmp_path / "few.json", **options)
    export(tmp_path / "run", tmp_path / "out")
    capsys.readouterr()
    for model, path in (("run", "run/checkpoints/step_00000001"), ("out", "out")):
        assert evaluate([str(tmp_path / model), str(few)]) == 2
        found = f"{few} was prepared with another tokenizer: that of {tmp_path / path} tokenizes the data differently"
        remedy = "prepare the data with the model's own tokenizer (data.prepare --tokenizer)"
        assert capsys.readouterr().err == f"evaluate: {found}; {remedy}\n"


@pytest.mark.parametrize("mixed", [False, True])
def test_a_run_that_does_not_name_its_end_of_text(run, two_ends, tmp_path, capsys, mixed):
    """The data of the run names it. If the data is gone, a usual name is a guess, and a note says so."""
    data, folder = tmp_path / "data", tmp_path / "run"
    shutil.copytree(two_ends[1], data)
    assert run(*SMALL, *(mix((data, 1)) if mixed else [f"data.dir={data}"]))[0] == 0
    (folder / "tokenizer_config.json").unlink()
    capsys.readouterr()
    notes: list[str] = []
    export(folder, tmp_path / "out", notes.append)
    assert notes == [] and open_trained(tmp_path / "out").end == open_trained(folder).end == read_index(data)["end_of_text_id"]
    data.rename(tmp_path / "moved")
    export(folder, tmp_path / "guessed", notes.append)
    assert notes == [
        f"{folder} has no tokenizer_config.json that names the end of text, and its data does not tell it; "
        f"taking '<|endoftext|>', "
        f'a usual name; if it is another token, write {{"eos_token": TOKEN}} to {folder / "tokenizer_config.json"}'
    ]
    assert json.loads((tmp_path / "guessed" / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    assert sample([str(folder), "--tokens", "2"]) == 0
    assert capsys.readouterr().err == f"sample: note: {notes[0]}\n"
    assert evaluate([str(folder), str(tmp_path / "moved")]) == 0
    found = f"it is not known which token ended documents in the training of {folder / 'checkpoints/step_00000001'}"
    assert capsys.readouterr().err == f"evaluate: note: {found}; {tmp_path / 'moved'} ends them with '<|stop|>'\n"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|stop|>"}))
    export(folder, tmp_path / "named", notes.append)
    assert len(notes) == 1 and open_trained(tmp_path / "named").end == open_trained(tmp_path / "out").end


def test_the_only_special_token_is_no_guess(run, tmp_path, prepared):
    shutil.copytree(prepared, tmp_path / "data")
    assert run(*SMALL, f"data.dir={tmp_path / 'data'}")[0] == 0
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "run" / "tokenizer_config.json").unlink()
    notes: list[str] = []
    export(tmp_path / "run", tmp_path / "out", notes.append)
    assert notes == [] and open_trained(tmp_path / "run").guess == ""


def stock_folder(folder, prepared, model):
    """A folder of transformers with the tokenizer of the prepared data."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(prepared / name, folder)


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2}
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("one layer", "has unknown model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight and 7 more: "),
        ("three layers", "lacks model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight and 7 more: "),
        ("misshapen", f"has {WEIGHT} of shape (48, 31), not (48, 32): its weights are not those of its config.json, a llama"),
        ("nan", f"has numbers in {WEIGHT} that are not finite: take another model or checkpoint"),
        ("int8", f"has quantized weights ({WEIGHT} in I8), and its config.json does not say how they are meant: name another"),
        ("tied", "has a lm_head.weight of its own, which its config.json ties to another weight: set tie_word_embeddings to"),
        ("bert", "BertLMHeadModel is not causal as configured: a token changes the logits before it; set is_decoder to true, in"),
    ],
)
def test_a_folder_that_is_no_model_of_its_configuration_is_refused(tmp_path, prepared, capsys, what, message):
    """Without a progress bar or table of transformers."""
    folder = tmp_path / "stock"
    if what == "bert":
        small = {key: value for key, value in LLAMA.items() if key != "model_type"}
        stock_folder(folder, prepared, BertForMaskedLM(BertConfig(vocab_size=320, **small)))
    else:
        stock_folder(folder, prepared, build_model(hf=LLAMA, vocab_size=320))
    if "layer" in what:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1 if what == "one layer" else 3}))
    if what == "tied":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    if what == "misshapen":
        change_weights(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT][:, 1:].clone()}))
    if what == "nan":
        change_weights(folder, lambda tensors: tensors[WEIGHT].view(-1)[7].fill_(float("nan")))
    if what == "int8":
        change_weights(folder, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(torch.int8)}))
    capsys.readouterr()
    for main, arguments in ((sample, ["--tokens", "3"]), (evaluate, [str(prepared), "--sequences", "2"])):
        assert main([str(folder), *arguments]) == 2
        out, err = capsys.readouterr()
        assert not out and err.count("\n") == 1 and f"{folder}" in err and message in err, err


NEO = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}


@pytest.mark.parametrize(
    ("model", "attention"),
    [
        ({"model_type": "gptj", "n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8}, "attn"),
        ({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}, "attn"),
        ({"model_type": "gpt_neo", **NEO}, "attn.attention"),
    ],
)
def test_masks_that_older_versions_of_transformers_saved_are_passed_over(run, tmp_path, prepared, capsys, model, attention):
    folder, name = tmp_path / "stock", f"transformer.h.0.{attention}"
    stock_folder(folder, prepared, build_model(hf=model, vocab_size=320))
    masks = {"bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril(), "masked_bias": torch.tensor(-1e9)}
    change_weights(folder, lambda tensors: tensors.update({f"{name}.{key}": mask for key, mask in masks.items()}))
    assert sample([str(folder), "--tokens", "3"]) == 0, capsys.readouterr().err
    begin = [f"model.init={folder}", "model.context=32", "train.steps=1", "log.sample_tokens=0", "eval.every=0"]
    given = [f"model.{key}=null" for key in ("layers", "width", "heads")]
    status, _, err = run(*begin, *given, f"model.hf={{model_type: {model['model_type']}}}")
    assert status == 0, err


@pytest.mark.parametrize(
    ("declared", "said", "end"),
    [
        (True, 2, 256),  # the default of LlamaConfig, of another tokenizer
        (True, 400, 256),
        (True, [2, 256], 256),
        (False, 65, 65),
        (False, [65, 66], 65),
        (False, [], 256),
        (False, 400, 256),  # no token, so that the name counts
        (False, None, 256),
    ],
)
def test_the_end_of_text_of_a_folder_is_that_of_its_tokenizer(tmp_path, prepared, capsys, declared, said, end):
    folder = tmp_path / "stock"
    stock_folder(folder, prepared, build_model(hf=LLAMA, vocab_size=320))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": said}))
    if not declared:
        (folder / "tokenizer_config.json").write_text("{}")
    assert open_trained(folder).end == end
    assert evaluate([str(folder), str(prepared), "--sequences", "2"]) == (0 if end == 256 else 2)
    assert sample([str(folder), "--tokens", "2", "--context", "32"]) == 0


def test_an_end_of_text_beyond_the_rows_of_the_model_is_one_line(tmp_path, prepared, capsys):
    folder = tmp_path / "stock"
    stock_folder(folder, prepared, build_model(hf=LLAMA, vocab_size=200))
    assert sample([str(folder), "--tokens", "2"]) == 2
    message = "its tokenizer ends a document with token 256, its model knows 200: put its own tokenizer there"
    assert capsys.readouterr().err == f"sample: {folder}: {message}\n"


def test_a_loss_that_is_not_finite_is_an_error(tmp_path, prepared, capsys):
    """Weights that are, in float16."""
    folder = tmp_path / "stock"
    model = build_model(hf=LLAMA, vocab_size=320)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.fill_(6e4)
            layer.mlp.up_proj.weight.fill_(6e4)
    stock_folder(folder, prepared, model.half())
    assert evaluate([str(folder), str(prepared), "--sequences", "2"]) == 2
    err = capsys.readouterr().err
    assert f"evaluate: the loss of {folder} is nan: its activations overflow float16, or the training diverged\n" == err


def test_experts_of_any_size_run_where_they_were_exported(run, prepared, tmp_path, capsys):
    """transformers' product of all experts at once refuses them, so that the export says to take them one after the other."""
    odd = {"hidden_size": 20, "intermediate_size": 25, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
    hf = json.dumps({"model_type": "mixtral", "num_local_experts": 4, **odd})
    bare = [f"model.{key}=null" for key in ("layers", "width", "heads")]
    status, _, err = run(*SMALL, *bare, "eval.every=1", f"model.hf={hf}")
    assert status == 0, err
    export(tmp_path / "run", tmp_path / "out")
    capsys.readouterr()
    assert sample([str(tmp_path / "out"), "--tokens", "3"]) == 0
    assert evaluate([str(tmp_path / "out"), str(prepared), "--sequences", "4"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["experts_implementation"] == "eager"
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits
    own = open_trained(tmp_path / "run").model(tokens).logits[..., : stock.shape[-1]]
    torch.testing.assert_close(stock, own)
    # A folder that somebody else wrote does not say it.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["experts_implementation"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert sample([str(tmp_path / "out"), "--tokens", "3"]) == 0
