"""Rules of the Hugging Face Hub, with the installed huggingface_hub against a stand-in on 127.0.0.1."""

import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import hub_stand_in
import pytest
import torch
import yaml
from rule_files import DESCRIBED, VECTORS, assert_same_weights, good_metadata, pylo_weights, python, random_rule
from safetensors.torch import save

from celo2 import Celo2, Rule, RuleError, load_rule, save_rule
from celo2.convert import main
from celo2.hub import parse
from celo2.rule_files import LARGEST, SHIPPED

THETA = (VECTORS / "theta.state").read_bytes()
CONFIG = json.dumps({"activation": "relu", "hidden_layers": 2, "hidden_size": 8}).encode()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_stand_in.serve() as hub:
        hub_stand_in.use(monkeypatch, hub, tmp_path / "home")
        yield hub


@pytest.fixture
def offline(monkeypatch):
    from huggingface_hub import constants

    return lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def in_bytes(rule: Rule, tmp_path: Path) -> bytes:
    save_rule(rule, tmp_path / "bytes.safetensors")
    return (tmp_path / "bytes.safetensors").read_bytes()


def pylo(rule: Rule, **others: torch.Tensor) -> bytes:
    return save(pylo_weights(rule.weights) | others)


def refused(name: str, *messages: str, **options) -> str:
    """`load_rule` says it in one line that begins with the name, and so does `celo2.convert`."""
    with pytest.raises(RuleError) as caught:
        load_rule(name, **options)
    text = str(caught.value)
    assert name.partition("@")[0] in text and text.isprintable(), text
    for message in messages:
        assert message in text, text
    return text


# --- loading ----------------------------------------------------------------------------------------------------------------


def test_published_and_pylos_repositories(hub):
    """The four repositories that are known, by the files that are in them."""
    elo = random_rule(seed=1)
    for name in ("amoudgl/celo2", "amoudgl/celo2-base"):
        hub.add(name, {"README.md": b"card", "config.json": b'{"num_tasks": 8}', "theta.state": THETA, ".gitattributes": b""})
    for name in ("DiamondXL/celo2", "DiamondXL/elo-celo2"):
        hub.add(name, {"README.md": b"card", "config.json": CONFIG, "model.safetensors": pylo(elo)})
    expected = load_rule(VECTORS / "theta.state").weights
    for name, variant, weights, file in (
        ("amoudgl/celo2", "celo2", expected, "theta.state"),
        ("amoudgl/celo2-base", "celo2-base", expected, "theta.state"),
        ("DiamondXL/celo2", "celo2", elo.weights, "model.safetensors"),
        ("DiamondXL/elo-celo2", "celo2", elo.weights, "model.safetensors"),
    ):
        rule = load_rule(f"hub:{name}")
        assert_same_weights(rule, weights)
        assert rule.variant == variant
        assert rule.source == f"hub:{name}@{hub.repositories[name].refs['main']}:{file}"
        assert file in rule.description
        assert load_rule(rule.source) == rule  # a name like any other
        assert Rule.from_pretrained(name) == rule
    p = torch.nn.Parameter(torch.ones(3, 4))
    assert Celo2([p], lr=0.1, rule="hub:DiamondXL/elo-celo2").rule.source == rule.source


def test_the_variant_is_known_or_asked_for(hub, tmp_path):
    """A theta.state does not say it, and a wrong one would train without a word: its repository is known, or the user says it."""
    hub.add("amoudgl/celo2-base", {"theta.state": THETA})
    hub.add("me/theta", {"theta.state": THETA})
    hub.add("me/ours", {"rule.safetensors": in_bytes(random_rule(variant="celo2-base"), tmp_path)})
    refused("hub:me/theta", "names the variant of the rule", "variant='celo2' or 'celo2-base'", "--variant")
    for variant in ("celo2", "celo2-base"):
        assert load_rule("hub:me/theta", variant).variant == variant
        assert Rule.from_pretrained("me/theta", variant=variant).variant == variant
    assert load_rule("hub:me/ours").variant == load_rule("hub:me/ours", "celo2-base").variant == "celo2-base"
    for name in ("hub:me/ours", "hub:amoudgl/celo2-base"):
        refused(name, "is a celo2-base rule, but celo2 was requested", variant="celo2")
    refused("hub:me/theta", "unknown variant 'celo3', expected one of celo2, celo2-base", variant="celo3")


