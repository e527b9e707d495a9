"""Folders, checkpoints and configurations from somebody else: nothing is written or run that the user did not ask for."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from celo2.training.folder import UnsafeFolder, check_folder
from celo2.training.lock import FolderLock
from configs.load import ConfigError
from configs.schema import Checkpoint as CheckpointSection
from configs.schema import Config
from data.files import no_link, replacing
from data.tokenizer import byte_tokenizer, save_tokenizer
from launch.checkpoint.card import plain
from launch.checkpoint.export import main as export
from launch.checkpoint.load import load_model, read_model_config
from launch.checkpoint.publish import remove_leftovers, write_manifest
from launch.checkpoint.retention import surplus
from launch.checkpoint.state import read_state, require_state
from launch.checkpoint.tensors import files_of
from launch.checkpoint.trained import open_trained
from launch.checkpoint.verify import FILES, CheckpointError, find_checkpoint, sha256, verify
from launch.run.branch import choose_start, read_origin
from launch.sample import main as sample
from models import build_model
from models.gpt3 import GPT3Config

# What a training run writes into its folder.
WRITTEN = (
    *("config.yaml", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl", "metrics.tmp", "events.jsonl", "loss.png"),
    *("sample.txt", "rule.safetensors", "origin.json", "wandb.json", "aim.json", "lock", "tensorboard", "wandb", "set_aside"),
)


@pytest.fixture
def victim(tmp_path):
    """A file of the user's outside the run's folder, which nothing may change."""
    path = tmp_path / "home" / ".bashrc"
    path.parent.mkdir()
    path.write_text("original")
    yield path
    assert path.read_text() == "original" and [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("name", WRITTEN)
def test_no_link_leads_out_of_a_runs_folder(victim, tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    for target in (
        victim,
        victim.parent,
        victim.with_name("new"),
        Path("..") / "home" / ".bashrc",
        Path("/dev/zero"),
        Path(name),
    ):
        (folder / name).symlink_to(target)
        with pytest.raises(UnsafeFolder, match=f"run/{name} is a link to .*: remove the link"):
            check_folder(folder)
        (folder / name).unlink()
    check_folder(folder)


def test_checkpoints_on_a_disk_that_is_not_mounted(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk" / "checkpoints")
    with pytest.raises(UnsafeFolder, match=r"checkpoints is a link to .*: mount what it leads to, or remove the link"):
        check_folder(tmp_path / "run")


def test_neither_pipes_nor_links_below_are_written_through(victim, tmp_path):
    folder = tmp_path / "run"
    (folder / "set_aside" / "1").mkdir(parents=True)
    os.mkfifo(folder / "metrics.jsonl")
    with pytest.raises(UnsafeFolder, match=r"metrics\.jsonl is neither a file nor a folder"):
        check_folder(folder)
    (folder / "metrics.jsonl").unlink()
    (folder / "rules").mkdir()  # of meta-training
    (folder / "profile").mkdir()
    for name in ("set_aside/.2.tmp", "set_aside/1/metrics.jsonl", "rules/00000001.safetensors", "profile/rank_0.txt"):
        link = folder / name
        link.symlink_to(victim.parent)
        with pytest.raises(UnsafeFolder, match="out of the run's folder"):
            check_folder(folder)
        link.unlink()
    (folder / "latest").symlink_to("set_aside/1")  # within the folder
    check_folder(folder)


@pytest.mark.parametrize("below", ["", "/below/it"])
@pytest.mark.parametrize("option", ["run.dir", "checkpoint.fallback_dir", "data.cache_dir"])
def test_a_file_where_a_folder_must_be_is_refused_by_name(run, option, below):
    file = run.tmp_path / "file"
    file.touch()
    for more in ([], ["--plan"]):
        status, _, err = run(f"{option}={file}{below}", *more)
        assert status == 2 and err == f"error: {option}: {file} is a file, expected a folder or a name that is free\n"
    with pytest.raises(UnsafeFolder, match="is a file"), FolderLock(Path(f"{file}{below}")):
        pass


@pytest.mark.parametrize("below", ["", "/below/it"])
@pytest.mark.parametrize("option", ["run.dir", "checkpoint.fallback_dir", "data.cache_dir"])
def test_a_link_to_a_disk_that_is_not_mounted_is_named(run, option, below):
    link = run.tmp_path / "link"
    link.symlink_to("/nowhere")
    for more in ([], ["--plan"]):
        status, _, err = run(f"{option}={link}{below}", *more)
        problem = f"{link} is a link to /nowhere, which is missing: mount what it leads to, or remove the link"
        assert status == 2 and err == f"error: {option}: {problem}\n"


def test_a_run_in_such_a_folder_is_refused_in_one_line(run, victim):
    folder = run.tmp_path / "run"
    folder.mkdir()
    for name in ("events.jsonl", "config.yaml", "lock"):
        (folder / name).symlink_to(victim)
        status, _, error = run()
        assert status == 2 and f"{name} is a link to {victim}" in error and error.count("\n") == 1
        (folder / name).unlink()


def test_an_owners_links_to_another_disk_work(run):
    disk = run.tmp_path / "disk"
    disk.mkdir()
    (run.tmp_path / "run").symlink_to(disk)
    assert run("train.steps=2", "eval.every=0", "log.sample_tokens=0")[0] == 0
    large = run.tmp_path / "large"
    (disk / "checkpoints").rename(large)
    (disk / "checkpoints").symlink_to(large)
    assert run("train.steps=4", "eval.every=0", "log.sample_tokens=0")[0] == 0
    assert "resumed from" in run.out
    assert {path.name for path in large.iterdir()} == {"owner", "step_00000003", "step_00000004"}


def test_checkpoints_may_not_lead_to_anything_else(tmp_path, victim):
    folder, other = tmp_path / "run", tmp_path / "other"
    folder.mkdir()
    (other / "checkpoints" / "step_00000001").mkdir(parents=True)
    (other / "metrics.jsonl").write_text("")
    for target in (victim.parent, other / "checkpoints"):  # somebody's files, another run's checkpoints
        (folder / "checkpoints").symlink_to(target)
        with pytest.raises(UnsafeFolder, match="checkpoints is a link"):
            check_folder(folder)
        (folder / "checkpoints").unlink()


def test_files_are_replaced_and_not_written_through_a_link(victim, tmp_path):
    for name in ("file", f"file.{os.getpid()}.tmp"):
        (tmp_path / name).symlink_to(victim)
    with replacing(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_text() == "new" and not (tmp_path / "file").is_symlink()
    (tmp_path / "log").symlink_to(victim)
    with pytest.raises(OSError, match="log"):
        open(tmp_path / "log", "a", encoding="utf-8", opener=no_link).close()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder with one whole checkpoint of a small Llama and a tokenizer."""
    folder = tmp_path_factory.mktemp("stranger") / "run"
    checkpoint = folder / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = build_model(hf={"model_type": "llama", "max_position_embeddings": 32, **sizes}, vocab_size=257)
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, checkpoint / "model.safetensors")
    save_file({}, checkpoint / "optimizer.safetensors")
    model.config.to_json_file(checkpoint / "config.json", use_diff=False)
    config = {"run": {"name": "x", "seed": 0}, "model": {"context": 32}, "data": {"dir": "none"}}
    config |= {"train": {"batch_size": 1}, "optimizer": {"name": "adamw", "lr": 1e-3}, "schedule": {}}
    identity = {"data set": "0" * 64, "run.seed": 0, "train.batch_size": 1, "model.context": 32, "optimizer.name": "adamw"}
    state = {"step": 4, "sequences": 4, "tokens": 128, "seconds": 1.0, "identity": identity, "config": config}
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_manifest(checkpoint)
    save_tokenizer(byte_tokenizer(), folder, "<|endoftext|>")
    return folder


