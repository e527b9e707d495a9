"""Training runs that take a rule or their first weights from the Hugging Face Hub, against a stand-in on 127.0.0.1."""

import shutil
from pathlib import Path

import hub_stand_in
import pytest
import torch
from rule_files import pylo_weights, random_rule
from safetensors.torch import load_file, save
from transformers import GPT2Config, GPT2LMHeadModel

from celo2 import load_rule, save_rule
from configs.load import load_config
from configs.schema import Config, Optimizer
from data import DataError
from data.preparation.hub import hub_revision
from data.tokenizer import load_declared, load_tokenizer
from launch.compare.contestants import parse

ROOT = Path(__file__).parents[2]

QUICK = ["train.steps=1", "eval.every=0", "log.sample_tokens=0", "checkpoint.every=1"]
BARE = [f"model.{key}=null" for key in ("layers", "width", "heads", "context")]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_stand_in.serve() as hub:
        hub_stand_in.use(monkeypatch, hub, tmp_path / "home")
        yield hub


def refused(result, *messages):
    status, _, err = result
    err = "".join(line for line in err.splitlines(keepends=True) if "Fetching " not in line).strip("\r")  # progress
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    for message in messages:
        assert message in err, err


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_keeps_the_rule_that_it_began_with(run, hub):
    """Its folder says which commit that was. The Hub moves on and goes away: the same command continues."""
    first, second = random_rule(seed=1), random_rule(seed=2)
    sha = hub.add("DiamondXL/elo-celo2", {"model.safetensors": save(pylo_weights(first.weights))})
    command = [*QUICK, "optimizer.rule=hub:DiamondXL/elo-celo2"]
    status, _, err = run(*command)
    assert status == 0, err
    source = f"hub:DiamondXL/elo-celo2@{sha}:model.safetensors"
    copy = load_rule(run.tmp_path / "run" / "rule.safetensors")
    assert copy == first and copy.source == source and source in run.out
    assert "rule: hub:DiamondXL/elo-celo2\n" in (run.tmp_path / "run" / "config.yaml").read_text()

    hub.add("DiamondXL/elo-celo2", {"model.safetensors": save(pylo_weights(second.weights))})
    assert run(*command, folder="second")[0] == 0  # another run gets what is there now
    assert load_rule(run.tmp_path / "second" / "rule.safetensors") == second
    del hub.requests[:]
    for steps in (2, 3):
        assert run(*command, f"train.steps={steps}")[0] == 0 and "resumed from" in run.out
        hub.down = True
        shutil.rmtree(run.tmp_path / "home", ignore_errors=True)
    assert hub.requests == []
    assert load_rule(run.tmp_path / "run" / "rule.safetensors").source == source
    assert run("--plan", *command)[0] == 0
    refused(run(*command, folder="new"), "hub:DiamondXL/elo-celo2 cannot be loaded: the Hub is out of reach")
    hub.down = False
    refused(
        run(*command, "train.steps=4", "optimizer.rule=hub:DiamondXL/elo-celo2@main"),
        "optimizer.rule is hub:DiamondXL/elo-celo2 with the content ",
        f"Restore optimizer.rule={run.tmp_path / 'run' / 'rule.safetensors'}",
    )


def test_a_comparison_takes_one_commit(hub):
    """Its trials begin hours apart, and the Hub may move on; of both, the rule of a contestant and that of the configuration."""
    sha = hub.add("DiamondXL/celo2", {"model.safetensors": save(pylo_weights(random_rule().weights))})
    pinned = f"optimizer.rule=hub:DiamondXL/celo2@{sha}:model.safetensors"
    config = Config(optimizer=Optimizer(rule="hub:DiamondXL/celo2"))
    for spec in ("celo2{rule: hub:DiamondXL/celo2@main}", "celo2"):
        contestant = parse(spec, config)
        assert pinned in contestant.overrides and contestant.label == spec
        assert "/" not in contestant.slug
    assert load_config(ROOT / "configs" / "demo.yaml", [pinned]).optimizer.rule == pinned.partition("=")[2]


def test_the_name_of_the_optimizer_says_the_variant(run, hub, tmp_path):
    """Neither a theta.state nor PyLO's file does; one that is known or says so must agree."""
    save_rule(random_rule(), tmp_path / "theta.state")
    theta = (tmp_path / "theta.state").read_bytes()
    for name in ("me/theta", "amoudgl/celo2"):
        hub.add(name, {"theta.state": theta})
    base = [*QUICK, "optimizer.name=celo2-base", "optimizer.adamw_lr=null"]
    assert run(*base, "optimizer.rule=hub:me/theta")[0] == 0
    assert load_rule(tmp_path / "run" / "rule.safetensors").variant == "celo2-base"
    assert run(*base, f"optimizer.rule={tmp_path / 'theta.state'}", folder="b")[0] == 0
    refused(run(*base, "optimizer.rule=hub:amoudgl/celo2", folder="c"), "is a celo2 rule, but celo2-base was requested")


