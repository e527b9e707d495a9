"""Exported folders, loaded by stock transformers in a process that has none of this project's code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from data.tokenizer import byte_tokenizer, save_tokenizer
from launch.checkpoint.export import export
from launch.checkpoint.load import load_model
from launch.checkpoint.publish import write_manifest
from launch.checkpoint.verify import CheckpointError, find_checkpoint
from models import build_model
from models.export import main
from models.gpt2 import to_gpt2

ROOT = Path(__file__).parents[2]
TEXT = "Hello, World!  It's 12345 o'clock — naïve café.\n\tdef f(x):\n  return x<|endoftext|>The end."
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}

# Stock transformers alone: what loads, what it says of the same text, and what a pipeline writes.
LOADER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
text, *folders = sys.argv[1:]
report = []
for folder in folders:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt").input_ids
    written = pipeline("text-generation", model=folder)(text[:20], do_sample=False)[0]["generated_text"]
    report.append({
        "class": type(model).__name__, "ids": ids[0].tolist(), "text": tokenizer.decode(ids[0]), "written": written,
        "logits": model(ids).logits[0].tolist(), "model_max_length": tokenizer.model_max_length,
        "eos": tokenizer.eos_token, "eos_id": model.generation_config.eos_token_id,
    })
assert not any(name.split(".")[0] == "models" for name in sys.modules)
print("REPORT" + json.dumps(report))
"""


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE that splits otherwise than GPT-2 (digits one by one), as a careless export would not."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}|[^\s\p{N}]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT.replace("<|endoftext|>", "")] * 3, trainer)
    return tokenizer


def save_checkpoint(model, folder: Path, whole: bool = True) -> Path:
    folder.mkdir(parents=True)
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, folder / "model.safetensors")
    model.config.to_json_file(folder / "config.json")
    if whole:
        write_manifest(folder)
    return folder


def change(checkpoint: Path, name: str, write) -> None:
    """Change or remove a file of a checkpoint that stays whole: its manifest fits again."""
    (checkpoint / "manifest.json").unlink()
    write(checkpoint / name)
    write_manifest(checkpoint)


def make_run(folder: Path, steps=(100,), hf=None) -> Path:
    folder.mkdir()
    train_tokenizer().save(str(folder / "tokenizer.json"))
    for step in steps:
        torch.manual_seed(step)
        model = build_model(size=None if hf else "gpt3-tiny", hf=hf, vocab_size=320)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        save_checkpoint(model, folder / "checkpoints" / f"step_{step:08d}")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("export") / "run", steps=(2, 10))


def test_stock_transformers_loads_what_was_trained(run, tmp_path):
    qwen3 = make_run(tmp_path / "qwen3", hf=QWEN3)
    folders = {tmp_path / "out" / "gpt2": run, tmp_path / "out" / "qwen3": qwen3}
    for out, source in folders.items():
        assert main([str(source), str(out)]) == 0
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    arguments = [sys.executable, "-c", LOADER, TEXT, *map(str, folders)]
    loaded = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert loaded.returncode == 0, loaded.stderr
    line = next(line for line in loaded.stdout.splitlines() if line.startswith("REPORT"))

    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    expected_class = ("GPT2LMHeadModel", "Qwen3ForCausalLM")
    for report, name, source in zip(json.loads(line[6:]), expected_class, (run, qwen3), strict=True):
        assert report["class"] == name
        assert report["ids"] == tokenizer.encode(TEXT).ids and report["text"] == TEXT
        assert report["eos"] == "<|endoftext|>" and report["eos_id"] == tokenizer.token_to_id("<|endoftext|>")
        model = load_model(find_checkpoint(source / "checkpoints")[0])
        assert report["model_max_length"] == model.config.max_position_embeddings
        with torch.no_grad():
            logits = model(torch.tensor([report["ids"]])).logits[0, :, :300]  # of its 320 rows 300 have a token
        assert logits.std() > 0.5
        assert (torch.tensor(report["logits"]) - logits).abs().max() < 1e-4
        assert report["written"].startswith(TEXT[:20]) and len(report["written"]) > 20