@pytest.fixture
def checkpoint(trained, tmp_path):
    """The checkpoint of a copy of `trained`."""
    return shutil.copytree(trained, tmp_path / "run") / "checkpoints" / "step_00000004"


def edit(path: Path, **entries) -> None:
    """Change entries of a file of JSON, and the manifest with it."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    (path.parent / "manifest.json").unlink(missing_ok=True)
    write_manifest(path.parent)


@pytest.mark.parametrize(
    "name", ["../../metrics.jsonl", "/etc/passwd", "../../../../../../dev/zero", "evil.py", "sub/model.safetensors", "", "."]
)
def test_a_manifest_names_the_files_of_a_checkpoint_alone(checkpoint, name):
    path = checkpoint / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: {"bytes": 0, "sha256": ""}}))
    with pytest.raises(CheckpointError, match=r"manifest\.json names .*, which is not a file of a checkpoint"):
        verify(checkpoint)
    assert find_checkpoint(checkpoint.parent)[0] is None


@pytest.mark.parametrize("name", FILES)
def test_a_manifest_leaves_no_file_out(checkpoint, name):
    """Or else that file could be damaged."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[name]
    for content in (manifest, {}):
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=rf"manifest\.json lacks .*{'' if content == {} else name}"):
            verify(checkpoint)