def test_weights_from_the_hub(run, hub):
    """Named by branch or commit; the commit is said; planned without weights, continued without the hub."""
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=48, n_embd=32, n_layer=2, n_head=2))
    model.save_pretrained(run.tmp_path / "gpt2")
    sha = hub.add("some/gpt2", files_of(run.tmp_path / "gpt2") | {"pytorch_model.bin": b"pickled", "modeling.py": b"code"})
    assert run("--plan", *BARE, "model.init=hub:some/gpt2", "data.dir=not/yet", folder="plan")[0] == 0
    assert "the vocabulary of model.init is assumed" in run.out and "vocabulary 257" in run.out
    assert not [path for path in hub.downloads() if "safetensors" in path]  # a plan needs the shapes alone
    frozen = ["optimizer.lr=0", "optimizer.adamw_lr=0", "optimizer.weight_decay=0"]
    for revision in ("", f"@{sha}"):
        command = [*QUICK, *BARE, *frozen, f"model.init=hub:some/gpt2{revision}"]
        status, _, err = run(*command, folder=f"run{revision[:3]}")
        assert status == 0, err
        assert f"began with the weights of hub:some/gpt2{revision} (commit {sha}): " in run.out
    after = load_file(run.tmp_path / "run" / "checkpoints" / "step_00000001" / "model.safetensors")
    assert torch.equal(after["model.embed_tokens.weight"], model.transformer.wte.weight)
    assert not [path for path in hub.downloads() if path.endswith((".bin", ".py"))]  # nothing pickled, no code
    assert len([path for path in hub.downloads() if "safetensors" in path]) == 1
    hub.down = True
    shutil.rmtree(run.tmp_path / "home")
    assert run(*QUICK, *BARE, *frozen, "model.init=hub:some/gpt2", "train.steps=2")[0] == 0 and "resumed from" in run.out


def test_what_the_hub_does_not_give(run, hub):
    hub.add("some/gated", {"config.json": b"{}"}, access="gated")
    hub.add("some/pickled", {"config.json": b'{"model_type": "gpt2", "vocab_size": 257}', "pytorch_model.bin": b"pickled"})
    start = [*QUICK, *BARE]
    for name, *messages in (
        ("some/none", "there is no such repository, or it is private: check the name, or log in"),
        ("some/gated", "its owner decides who may have it", "log in"),
        ("some/pickled@v1", "it has no such branch, tag or commit"),
        ("some/pickled", "has no model.safetensors"),
        ("some/a b", "some/a b"),
        ("", "cannot be read from the Hugging Face hub"),
        ("some/a@b@c", "it has no such branch"),
    ):
        hub.add("some/a", {})
        refused(run(*start, f"model.init=hub:{name}"), f"model.init: hub:{name} ", *messages)
    hub.down = True
    refused(run(*start, "model.init=hub:some/other"), "hub:some/other cannot be read", "give the folder of a downloaded copy")


def test_tokenizers_and_data_sets_of_the_hub(run, hub, prepared, monkeypatch):
    """The names that data.prepare takes are refused as clearly; a tokenizer comes from there."""
    from huggingface_hub import constants

    hub.add("some/tokenizer", {"tokenizer.json": (prepared / "tokenizer.json").read_bytes()})
    assert load_tokenizer("some/tokenizer").get_vocab_size() == 257
    assert load_declared("some/tokenizer") == {}
    with pytest.raises(
        DataError, match=r"tokenizer 'some/none' is not a file or folder on this machine.*Repository Not Found.*give the path"
    ) as caught:
        load_tokenizer("some/none")
    assert str(caught.value).isprintable()
    with pytest.raises(
        DataError, match=r"hub:some/none cannot be read from the Hugging Face hub: .*Repository Not Found for url"
    ):
        hub_revision("some/none", None)
    with pytest.raises(DataError, match="no tokenizer at hub:gpt2; a name of the Hugging Face hub is written without hub:"):
        load_tokenizer("hub:gpt2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"tokenizer 'some/other' is not a file or folder on this machine.*annot find") as caught:
        load_tokenizer("some/other")
    assert str(caught.value).isprintable()
    with pytest.raises(DataError, match=r"hub:some/none cannot be read from the Hugging Face hub: .*offline mode is enabled"):
        hub_revision("some/none", None)
