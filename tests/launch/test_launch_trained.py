"""The end of text of a trained model: what its run says, wherever the data is now."""

import json
import shutil

import pytest
from test_launch_mixture import mix, other  # noqa: F401  (a fixture)

from data.prepare import prepare
from data.shards import read_index
from launch.checkpoint.trained import open_trained
from launch.checkpoint.verify import CheckpointError
from launch.evaluate import main as evaluate
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
    assert status == 0 and "but documents end with '<|stop|>' here, with '<|endoftext|>' there" in run.out