def test_a_device_is_no_file_of_a_checkpoint(checkpoint):
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text()) | {"optimizer.safetensors": {"bytes": 0, "sha256": ""}}
    path.write_text(json.dumps(manifest))
    (checkpoint / "optimizer.safetensors").unlink()
    for make in (lambda path: path.symlink_to("/dev/zero"), os.mkfifo):
        make(checkpoint / "optimizer.safetensors")
        with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is not a file"):
            verify(checkpoint)
        (checkpoint / "optimizer.safetensors").unlink()


def test_no_state_no_continuation(run):
    """A checkpoint whose state.json is missing or not a run's, though its manifest fits, is one line and no traceback."""
    options = ["train.steps=2", "eval.every=0", "log.sample_tokens=0"]
    assert run(*options)[0] == 0
    checkpoint = run.tmp_path / "run" / "checkpoints" / "step_00000002"
    state = json.loads((checkpoint / "state.json").read_text())
    for content in (None, {"step": 2}, state | {"tokens": "many"}, state | {"config": {"model": 1}}, state | {"identity": []}):
        (checkpoint / "state.json").unlink(missing_ok=True)
        if content is not None:
            (checkpoint / "state.json").write_text(json.dumps(content))
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint)
        status, _, error = run(*options[1:], "train.steps=3")
        assert status == 2 and "state.json" in error and error.count("\n") == 1


HOSTILE = ("", "5", "null", "[]", '"x"', "NaN", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5000)