def test_revisions_and_files(hub, tmp_path):
    first, second, third = (random_rule(seed=seed) for seed in range(3))
    old = hub.add("me/rule", {"rule.safetensors": in_bytes(first, tmp_path)})
    hub.repositories["me/rule"].refs["v1.0"] = old
    new = hub.add("me/rule", {"rule.safetensors": in_bytes(second, tmp_path), "more/pylo.safetensors": pylo(third)})
    hub.repositories["me/rule"].commit({"rule.safetensors": in_bytes(third, tmp_path)}, "refs/pr/1")
    assert load_rule("hub:me/rule") == load_rule(f"hub:me/rule@{new}") == load_rule("hub:me/rule@main:rule.safetensors") == second
    assert (
        load_rule("hub:me/rule@v1.0")
        == load_rule(f"hub:me/rule@{old}")
        == Rule.from_pretrained("me/rule", revision="v1.0")
        == first
    )
    assert load_rule("hub:me/rule@refs/pr/1") == load_rule("hub:me/rule:more/pylo.safetensors") == third
    assert Rule.from_pretrained("me/rule:rule.safetensors", revision="v1.0") == first
    with pytest.raises(RuleError, match="is not a valid name"):
        Rule.from_pretrained("me/rule", revision="../../x")
    assert load_rule("hub:me/rule@main:more/pylo.safetensors").source == f"hub:me/rule@{new}:more/pylo.safetensors"
    hub.add("me/two", {"theta.state": THETA, "rule.safetensors": in_bytes(first, tmp_path)})
    refused("hub:me/two", "several rules, rule.safetensors, theta.state: name the file")
    assert load_rule("hub:me/two:rule.safetensors") == first


def test_the_cache_is_huggingface_hubs(hub, offline, tmp_path):
    """A commit that is there costs no request; a branch one for its commit, and no download; offline the last one serves."""
    sha = hub.add("DiamondXL/celo2", {"config.json": CONFIG, "model.safetensors": pylo(random_rule())})
    rule = load_rule("hub:DiamondXL/celo2")
    assert len(hub.downloads()) == 2  # the weights, and the configuration beside them
    del hub.requests[:]
    for name in (f"hub:DiamondXL/celo2@{sha}", f"hub:DiamondXL/celo2@{sha}:model.safetensors"):
        assert load_rule(name).source == rule.source
    assert hub.requests == []
    assert load_rule("hub:DiamondXL/celo2") == rule
    assert hub.downloads() == []
    assert (tmp_path / "home/hub/models--DiamondXL--celo2/refs/main").read_text() == sha

    later = hub.add("DiamondXL/celo2", {"model.safetensors": pylo(random_rule(seed=1))})
    assert load_rule("hub:DiamondXL/celo2") == random_rule(seed=1)
    hub.down = True
    assert load_rule("hub:DiamondXL/celo2").source.startswith(f"hub:DiamondXL/celo2@{later}")
    assert Rule.from_pretrained("DiamondXL/celo2", local_files_only=True) == random_rule(seed=1)
    hub.down = False
    offline()
    del hub.requests[:]
    assert load_rule("hub:DiamondXL/celo2") == random_rule(seed=1)
    assert load_rule(f"hub:DiamondXL/celo2@{sha}") == rule
    refused("hub:me/other", "out of reach", "offline mode is enabled", "load it once with a network")
    assert hub.requests == []
    with pytest.raises(RuleError, match="local_files_only is set"):
        Rule.from_pretrained("me/other", local_files_only=True)
    with pytest.raises(RuleError, match="the cache has a copy, which force_download=True forbids"):
        Rule.from_pretrained("DiamondXL/celo2", force_download=True)


def test_many_at_once_download_once(hub):
    """As the ranks of a node do: the library's lock lets one of them download."""
    hub.add("amoudgl/celo2", {"theta.state": THETA})
    with ThreadPoolExecutor(8) as pool:
        rules = list(pool.map(load_rule, ["hub:amoudgl/celo2"] * 8))
    assert all(rule == rules[0] and rule.source == rules[0].source for rule in rules)
    assert len(hub.downloads()) == 1