def test_newest_whole_checkpoint_or_the_one_asked_for(run, tmp_path):
    save_checkpoint(build_model(size="gpt3-tiny", vocab_size=320), run / "checkpoints" / "step_00000020", whole=False)
    steps = {10: run, 2: run / "checkpoints" / "step_00000002"}
    for step, source in steps.items():
        folder = run / "checkpoints" / f"step_{step:08d}"
        assert export(source, tmp_path / str(step)) == folder
        exported = load_file(tmp_path / str(step) / "model.safetensors")
        trained = load_file(folder / "model.safetensors")
        assert torch.equal(exported["transformer.wpe.weight"], trained["model.embed_positions.weight"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "2"]  # nothing temporary left


def test_empty_out_folder_is_fine_and_as_readable_as_any(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "plain").mkdir()
    export(run, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", ["link", "mount"])
def test_out_may_be_a_link_or_a_mounted_folder(kind, run, tmp_path, monkeypatch):
    out, folder = tmp_path / "out", tmp_path / "folder"
    folder.mkdir()
    out.symlink_to(folder)
    before = os.open(folder, os.O_RDONLY)
    if kind == "mount":  # such a folder cannot be replaced
        monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(folder))
    export(run, out)
    assert out.is_symlink() and (out / "model.safetensors").is_file() and (out / "config.json").is_file()
    assert not list(tmp_path.rglob("*.partial"))
    assert (folder.stat().st_ino == os.fstat(before).st_ino) == (kind == "mount")
    os.close(before)


def test_to_gpt2_copies():
    model = build_model(size="gpt3-tiny", vocab_size=99, dropout=0.1)
    gpt2 = to_gpt2(model)
    assert gpt2.training and gpt2.config.attn_pdrop == gpt2.config.embd_pdrop == gpt2.config.resid_pdrop == 0.1
    with torch.no_grad():
        gpt2.transformer.wte.weight.zero_()
    assert model.model.embed_tokens.weight.any()
    assert to_gpt2(model.to(torch.bfloat16)).dtype == torch.bfloat16


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("model.safetensors", flip_byte, "model.safetensors is damaged: its sha256 is not the manifest's"),
        ("model.safetensors", lambda path: os.truncate(path, 1000), "model.safetensors has 1000 bytes, its manifest says"),
        ("config.json", Path.unlink, "is not a whole checkpoint: config.json is missing"),
        ("manifest.json", lambda path: path.write_text("{"), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_is_taken(name, harm, message, tmp_path, capsys):
    run = make_run(tmp_path / "run", steps=(1, 2))
    first, second = (run / "checkpoints" / f"step_0000000{step}" for step in (1, 2))
    harm(second / name)
    assert main([str(run), str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"exported {first} to {tmp_path / 'out'}\n"
    (note,) = [line for line in captured.err.splitlines() if line.startswith("export: ")]  # transformers draws a progress bar
    assert note.startswith("export: note: ") and message in note and note.endswith("; taking step_00000001 instead")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    trained = load_file(first / "model.safetensors")
    assert torch.equal(exported["transformer.wpe.weight"], trained["model.embed_positions.weight"])
    # The damaged one itself, and a run that has no other.
    with pytest.raises(CheckpointError, match=message):
        export(second, tmp_path / "damaged")
    harm(first / name)
    with pytest.raises(CheckpointError, match=rf"run holds no whole checkpoint \(checkpoints/step_\*\); .*{message}"):
        export(run, tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def break_run(run: Path, how: str) -> Path:
    """Damage a fresh run in one way; -> what to export."""
    checkpoint = run / "checkpoints" / "step_00000100"
    weights = load_file(checkpoint / "model.safetensors")
    if how == "missing run":
        return run / "nowhere"
    if how == "no checkpoint":
        (checkpoint / "manifest.json").unlink()
    if how == "incomplete checkpoint":
        (checkpoint / "manifest.json").unlink()
        return checkpoint
    if how == "no tokenizer":
        (run / "tokenizer.json").unlink()
    if how == "broken tokenizer":
        (run / "tokenizer.json").write_text("{}")
    if how == "no configuration":
        change(checkpoint, "config.json", Path.unlink)
    if how == "no weights":
        change(checkpoint, "model.safetensors", Path.unlink)
    if how == "unknown model":
        change(checkpoint, "config.json", lambda path: path.write_text('{"model_type": "banana"}'))
    if how == "broken weights":
        change(checkpoint, "model.safetensors", lambda path: path.write_bytes(b"no weights"))
    if how == "missing weight":
        del weights["model.norm.bias"]
        change(checkpoint, "model.safetensors", lambda path: save_file(weights, path))
    if how == "unknown weight":
        change(checkpoint, "model.safetensors", lambda path: save_file({**weights, "banana": torch.zeros(1)}, path))
    if how == "misshapen weight":
        weights["model.norm.bias"] = torch.zeros(1)
        change(checkpoint, "model.safetensors", lambda path: save_file(weights, path))
    if how == "small vocabulary":
        model = build_model(size="gpt3-tiny", vocab_size=50)
        save_checkpoint(model, run / "checkpoints" / "step_00000200")
    return run


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing run", "there is no folder .*nowhere"),
        ("no checkpoint", "holds no whole checkpoint"),
        ("incomplete checkpoint", "step_00000100 is not a whole checkpoint: manifest.json is missing"),
        ("no tokenizer", "the run has no .*tokenizer.json"),
        ("broken tokenizer", "cannot read .*tokenizer.json"),
        ("no configuration", "step_00000100 has no config.json"),
        ("no weights", "step_00000100 has no model.safetensors"),
        ("unknown model", "cannot read .*banana"),
        ("broken weights", "cannot read .*step_00000100"),
        ("missing weight", "lacks weights: model.norm.bias"),
        ("unknown weight", "has unknown weights: banana"),
        ("misshapen weight", "has misshapen weights: model.norm.bias"),
        ("small vocabulary", "has 300 tokens, the model only 50"),
    ],
)
def test_every_user_error_is_one_line_and_leaves_nothing(how, message, tmp_path, capsys):
    source = break_run(make_run(tmp_path / "run"), how)
    with pytest.raises(CheckpointError, match=message):
        export(source, tmp_path / "out")
    capsys.readouterr()
    assert main([str(source), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_out_that_exists_is_an_error(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
            export(run, out)
    with pytest.raises(CheckpointError, match="cannot write"):
        export(run, tmp_path / "file" / "out")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("name", "run_dir", "out"), [("RUN", "", "out"), ("OUT", "run", ""), ("OUT", "run", " ")])
def test_an_empty_name_is_not_this_folder(name, run_dir, out, tmp_path, monkeypatch, capsys):
    """As of an unset variable of a shell. This folder is empty, so that an export would replace it."""
    monkeypatch.chdir(tmp_path)
    assert main([run_dir, out]) == 2
    assert capsys.readouterr().err == f"export: {name} is empty\n" and not list(tmp_path.iterdir())


def test_failure_while_writing_leaves_nothing(run, tmp_path, monkeypatch):
    def full_disk(self, folder):
        assert list(Path(folder).glob("*.safetensors"))  # the model is already there
        raise OSError("No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device"):
        export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_command_line_error_has_no_traceback(tmp_path):
    command = [sys.executable, "-m", "models.export", str(tmp_path / "nowhere"), str(tmp_path / "out")]
    failed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert failed.returncode == 2
    assert failed.stderr == f"export: there is no folder {tmp_path / 'nowhere'}\n"


def test_weights_are_rounded_as_asked_and_a_range_that_is_too_small_is_an_error(run, tmp_path):
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        assert main([str(run), str(tmp_path / name), "--dtype", name]) == 0
        weights = load_file(tmp_path / name / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {dtype}
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == name
    model = build_model(size="gpt3-tiny", vocab_size=320)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e5)
    large = save_checkpoint(model, tmp_path / "run" / "checkpoints" / "step_00000001")
    shutil.copy(run / "tokenizer.json", tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"ln_f\.weight is beyond the range of float16: export as bfloat16 or float32"):
        export(large, tmp_path / "large", dtype="float16")


def test_what_a_model_returns_is_for_the_reader_to_choose(tmp_path, capsys):
    """transformers saves no configuration that returns attention, as that is for another implementation."""
    hf = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = build_model(hf=hf | {"output_attentions": True, "output_hidden_states": True}, vocab_size=320)
    save_checkpoint(model, tmp_path / "run" / "checkpoints" / "step_00000001")
    save_tokenizer(byte_tokenizer(), tmp_path / "run", "<|endoftext|>")
    assert main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0, capsys.readouterr().err
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not loaded.config.output_attentions and not loaded.config.output_hidden_states
    tokens = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits[..., :257])


def test_what_other_tools_read(run, tmp_path, capfd):
    assert main([str(run / "checkpoints" / "step_00000002"), str(tmp_path / "out")]) == 0
    assert capfd.readouterr().err == ""
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tokenizer = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 lacks TokenizersBackend
    assert config["n_ctx"] == config["n_positions"] == 128  # n_ctx: llama.cpp and others


def test_the_card_says_what_the_checkpoint_knows(tmp_path):
    run = make_run(tmp_path / "run")
    checkpoint = run / "checkpoints" / "step_00000100"
    export(run, tmp_path / "plain")
    plain = (tmp_path / "plain" / "README.md").read_text()
    assert "GPT2LMHeadModel" in plain and "128 tokens" in plain and "training" not in plain
    trained = {"run": {"name": "mine", "seed": 7}, "data": {"dir": "prepared/words"}, "train": {"batch_size": 8}}
    trained["optimizer"] = {"name": "celo2", "rule": "celo2-lm", "lr": 5e-4}
    state = {"step": 100, "tokens": 25600, "identity": {"data set": "0123456789abcdef"}, "config": trained}
    change(checkpoint, "state.json", lambda path: path.write_text(json.dumps(state)))
    losses = [{"step": 50, "val_loss": 3.5}, {"step": 100, "val_loss": 3.25}, {"step": 150, "val_loss": 3.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in losses))
    export(run, tmp_path / "card")
    card = (tmp_path / "card" / "README.md").read_text()
    for fact in ("# mine", "words, hash 0123456789ab", "100 steps of 8 sequences, 25,600 tokens", "celo2, rule celo2-lm"):
        assert fact in card
    assert "3.2500 nats a token, after step 100" in card and "License: not stated" in card