def test_json_from_somebody_else_is_one_error(checkpoint):
    """Whatever it holds. json.loads raises RecursionError for what is nested too deeply."""
    folder = checkpoint.parent.parent
    files = {
        checkpoint / "manifest.json": lambda: verify(checkpoint),
        checkpoint / "state.json": lambda: require_state(checkpoint, read_state(checkpoint)),
        checkpoint / "config.json": lambda: load_model(checkpoint),
        folder / "origin.json": lambda: read_origin(folder),
        checkpoint / "model.safetensors.index.json": lambda: files_of(checkpoint / "model.safetensors"),
    }
    (checkpoint / "model.safetensors").rename(folder / "model.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text("")
    for file, read in files.items():
        before = file.read_text() if file.exists() else None
        for content in HOSTILE:
            file.write_text(content)
            with pytest.raises(ValueError, match=r".") as caught:  # CheckpointError and ConfigError are such
                read()
            assert "Traceback" not in str(caught.value) and len(str(caught.value)) < 500
        file.unlink() if before is None else file.write_text(before)
    (folder / "model.safetensors").rename(checkpoint / "model.safetensors")
    for entry in ({"vocab_size": math.nan}, {"hidden_size": 10**19}, {"num_attention_heads": "\ud800"}):
        edit(checkpoint / "config.json", **entry)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_model(checkpoint)
    for members in ("<script>", 10**400, -1, None):
        edit(checkpoint / "state.json", average={"kind": "ema", "members": members})
        with pytest.raises(CheckpointError, match="it is not what a training run writes"):
            require_state(checkpoint, read_state(checkpoint))


WRONG = {
    int: (None, "x", math.nan, 1e308, 10**400, 4.5, True, [], {}),
    float: (None, "x", math.nan, math.inf, 10**400, True, [[]]),
    str: (7, [], {}, "\ud800"),
    dict: (7, "x", [[]], math.nan),
}


def test_every_value_of_a_state_has_its_kind(checkpoint):
    """Whoever goes on from it, exports it or deletes older checkpoints beside it would end in a traceback."""
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["schedule"] = {"kind": "cosine", "final": 0.1}
    state["config"]["model"]["gradient_checkpointing"] = True  # in an earlier version
    state |= {"sequences": 32, "val_loss": None, "sources": {"a": 1}, "average": {"kind": "ema", "members": 3}}

    def found(place, key, value):
        damaged = json.loads(json.dumps(state))
        owner = damaged
        for part in place:
            owner = owner[part]
        if value is KeyError:
            del owner[key]
        else:
            owner[key] = value
        (checkpoint / "state.json").write_text(json.dumps(damaged))
        require_state(checkpoint, read_state(checkpoint))

    found((), "val_loss", None)
    for place, key, kind in (
        ((), "step", int),
        ((), "tokens", int),
        ((), "seconds", float),
        ((), "sequences", int),
        ((), "sources", dict),
        ((), "config", dict),
        ((), "identity", dict),
        (("sources",), "a", int),
        (("identity",), "data set", str),
        (("identity",), "run.seed", int),
        (("config",), "schedule", dict),
        (("config", "schedule"), "final", float),
        (("config", "train"), "batch_size", int),
        (("config", "optimizer"), "lr", float),
        (("config", "run"), "name", str),
    ):
        for value in (*WRONG[kind], *([KeyError] if place in ((), ("identity",)) else [])):
            if (key, value) == ("sources", KeyError):
                continue  # no mixture
            with pytest.raises(CheckpointError, match=r"state\.json is damaged: it is not what a training run writes"):
                found(place, key, value)
    assert surplus(checkpoint.with_name("step_00000009"), CheckpointSection(keep=1)) == []  # the damaged one is the newest


def test_a_configuration_that_trains_alone_is_one_line(checkpoint, tmp_path, capsys):
    """transformers looks at such values when it generates or saves, not when it reads them."""
    for entry, command in (
        ({"is_encoder_decoder": "x"}, lambda: sample([str(checkpoint), "--tokens", "1"])),
        ({"output_hidden_states": "x"}, lambda: sample([str(checkpoint), "--tokens", "1"])),
        ({"output_attentions": "x"}, lambda: export([str(checkpoint), str(tmp_path / "out")])),
    ):
        before = (checkpoint / "config.json").read_text()
        edit(checkpoint / "config.json", **entry)
        assert command() == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and ("cannot continue a text" in error or "cannot be saved again" in error), error
        (checkpoint / "config.json").write_text(before)
    assert not (tmp_path / "out").exists()


def test_sizes_of_a_model_are_numbers():
    for key, value in (
        ("vocab_size", "<script>"),
        ("layers", 0),
        ("width", 10**19),
        ("tie_word_embeddings", "x"),
        ("dropout", "x"),
    ):
        with pytest.raises(ValueError, match=f"{key} is "):
            GPT3Config(**{key: value})


def test_errors_do_not_control_the_terminal(checkpoint, tmp_path, capsys):
    edit(checkpoint / "config.json", model_type="\x1b[2J\x07")
    for command in (lambda: export([str(checkpoint), str(tmp_path / "out")]), lambda: sample([str(checkpoint)])):
        assert command() == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.strip().isprintable() and "[2J" in error


@pytest.mark.parametrize(
    "entry",
    [{"set_aside": "../../home"}, {"set_aside": "/tmp/x"}, {"set_aside": "set_aside/../.."}, {"step": "4"}, {"step": None}],
)
def test_an_origin_moves_nothing_out_of_the_folder(checkpoint, entry):
    folder = checkpoint.parent.parent
    known = {"resume": "x", "checkpoint": str(checkpoint), "manifest": "", "step": 4, "own": False, "settings": {}, "id": "i"}
    (folder / "origin.json").write_text(json.dumps(known | entry))
    with pytest.raises(ConfigError, match=r"origin\.json is damaged"):
        read_origin(folder)
    with pytest.raises(ConfigError, match=r"origin\.json is damaged"):
        choose_start(Config(), folder)
    assert find_checkpoint(checkpoint.parent)[0] == checkpoint


def test_leftovers_that_are_links_go_alone(checkpoint, victim):
    (checkpoint.parent / ".step_00000002.tmp").symlink_to(victim.parent)
    remove_leftovers(checkpoint.parent)
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


def ask_for_code(checkpoint: Path, **entries) -> Path:
    """Make the configuration of a checkpoint ask for a class that lies beside it, and leaves a file where it runs."""
    ran = checkpoint.parent.parent / "ran"
    code = f"open({str(ran)!r}, 'w').write('x')\nfrom transformers import LlamaConfig as E, LlamaForCausalLM as M\n"
    (checkpoint / "evil.py").write_text(code)
    classes = {"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.M"}
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": classes} | entries))
    (checkpoint / "manifest.json").unlink()
    content = {name: {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256(checkpoint / name)} for name in FILES}
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    return ran


def test_code_beside_a_configuration_is_never_run_nor_asked_for(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    ran = ask_for_code(checkpoint, model_type="evilx")
    assert export([str(checkpoint.parent.parent), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "auto_map asks for code of its own, which is never run" in error and error.count("\n") == 1
    assert not ran.exists() and not (tmp_path / "out").exists()


def test_a_known_model_is_of_transformers_own_class(checkpoint, tmp_path, monkeypatch):
    """Many configurations of the hub name classes beside a model type that transformers has had since."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    ran = ask_for_code(checkpoint)
    assert type(load_model(checkpoint)).__module__.startswith("transformers.models.llama")
    assert export([str(checkpoint.parent.parent), str(tmp_path / "out")]) == 0
    written = (tmp_path / "out" / "config.json").read_text()
    assert "auto_map" not in written and not list((tmp_path / "out").glob("*.py"))
    assert open_trained(tmp_path / "out").model is not None
    edit(tmp_path / "out" / "config.json", auto_map={"AutoModelForCausalLM": "evil.M"})
    shutil.copy(checkpoint / "evil.py", tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    assert type(open_trained(tmp_path / "out").model).__module__.startswith("transformers.models.llama")
    assert not ran.exists()


@pytest.mark.parametrize(
    "entry",
    [
        {"attn_implementation": "evil-org/kernel"},
        {"_attn_implementation": "evil-org/kernel@main:f"},
        {"_attn_implementation_internal": "evil-org/kernel"},
        {"experts_implementation": "evil-org/kernel"},
        {"attn_implementation": {"": "evil-org/kernel"}},
        {"text_config": {"attn_implementation": "evil-org/kernel"}},
    ],
)
def test_kernels_of_a_repository_are_refused(checkpoint, entry, run):
    path = checkpoint / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    with pytest.raises(CheckpointError, match=r"names a repository, 'evil-org/kernel.*', whose code is never run"):
        read_model_config(checkpoint)
    for name in ("manifest.json", "state.json"):
        (checkpoint / name).unlink()
    shutil.copy(checkpoint.parent.parent / "tokenizer.json", checkpoint)
    with pytest.raises(CheckpointError, match="names a repository"):
        open_trained(checkpoint)


def test_model_options_bring_no_code(run):
    shape = "hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2"
    unset = ["model.layers=null", "model.width=null", "model.heads=null"]
    for entry, said in (
        ("auto_map: {AutoModelForCausalLM: x.Y}", "auto_map"),
        ("attn_implementation: evil-org/kernel", "names a repository"),
        ("trust_remote_code: true", "trust_remote_code"),
    ):
        status, _, error = run(f"model.hf={{model_type: llama, {shape}, {entry}}}", *unset)
        assert status == 2 and said in error and error.count("\n") == 1


def test_an_adapter_does_not_load_the_model_that_it_names(checkpoint):
    (checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil-org/model"}))
    for name in ("manifest.json", "state.json"):
        (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match="adapter"):
        open_trained(checkpoint)


def test_a_model_card_holds_no_markup_from_a_checkpoint(checkpoint, tmp_path, capsys):
    name = "x | y\n```\n# <script>alert(1)</script> [a](http://b)"
    state = json.loads((checkpoint / "state.json").read_text())
    state["config"]["run"]["name"] = state["config"]["optimizer"]["name"] = name
    edit(checkpoint / "state.json", **state)
    assert export([str(checkpoint), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.count("```") == 4  # nothing ends a block of code, in which markup is text
    card = re.sub("```.*?```", "", card, flags=re.DOTALL)
    assert "<script" not in card.replace("\\<", "") and "\n# \\<" not in card and "](" not in card.replace("\\](", "")
    assert plain(name) in card
    state["config"]["optimizer"]["lr"] = "fast"
    edit(checkpoint / "state.json", **state)
    capsys.readouterr()
    assert export([str(checkpoint), str(tmp_path / "out2")]) == 2
    assert "state.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../x", "..", "a/../../b", "/tmp/x", "two\nlines", "\x1b[2J", " "])
def test_a_name_does_not_lead_out_of_its_folder(run, name):
    status, _, error = run(f"run.name={json.dumps(name)}")
    assert status == 2 and "run.name is" in error and error.count("\n") == 1