@pytest.mark.slow  # a process of its own
def test_another_process_with_the_librarys_variables(hub, tmp_path, monkeypatch):
    """HF_ENDPOINT and HF_HOME, through the command."""
    hub.add("amoudgl/celo2-base", {"theta.state": THETA})
    for name, value in hub_stand_in.environment(hub, tmp_path / "other").items():
        monkeypatch.setenv(name, value)
    done = python("-m", "celo2.convert", "hub:amoudgl/celo2-base", "out.safetensors", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rule = load_rule(tmp_path / "out.safetensors")
    assert (rule.variant, rule.source) == (
        "celo2-base",
        f"hub:amoudgl/celo2-base@{hub.repositories['amoudgl/celo2-base'].refs['main']}:theta.state",
    )
    assert done.stdout.startswith("out.safetensors: celo2-base")


# --- refusals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "hub:",
        "hub:celo2",
        "hub:/celo2",
        "hub:me/",
        "hub:me/rule/more",
        "hub:me/rule@",
        "hub:me/rule:",
        "hub:me/rule@a:b:c",
        "hub:me/rule@v1 ",
        "hub:me/rule@../../x",
        "hub:me/rule:../../etc/passwd",
        "hub:me/rule:/etc/passwd",
        "hub:me/rule:a//b",
        "hub:me/rule:a\\..\\b",
        "hub:../rule",
        "hub:me/rule\n",
        "hub:mé/rule",
        "hub:https://huggingface.co/me/rule",
    ],
)
def test_names_that_are_none(hub, name):
    with pytest.raises(
        RuleError, match=r"is not a valid name of a rule on the Hugging Face Hub: write hub:OWNER/NAME, hub:OWNER/NAME@REV"
    ):
        load_rule(name)
    assert hub.requests == []


def test_names_are_parsed():
    assert [str(parse(name)) for name in ("hub:a/b", "a/b@c", "hub:a/b:d/e.state", "hub:a-1/b.2_3@refs/pr/1:f")] == [
        "hub:a/b",
        "hub:a/b@c",
        "hub:a/b:d/e.state",
        "hub:a-1/b.2_3@refs/pr/1:f",
    ]


def test_what_the_hub_refuses(hub, monkeypatch):
    hub.add("me/rule", {"theta.state": THETA, "notes.txt": b""})
    hub.add("me/gated", {"theta.state": THETA}, access="gated")
    hub.add("me/private", {"theta.state": THETA}, access="private")
    hub.add("me/empty", {"README.md": b"", "weights.safetensors": b""})
    for name in ("me/none", "me/private"):
        refused(
            f"hub:{name}", "no such repository, or it is private: check the name, or log in with `hf auth login` or set HF_TOKEN"
        )
    refused("hub:me/gated", "its owner decides who may have it", f"{hub.url}/me/gated", "HF_TOKEN")
    refused("hub:me/rule@v9", "hub:me/rule@v9 cannot be loaded: it has no such branch, tag or commit")
    refused(f"hub:me/rule@{'0' * 40}", "no such branch, tag or commit")
    refused("hub:me/rule:none.state", "no such file; it holds notes.txt, theta.state")
    refused("hub:me/empty", "holds no rule.safetensors, model.safetensors or theta.state: name the file")
    refused("hub:me/rule.git", "'me/rule.git'")  # what the library says of a name that the Hub does not allow
    assert hub.downloads() == []
    for name in ("gated", "private"):
        assert Rule.from_pretrained(f"me/{name}", variant="celo2", token=hub.token).source.startswith(f"hub:me/{name}@")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("hub:me/private@v2", "no such repository, or it is private")


def test_a_hub_that_is_down_or_gone(hub, monkeypatch):
    from huggingface_hub import constants

    hub.down = True
    refused("hub:me/rule", "out of reach (", "503", "the cache has no copy: load it once with a network")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    refused("hub:me/rule", "out of reach (", "onnect")


def test_a_cache_that_is_no_folder(hub, monkeypatch, tmp_path):
    from huggingface_hub import constants

    hub.add("amoudgl/celo2", {"theta.state": THETA})
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    text = refused("hub:amoudgl/celo2", "cannot be loaded: [Errno ", str(tmp_path / "file"))
    assert "out of reach" not in text


