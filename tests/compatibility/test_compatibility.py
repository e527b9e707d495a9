"""What an earlier version wrote is read: a checkpoint, a shard folder, a rule file and a meta-training run.

`written_by_5598d0e` was written by commit 5598d0e: `data.prepare` with the tokenizer `bytes`, a run of 6 steps with `celo2` whose
checkpoint of step 3 is kept, and 4 iterations of `configs/metatrain/digits.yaml` with an odd rule and a frozen weight.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from celo2 import load_rule
from celo2.metatrain.__main__ import main as metatrain
from data.shards import TokenShards
from data.verify import main as verify_shards

WRITTEN = Path(__file__).parent / "written_by_5598d0e"


@pytest.fixture
def written(tmp_path, monkeypatch) -> Path:
    """A copy to continue, as the current folder."""
    shutil.copytree(WRITTEN, tmp_path / "written")
    monkeypatch.chdir(tmp_path / "written")
    return tmp_path / "written"


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_shards(written):
    assert verify_shards(["shards"]) == 0
    shards = TokenShards("shards", "train")
    assert (shards.n_tokens, shards.vocab_size) == (13611, 257)


def test_checkpoint_continues(written):
    """The steps after the checkpoint are those of the old version: losses agree to the last bits (measured: bit for bit)."""
    expected = records(written / "run" / "metrics.jsonl")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train.main(["run/config.yaml"]) == 0
    finally:
        torch.set_num_threads(threads)
    continued = records(written / "run" / "metrics.jsonl")
    assert [r["step"] for r in continued] == [r["step"] for r in expected]
    for before, now in zip(expected, continued, strict=True):
        for key in {"loss", "val_loss", "grad_norm"} & before.keys():
            assert before[key] == pytest.approx(now[key], rel=1e-6)


def test_rule_file():
    rule = load_rule(WRITTEN / "metatrain" / "rule.safetensors")
    assert rule.variant == "celo2" and rule.description.startswith("meta-trained")


def test_metatraining_continues(written):
    """The run's own `config.yaml`, with the flat keys and weight names of that time, continues it."""
    assert metatrain(["metatrain/config.yaml", "iterations=6"]) == 0
    assert [r["iteration"] for r in records(written / "metatrain" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_metatraining_repeats(written):
    """The same configuration in a new folder gives the numbers of that time (measured: bit for bit).

    In its second iteration an episode ends, whose loss differences `estimator.scale_buckets` filed elsewhere at that time.
    """
    pytest.importorskip("numba")
    assert metatrain(["metatrain/config.yaml", "run.dir=again", "iterations=2"]) == 0
    new, old = (records(folder / "metrics.jsonl") for folder in (Path("again"), written / "metatrain"))
    del new[0]["seconds"], old[0]["seconds"]
    assert new[0] == pytest.approx(old[0], rel=1e-6)
    assert new[1]["loss"] == pytest.approx(old[1]["loss"], rel=1e-6)
