"""The commands: a whole run, resume after a kill, and what a person is told about a mistake."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from celo2 import load_rule
from celo2.metatrain.__main__ import main
from celo2.metatrain.config import Config, load_config
from celo2.metatrain.tasks import load_images, load_texts
from celo2.training.metrics import read_metrics

ROOT = Path(__file__).parents[2]
TINY = """
tasks: {sources: [digits], problems: 2}
images: {batch_size: 8}
inner: {truncation: 4, min_length: 4, max_length: 20}
rule: {init: hand-momentum, init_noise: 0.1}
estimator: {scale_buckets: 2, loss_clip: 1.5}
outer: {iterations: 12, average: 0.9}
engine: {name: plain}
checkpoint: {every: 4, snapshot_every: 4}
log: {every: 2}
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def folder_of(tiny: Path, name: str, *overrides: str) -> Path:
    folder = tiny.parent / name
    assert main([str(tiny), f"run.dir={folder}", *overrides]) == 0
    return folder


def numbers(folder: Path) -> list[dict[str, float]]:
    """The metrics without the times."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("variant", ["celo2", "celo2-base"])
def test_run_leaves_metrics_curve_and_a_rule_that_loads(variant, tiny):
    folder = folder_of(tiny, "run", f"rule.variant={variant}")
    assert [record["iteration"] for record in numbers(folder)] == [2, 4, 6, 8, 10, 12]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    rule = load_rule(folder / "rule.safetensors")
    assert rule.variant == variant and "12 iterations on digits" in rule.description
    assert sorted(path.name for path in (folder / "rules").iterdir()) == [f"{i:08d}.safetensors" for i in (4, 8, 12)]
    assert load_config(folder / "config.yaml").rule.variant == variant


def test_metrics_are_json_whatever_becomes_of_a_run(tiny):
    """The norm of weights that have diverged is null, which every reader of JSON knows."""
    text = (folder_of(tiny, "run", "outer.lr=1e30", "outer.iterations=4") / "metrics.jsonl").read_text()
    assert [json.loads(line)["theta_norm"] for line in text.splitlines()] == [None, None] and "Infinity" not in text


def test_a_finished_run_without_metrics_stays_one(tiny):
    folder = folder_of(tiny, "run")
    rule = load_rule(folder / "rule.safetensors")
    (folder / "metrics.jsonl").unlink()
    assert load_rule(folder_of(tiny, "run") / "rule.safetensors") == rule


def test_too_little_memory_is_one_line(tiny, capsys, monkeypatch):
    def run(*_):
        raise MemoryError("Unable to allocate 5.82 TiB")

    monkeypatch.setattr("celo2.metatrain.__main__.run", run)
    assert main([str(tiny), f"run.dir={tiny.parent / 'run'}"]) == 2
    assert capsys.readouterr().err == (
        "error: Unable to allocate 5.82 TiB: take fewer problems or candidates, smaller batches or shorter episodes\n"
    )


def test_same_seed_same_rule_another_seed_another(tiny):
    first, again, other = (folder_of(tiny, name, f"run.seed={seed}") for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert load_rule(first / "rule.safetensors") == load_rule(again / "rule.safetensors")
    assert load_rule(first / "rule.safetensors") != load_rule(other / "rule.safetensors")
    assert numbers(first) == numbers(again)


@pytest.mark.parametrize("tasks", ["[digits]", "[text:{text},digits]"])
def test_resumes_exactly_after_two_stops(tasks, tiny, tmp_path):
    (tmp_path / "code.txt").write_bytes(Path(__file__).read_bytes())
    overrides = (f"tasks.sources={tasks.format(text=tmp_path / 'code.txt')}", "inner.schedule=cosine")
    whole = folder_of(tiny, "whole", *overrides)
    for iterations in (4, 8, 12):
        pieces = folder_of(tiny, "pieces", *overrides, f"outer.iterations={iterations}")
    assert load_rule(pieces / "rule.safetensors") == load_rule(whole / "rule.safetensors")
    assert numbers(pieces) == numbers(whole)


def test_resumes_exactly_after_a_kill(tiny):
    """SIGKILL between two checkpoints, so that work is lost and lines of metrics are ahead of the state."""
    whole = folder_of(tiny, "whole", "outer.iterations=60", "log.every=1", "checkpoint.every=10")
    folder = tiny.parent / "killed"
    command = [sys.executable, "-m", "celo2.metatrain", str(tiny), f"run.dir={folder}", "outer.iterations=60", "log.every=1"]
    process = subprocess.Popen(
        [*command, "checkpoint.every=10"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 180
    while not len(read_metrics(folder / "metrics.jsonl")) > 12:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "state.safetensors").exists()
    assert len(read_metrics(folder / "metrics.jsonl")) < 60
    folder_of(tiny, "killed", "outer.iterations=60", "log.every=1", "checkpoint.every=10")
    assert load_rule(folder / "rule.safetensors") == load_rule(whole / "rule.safetensors")
    assert numbers(folder) == numbers(whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["outer.iteration=3"], "unknown key 'outer.iteration'; did you mean 'outer.iterations'?"),
        (["outer.iterations=abc"], "outer.iterations is 'abc', expected int"),
        (["outer.iterations=0"], "outer.iterations is 0, expected at least 1"),
        (["rule.variant=celo3"], "rule.variant is 'celo3', expected one of celo2, celo2-base"),
        (["tasks.sources=[]"], "tasks.sources is empty"),
        (["tasks.sources=[cats]"], "task 'cats': expected digits, hub:NAME"),
        (["tasks.sources=[hub:cats]"], "task 'hub:cats': expected one of mnist"),
        (["tasks.sources=[missing.npz]"], "task missing.npz: cannot be read"),
        (["tasks.sources=[digits,text:missing.jsonl.gz]"], "text missing.jsonl.gz: cannot be read"),
        (
            ["tasks.sources=[digits,text:novel.pdf]"],
            "task 'text:novel.pdf': expected text:FILE with FILE a .txt, .jsonl or .jsonl.gz",
        ),
        (["text.layers=0"], "text.layers is 0, expected at least 1"),
        (["images.batch_size=99999999999"], "images.batch_size is 99999999999, expected at least 1 and at most 65536"),
        (["tasks.problems=99999999999"], "tasks.problems is 99999999999, expected at least 1 and at most 65536"),
        (["inner.max_length=99999999999999999999999"], "expected at least 1 and at most 16777216"),
        (
            ["text.also=[width=99999999999]"],
            "text.also: 'width=99999999999' in 'width=99999999999', expected width of at most 65536",
        ),
        (["outer.lr=1e38"], "outer.lr is 1e+38, expected at least 0 and at most 1e+30"),
        (
            ["outer.method=cma", "outer.population=9999999999"],
            "outer.population is 9999999999, expected at least 4 and at most 65536",
        ),
        (["text.min_scale=0"], "text.min_scale is 0.0, expected above 0"),
        (["rule.frozen=[w0__14]"], "rule.frozen: the rule has no weights 'w0__14', expected some of gradient, clipped_gradient"),
        (["rule.frozen=[w1]", "outer.weight_decay=0.1"], "outer.weight_decay is 0.1, expected 0 with frozen weights"),
        (["rule.normalize_gradient=1"], "rule.normalize_gradient is 1, expected bool"),
        (["inner.schedule=linear"], "inner.schedule is 'linear', expected one of constant, cosine"),
        (["inner.min_length=3"], "inner.min_length is 3, expected at least inner.truncation (4)"),
        (["images.min_scale=2", "images.max_scale=1"], "images.min_scale is 2.0, expected at most images.max_scale (1.0)"),
        (["estimator.sigma=0"], "estimator.sigma is 0.0, expected above 0"),
        (["checkpoint.every=3"], "checkpoint.every is 3, expected a multiple of log.every"),
        (["rule.init=nothing"], "no rule 'nothing'"),
        (
            ["engine.name=fast", "images.batch_size=9"],
            "engine.name=fast needs engine.device=cpu and an images.batch_size divisible by 8",
        ),
        (["estimator.sigma"], "'estimator.sigma': expected section.key=value"),
        (["outer.betas=[0.9]"], "outer.betas is [0.9], expected two numbers"),
    ],
)
def test_a_mistake_is_one_clear_line(overrides, message, tiny, capsys):
    assert main([str(tiny), f"run.dir={tiny.parent / 'bad'}", *overrides]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
    assert not (tiny.parent / "bad").exists()


def test_another_configuration_does_not_continue_a_run(tiny, capsys):
    folder = folder_of(tiny, "run")
    before = (folder / "state.safetensors").read_bytes()
    assert main([str(tiny), f"run.dir={folder}", "estimator.sigma=0.5"]) == 2
    assert "was written with estimator.sigma 0.01, now it is 0.5" in capsys.readouterr().err
    assert main([str(tiny), f"run.dir={folder}", "rule.normalize_gradient=true"]) == 2
    assert "was written with rule.normalize_gradient False, now it is True" in capsys.readouterr().err
    (folder / "state.safetensors").write_bytes(before[:100])
    assert main([str(tiny), f"run.dir={folder}"]) == 2
    assert "not a meta-training state" in capsys.readouterr().err


def test_flat_keys_of_earlier_versions(tiny, capsys):
    """They are read, from the file and the command line, each with one note; a section without keys is no old key."""
    tiny.write_text("tasks: [digits]\nengine: plain\nloss_clip: null\nouter_lr: 0.5\nfrozen: [w0__2, b0]\nlog:\n")
    config = load_config(tiny, ["outer_lr=1e-3", "estimator.loss_clip=2"])
    assert (config.tasks.sources, config.engine.name, config.rule.frozen) == (["digits"], "plain", ["weight", "b0"])
    assert (config.outer.lr, config.estimator.loss_clip, config.log.every) == (1e-3, 2.0, 20)
    assert capsys.readouterr().err.splitlines() == [
        "note: the key 'tasks' is now 'tasks.sources'",
        "note: the key 'engine' is now 'engine.name'",
        "note: the key 'loss_clip' is now 'estimator.loss_clip'",
        "note: the key 'outer_lr' is now 'outer.lr'",
        "note: the key 'frozen' is now 'rule.frozen'",
        "note: 'w0__2' in rule.frozen is now 'weight'",
    ]
    tiny.write_text("outer_lr: 0.5\nengine:\nouter: {average: 0.5}\n")
    config = load_config(tiny)
    assert (config.outer.lr, config.outer.average, config.engine.name) == (0.5, 0.5, "auto")


def test_npz_of_images(tmp_path):
    """All sets of a file or one of them, standardized; bad ones are named."""
    rng = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    sets = {f"{name}_images": rng.integers(0, 255, (20, 8, 8), np.uint8) for name in "ba"}
    labels = {f"{name}_labels": np.arange(20, dtype=np.uint8) % 10 for name in "ba"}
    np.savez(path, **sets, **labels)
    images = load_images([str(path), f"{path}:b"])
    assert images.names == ("a", "b", "b") and list(images.starts) == [0, 20, 40]
    assert images.arrays[0][20:40].std() == pytest.approx(1, abs=1e-5)
    np.testing.assert_array_equal(images.arrays[0][20:40], images.arrays[0][40:])
    with pytest.raises(ValueError, match="no such data set; the file holds a, b"):
        load_images([f"{path}:c"])
    np.savez(path, a_images=sets["a_images"][:, :4], a_labels=labels["a_labels"])
    with pytest.raises(ValueError, match="expected \\(N, 8, 8\\)"):
        load_images([str(path)])


def test_texts_of_all_kinds(tmp_path):
    """The same bytes from three kinds of file, one after the other; bytes beyond ASCII are all one; bad files are named."""
    lines = [{"text": "straight on " * 4, "id": 1}, {"text": "über"}]
    raw = "\n".join(json.dumps(line) for line in lines).encode()
    plain = "\n\n".join(line["text"] for line in lines).encode()
    for name, content in (("a.txt", plain), ("b.jsonl", raw), ("c.jsonl.gz", gzip.compress(raw))):
        (tmp_path / name).write_bytes(content)
    texts = load_texts([f"text:{tmp_path / name}" for name in ("a.txt", "b.jsonl", "c.jsonl.gz")])
    n = len(plain)
    assert texts.names == ("a", "b", "c") and list(texts.starts) == [0, n, 2 * n] and list(texts.counts) == [n - 32] * 3
    for k in range(3):
        assert bytes(texts.arrays[0][k * n : (k + 1) * n]) == bytes(byte if byte < 128 else 0 for byte in plain)
    for content, message in ((b"{}", "KeyError"), (b'{"text": "short"}', "5 bytes, expected at least 33")):
        (tmp_path / "b.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_texts([f"text:{tmp_path / 'b.jsonl'}"])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(raw)[:-9])
    with pytest.raises(ValueError, match="EOFError"):
        load_texts([f"text:{tmp_path / 'c.jsonl.gz'}"])


def test_images_of_the_hub_become_small_and_grey(monkeypatch):
    """Without a network: a data set of one white and one half-red image, as `datasets` hands it out."""
    datasets, image = pytest.importorskip("datasets"), pytest.importorskip("PIL.Image")
    half = np.zeros((32, 32, 3), np.uint8)
    half[:, :16, 0] = 255

    class Split(dict):
        column_names = ("img", "label")

    split = Split(img=[image.new("RGB", (32, 32), "white"), image.fromarray(half)], label=[3, 7])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: split)
    images = load_images(["hub:cifar10"])
    raw = images.arrays[0].reshape(2, 8, 8)
    assert images.names == ("cifar10",) and list(images.arrays[1]) == [3, 7]
    assert np.ptp(raw[0]) == 0 and raw[0, 0, 0] > raw[1, 0, 0] > raw[1, 0, 7]
    assert np.ptp(raw[1, :, :4]) == 0 and np.ptp(raw[1, :, 4:]) == 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "metatrain").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_load(path):
    assert load_config(path) != Config()
