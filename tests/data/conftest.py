import json
import random

import pytest

from data.prepare import prepare
from data.shards import TokenShards


def _texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 5 to 60 words, some of them not ASCII."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdluéß漢🙂", k=rng.randint(1, 8))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=rng.randint(5, 60))) + ".\n" for _ in range(count)]


def _write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def make_texts():
    """make_texts(count, seed=0): a list of documents."""
    return _texts


@pytest.fixture(scope="session")
def write_jsonl():
    """write_jsonl(path, texts): a file of JSON lines; returns its path."""
    return _write


@pytest.fixture
def quiet():
    return lambda line: None


@pytest.fixture(scope="session")
def texts():
    return _texts(300)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, texts):
    """300 documents as bytes, a tenth of them for validation, in shards of 5,000 tokens. Not to be changed."""
    folder = tmp_path_factory.mktemp("prepared")
    options = {"tokenizer": "bytes", "val_fraction": 0.1, "shard_tokens": 5000, "workers": 1}
    return prepare(_write(folder / "corpus.jsonl", texts), folder / "out", **options, log=lambda line: None)


@pytest.fixture(scope="session")
def train(prepared):
    return TokenShards(prepared, "train")