def test_without_huggingface_hub(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("hub:me/rule", "hub:me/rule needs the package huggingface_hub: pip install huggingface_hub")
    with pytest.raises(RuleError, match="pushing to me/rule needs the package huggingface_hub: pip install huggingface_hub"):
        load_rule("celo2").push_to_hub("me/rule")
    load_rule("celo2").save_pretrained(tmp_path)  # a folder needs nothing
    assert Rule.from_pretrained(tmp_path) == load_rule("celo2")


def test_another_network_of_pylo_is_refused(hub):
    """Its class can be built with tanh or with more layers, and only config.json says the first."""
    rule = random_rule()
    hub.add("me/tanh", {"config.json": CONFIG.replace(b"relu", b"tanh"), "model.safetensors": pylo(rule)})
    hub.add("me/deep", {"config.json": CONFIG, "model.safetensors": pylo(rule, **{"dense_w.2": torch.zeros(3, 3)})})
    hub.add("me/both", {"config.json": CONFIG, "model.safetensors": pylo(rule, w0__0=torch.zeros(1, 8))})
    hub.add("me/json", {"config.json": b"[" * 100_000, "model.safetensors": pylo(rule)})
    refused("hub:me/tanh", "config.json beside it asks for the activation 'tanh', but rules support only relu")
    refused("hub:me/deep", "has unknown weight 'dense_w.2'")
    refused("hub:me/both", "has unknown weight 'w0__0'")
    refused("hub:me/json", "config.json beside it cannot be read")


HOSTILE = {
    "empty": b"",
    "truncated": pylo(random_rule())[:900],
    "a page": b"<!doctype html><title>404</title>",
    "huge header": (2**62).to_bytes(8, "little") + b"{}",
    "header beyond the file": (10_000).to_bytes(8, "little") + b'{"a": 1}',
    "header nested too deep": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch executed'\ntR.",
    "another model": save({"weight": torch.zeros(4)}),
    "names with line ends": save({"w0.0": torch.zeros(1, 8), "\x1b[31m\nline": torch.zeros(1)}),
    "hundreds of names": save({"w0.0": torch.zeros(1, 8)} | {f"x{i}": torch.zeros(1) for i in range(300)}),
    "long names": save({"w0.0": torch.zeros(1, 8), "x" * 10_000: torch.zeros(1)}),
    "wrong shape": save(pylo_weights(random_rule().weights) | {"dense_w.1": torch.zeros(3, 8)}),
    "NaN": save(pylo_weights(random_rule().weights) | {"b0": torch.full((8,), float("nan"))}),
    "infinite": save(pylo_weights(random_rule().weights) | {"b0": torch.full((8,), float("inf"))}),
    "float64": save({name: w.double() for name, w in pylo_weights(random_rule().weights).items()}),
    "no hidden units": pylo(random_rule(0)),
    "a version of line ends": save(random_rule().weights, {"format": "celo2-rule", "version": "1\n\x1b[2J"}),
    "a variant of line ends": save(
        random_rule().weights,
        good_metadata() | {"variant": "a\nb"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("file", ["model.safetensors", "theta.state"])
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_one_line(hub, tmp_path, capsys, what, file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.add("me/bad", {file: HOSTILE[what]})
    text = refused("hub:me/bad", f":{file}")
    assert len(text) < 700, text
    assert main(["hub:me/bad", str(tmp_path / "out.safetensors")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {text}"
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out.safetensors").exists()
    (tmp_path / file).write_bytes(HOSTILE[what])  # and from a path
    with pytest.raises(RuleError, match=re.escape(str(tmp_path / file))) as caught:
        load_rule(tmp_path)
    assert str(caught.value).isprintable()


def test_a_large_file_is_not_downloaded(hub, tmp_path):
    hub.add("me/model", {"model.safetensors": bytes(LARGEST + 1)})
    refused("hub:me/model", "model.safetensors has 4,194,305 bytes; a rule has at most 4,194,304")
    assert hub.downloads() == []
    (tmp_path / "model.safetensors").write_bytes(bytes(LARGEST + 1))
    with pytest.raises(RuleError, match="4,194,305 bytes; a rule has at most"):
        load_rule(tmp_path)


# --- folders and uploads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["rule.safetensors", "model.safetensors", "theta.state"])
def test_folders_and_files_of_every_layout(tmp_path, layout):
    rule, folder = random_rule(), tmp_path / "folder"
    folder.mkdir()
    content = {"theta.state": THETA, "model.safetensors": pylo(rule), "rule.safetensors": in_bytes(rule, tmp_path)}[layout]
    (folder / layout).write_bytes(content)
    (folder / "README.md").write_text("a card")
    loaded = load_rule(folder)
    assert loaded == load_rule(folder / layout) == Rule.from_pretrained(folder) == Rule.from_pretrained(str(folder / layout))
    assert (loaded.variant, loaded.source) == ("celo2", "")
    assert main([str(folder), str(tmp_path / "out.safetensors"), "--description", "mine"]) == 0
    assert load_rule(tmp_path / "out.safetensors") == loaded
    (folder / "other.safetensors").write_bytes(content)
    assert load_rule(folder) == loaded
    (folder / ("theta.state" if layout != "theta.state" else "rule.safetensors")).write_bytes(content)
    with pytest.raises(RuleError, match="holds several rules"):
        load_rule(folder)


def front_matter(text: str) -> dict:
    _, metadata, body = text.split("---\n", 2)
    assert body.strip()
    return yaml.safe_load(metadata)


@pytest.mark.parametrize("name", [*SHIPPED, "own"])
def test_a_folder_with_a_card(tmp_path, name):
    rule = random_rule(5, **DESCRIBED) if name == "own" else load_rule(name)
    rule.save_pretrained(tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["README.md", "rule.safetensors"]
    again = Rule.from_pretrained(tmp_path / "a" / "b")
    assert again == rule and again.description == rule.description
    text = (tmp_path / "a" / "b" / "README.md").read_text()
    metadata = front_matter(text)
    assert metadata["library_name"] == "celo2"
    assert {"learned-optimizer", "arxiv:2602.19142"} <= set(metadata["tags"])
    assert metadata.get("license") == (None if name == "own" else "mit")
    assert rule.description.splitlines()[0] in text or f"# {name}" in text
    assert not re.search(r"\]\((?!https?:)", text)  # links into the project lead nowhere there
    assert ('variant="celo2-base"' in text) == (rule.variant == "celo2-base")
    (tmp_path / "a" / "b" / "README.md").write_text("mine")
    rule.save_pretrained(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "README.md").read_text() == "mine"


def test_push_and_load(hub, tmp_path):
    """The repository is made, one commit has the rule and its card, and what is loaded is equal in every bit."""
    rule = random_rule(5, **DESCRIBED)
    where = rule.push_to_hub("me/rule", token=hub.token, private=True, commit_message="first", license="apache-2.0")
    repository = hub.repositories["me/rule"]
    sha = repository.refs["main"]
    assert where == f"{hub.url}/me/rule/commit/{sha}"
    assert repository.access == "private" and repository.messages[-1] == "first"
    files = repository.commits[sha]
    assert sorted(files) == ["README.md", "rule.safetensors"]
    assert front_matter(files["README.md"].decode())["license"] == "apache-2.0"
    assert 'rule="hub:me/rule"' in files["README.md"].decode()
    again = Rule.from_pretrained("me/rule", token=hub.token)
    assert again == rule and again.description == rule.description and again.source == f"hub:me/rule@{sha}:rule.safetensors"
    assert_same_weights(again, rule.weights)

    # Another rule into the same repository, a branch and a pull request; what was loaded is pushed on.
    other = random_rule(seed=1)
    assert other.push_to_hub("me/rule", token=hub.token, branch="main").endswith(repository.refs["main"])
    assert Rule.from_pretrained("me/rule", token=hub.token) == other
    again.push_to_hub("me/rule", token=hub.token, create_pr=True)
    loaded = Rule.from_pretrained("me/rule", revision="refs/pr/1", token=hub.token)
    assert loaded == rule and loaded.source.startswith("hub:me/rule@") and loaded.source != again.source


def test_what_cannot_be_pushed(hub, offline):
    rule = random_rule()
    for name, options, message in (
        ("me/rule", {"token": "hf_wrong"}, r"me/rule: not pushed: the Hub refuses access \(401\): log in with `hf auth login`"),
        ("me/rule", {}, r"me/rule: not pushed: .*log in with `hf auth login` or set HF_TOKEN"),
        ("me/ru le", {"token": hub.token}, r"me/ru le: not pushed: .*me/ru le"),
        ("me/rule", {"token": hub.token, "branch": "none"}, r"no such branch, tag or commit"),
    ):
        with pytest.raises(RuleError, match=message) as caught:
            rule.push_to_hub(name, **options)
        assert str(caught.value).isprintable()
    with pytest.raises(RuleError, match="b0 is not finite"):
        replace(rule, weights=rule.weights | {"b0": torch.full((8,), float("nan"))}).push_to_hub("me/x", token=hub.token)
    assert "me/x" not in hub.repositories
    offline()
    with pytest.raises(RuleError, match=r"not pushed: .*offline mode"):
        rule.push_to_hub("me/rule", token=hub.token)


def test_what_a_rule_computes_has_no_source(tmp_path):
    rule = random_rule()
    loaded = replace(rule, source="hub:me/rule@0:rule.safetensors")
    assert loaded == rule and loaded.settings() == rule.settings()
    save_rule(loaded, tmp_path / "rule.safetensors")
    assert load_rule(tmp_path / "rule.safetensors").source == loaded.source  # a run's copy says where it came from


def test_from_pretrained_takes_shipped_names():
    for name in ("celo2-lm", "hand-nesterov"):
        assert Rule.from_pretrained(name) == load_rule(name)
