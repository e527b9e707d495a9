"""A small prepared data set of bytes, and a run in this process."""

import json
import os
from pathlib import Path

import pytest
import torch

import train
from data.prepare import prepare
from launch.run.hooks import Hooks

# The documents of the data set. Tolerances of tests were measured on them.
TEXT = """Pretrain a language model with a learned optimizer.

    python train.py CONFIG.yaml [section.key=value ...]                 one process
    torchrun --nproc_per_node N train.py CONFIG.yaml [...]              N processes
    python train.py CONFIG.yaml --plan                                  what it would take, without training
    python train.py --help                                              every option with its default

config -> accelerator -> data, model, optimizer -> loop -> checkpoint: one page, read from top to bottom.
"""
CONFIG = """
run: {name: test, seed: 1}
model: {layers: 2, width: 32, heads: 2, context: 32}
train: {steps: 6, batch_size: 8, micro_batch_size: 8}
optimizer: {lr: 5e-3, adamw_lr: 1e-2}
log: {every: 1, sample_tokens: 8}
eval: {every: 3, sequences: 8}
checkpoint: {every: 3}
"""


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Twenty documents of text, about 12,000 byte tokens."""
    folder = tmp_path_factory.mktemp("prepared")
    words = TEXT.split()
    documents = [" ".join(words[i % len(words)] for i in range(n, n * 7 + 80)) for n in range(1, 21)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return prepare(str(folder / "text.jsonl"), folder / "bytes", tokenizer="bytes", val_fraction=0.2, workers=1)


@pytest.fixture
def run(prepared, tmp_path, capsys):
    """run("section.key=value", ...) -> (exit status, records of metrics.jsonl, stderr); the folder is run.dir."""

    def start(*overrides: str, folder: str = "run", hooks: Hooks | None = None) -> tuple[int, list[dict], str]:
        config = tmp_path / "config.yaml"
        config.write_text(CONFIG)
        run_dir = tmp_path / folder
        capsys.readouterr()
        status = train.main([str(config), f"data.dir={prepared}", f"run.dir={run_dir}", *overrides], hooks)
        captured = capsys.readouterr()
        start.out = captured.out
        path = run_dir / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return status, records, captured.err

    start.tmp_path = tmp_path
    return start


@pytest.fixture(autouse=True)
def same_environment():
    """What a library sets for its processes must not reach the next test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-for-bit comparisons must not depend on how many cores are free."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
