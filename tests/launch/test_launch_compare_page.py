"""What surrounds the numbers of a report: looks by name, the setting, references of other people, a folder to publish."""

import json
import re
from pathlib import Path

import pytest
from test_launch_compare_report import ABOUT, results_of, seeds

from configs.load import ConfigError
from launch.compare import __main__ as compare
from launch.compare import report
from launch.compare.looks import KNOWN, looks_of
from launch.compare.publish import without_paths
from launch.compare.references import read_references
from launch.compare.report import render, span
from launch.compare.setting import differing, setting_of
from launch.compare.summary import saving
from launch.optimizers.table import TABLE


def two(**options):
    return {
        "celo2": seeds("celo2", [3.0, 3.1], name="celo2", **options),
        "muon": seeds("muon", [4.0, 4.2], name="muon", **options),
    }


def test_a_name_has_its_color_whoever_else_is_there():
    labels = [*KNOWN, "a.b.Own{arguments: {x: 1}}", "celo2 (lr 0.001)"]
    together, alone = looks_of(labels), {label: looks_of([label])[label] for label in labels}
    assert {label: look.color for label, look in together.items()} == {label: look.color for label, look in alone.items()}
    assert len(set(together.values())) == len(labels)
    assert together["adamw"].color == 1 and looks_of(["muon", "adamw"])["adamw"] == looks_of(["adamw", "muon"])["adamw"]
    assert TABLE.keys() <= KNOWN.keys()  # and two of them never look the same
    many = looks_of([f"own{i}" for i in range(30)])
    assert max(list(many.values()).count(look) for look in many.values()) <= 2


def test_every_table_has_the_name_that_its_file_gets():
    """The script names a table's CSV by it, and stops at a table without one: then nothing of the page answers."""
    folder = Path(report.__file__).parent
    tables = re.findall(r'<div class="wide"[^>]*>', "".join((folder / f).read_text() for f in ("page.html", "sections.html")))
    names = [re.findall('data-name="([^"]+)"', table) for table in tables]
    assert len(tables) == 10 and all(len(name) == 1 for name in names) and len({name[0] for name in names}) == 10, tables


def test_the_head_says_the_setting():
    said = dict(setting_of(results_of(two())))
    assert said["batch"] == "32 sequences a step, fp32" and said["tokens"] == "compared at 1,000, after 100 steps"
    assert said["machine"] == "x86_64" and said["data"] == "None"
    page = render(results_of(two()))
    assert "<dt>batch</dt><dd>32 sequences a step, fp32</dd>" in page
    old = results_of(two())
    for run in old["runs"]:
        del run["config"]
    assert [key for key, _ in setting_of(old)] == ["tokens", "machine"] and differing(old) == ([], [])


def test_where_configurations_differ():
    groups = two()
    groups["muon"][0].config.optimizer.arguments = {"momentum": 0.9}
    labels, table = differing(results_of(groups))
    assert labels == ["celo2", "muon"]
    assert dict(table) == {"optimizer.name": ["celo2", "muon"], "optimizer.arguments": ["None", "{'momentum': 0.9}"]}


def test_the_strip_is_cropped_so_that_close_ones_separate():
    """0.02 apart, and a third 2 behind: the strip ends with the two, and says so."""
    groups = {name: seeds(name, [loss, loss + 0.01]) for name, loss in (("a", 4.0), ("b", 4.02), ("far", 6.0))}
    for n in (2, 3):
        results = results_of(dict(list(groups.items())[:n]))
        _, high, crops = span(results["optimizers"])
        assert crops == (n == 3) and high < 4.2
        page = render(results)
        assert ("→ stands for what lies beyond it" in page) == crops == (">6.005 →</i>" in page)


@pytest.mark.parametrize(
    ("share", "bound", "said"),
    [
        (0.97, False, "3 % fewer tokens"),
        (1.004, False, "as many tokens"),
        (1.3, True, "at most 30 % more tokens"),
        (2.5, False, "2.5 times the tokens"),
        (0.2, True, "at least 80 % fewer tokens"),
    ],
)
def test_shares_in_words(share, bound, said):
    assert saving(share, "fewer", "tokens", bound) == said


WANDB = 'Step,"one - eval/loss","one - eval/loss__MIN","one - _step","two - eval/loss"\n10,5.5,5,10,\n20,5,4,20,4.5\n'
FILES = {
    "mine.csv": ("tokens,lr,val_loss\n2000,1,4.5\n1000,1,5.5\n", [("mine", "tokens", [[1000, 5.5], [2000, 4.5]])]),
    "spaces.csv": ("Step , Val_Loss\n10, 5.5\n20, 5\n", [("spaces", "step", [[10, 5.5], [20, 5]])]),
    "semicolons.csv": ("step;loss\n10;5.5\n", [("semicolons", "step", [[10, 5.5]])]),
    "quoted.csv": ('"step";"one, a - eval/loss"\n10;5.5\n', [("one, a", "step", [[10, 5.5]])]),
    "tabs.csv": ("step\tloss\n10\t5.5\n", [("tabs", "step", [[10, 5.5]])]),
    "wandb.csv": (WANDB, [("one", "step", [[10, 5.5], [20, 5]]), ("two", "step", [[20, 4.5]])]),
    "muon/130m/1/result.json": (json.dumps({"min_loss": 3.46, "baseline": {"loss": 3.47}}), [("muon/130m/1", None, [[0, 3.46]])]),
    "history.json": (json.dumps([{"_step": 1, "eval/loss": 5}, {"_step": 2}]), [("history", "step", [[1, 5]])]),
    "metrics.jsonl": (
        '{"step": 1, "tokens": 9, "loss": 6}\n{"step": 2, "tokens": 18, "val_loss": 5}\n',
        [("metrics", "tokens", [[18, 5]])],
    ),
    "pairs.json": (
        json.dumps({"x": [[1, 2]], "y": {"step": [3], "loss": [4]}}),
        [("x", "tokens", [[1, 2]]), ("y", "step", [[3, 4]])],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_references(name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FILES[name][0])
    found = read_references(path)
    assert [(r["label"].removesuffix(" (reference)"), r["x"], r["points"]) for r in found] == FILES[name][1]
    assert {r["source"] for r in found} == {path.name}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.csv", "tokens,val_loss\n1,much\n", "val_loss holds 'much', which is not a finite number"),
        (
            "a.csv",
            "time,accuracy\n1,2\n",
            "no column with a loss (val_loss, validation loss, validation_loss, eval/loss, val/loss, eval_loss, val, loss, "
            "train/loss) beside one with tokens or steps (tokens, total_tokens, throughput/total_tokens, train/tokens, n_tokens, "
            "step, _step, global_step, trainer/global_step, train/global_step, iter, iteration); "
            "its columns: 'time', 'accuracy'\n",
        ),
        ("a.csv", "step;los\n1;2\n", "its columns: 'step', 'los'\n"),
        ("a.csv", "", "no column with a loss"),
        ("a.csv", "step,val_loss\n", "a.csv: no rows below its names of columns"),
        ("a.csv", "step,loss\n1," + "2" * 200_000, "damaged CSV (field larger than field limit (131072))"),
        ("a.jsonl", '\n{"steps": 1, "loss": 2}\n', "its columns: 'steps', 'loss'\n"),
        ("a.json", '[{"time": 1}, {"loss": 2}]', "its columns: 'time', 'loss'\n"),
        ("a.json", "{", "damaged JSON"),
        ("a.json", "3", "its columns: none\n"),
        ("a.json", '{"min_loss": NaN}', "which is not a finite number"),
        ("a.csv", None, "cannot read it"),
    ],
)
def test_a_reference_that_is_none_is_one_line(name, text, said, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert compare.main(["--results", "none.json", "--reference", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --reference {tmp_path / name}: ") and said in error and error.count("\n") == 1
    with pytest.raises(ConfigError):
        read_references(tmp_path / name)


def test_folders_that_cannot_be_are_named_by_their_option(tmp_path, monkeypatch, capsys):
    """A report is not replaced by one without paths, and the results are not blamed for a folder."""
    for name in ("draw", "draw_details"):
        monkeypatch.setattr(report, name, lambda results, path: path.write_bytes(b""))
    numbers = tmp_path / "results.json"
    numbers.write_text(json.dumps(results_of(two())))
    (tmp_path / "file").touch()
    out, site, file = str(tmp_path / "out"), str(tmp_path / "site"), str(tmp_path / "file")
    replaced = "this would replace the report there, which is the one with all paths; name another folder"
    for words, said in (
        (["--publish", str(tmp_path)], f"--publish {tmp_path}: {replaced}"),
        (["--out", out, "--publish", f"{site}/../out"], f"--publish {site}/../out: {replaced}"),
        (["--out", out, "--publish", file], f"--publish {file}: a file is in the way"),
        (["--out", file], f"--out {file}: a file is in the way"),
        (["--out", "/proc/out"], "--out /proc/out: cannot make it (No such file or directory)"),
    ):
        assert compare.main(["--results", str(numbers), *words]) == 2
        assert capsys.readouterr().err == f"error: {said}\n"
        assert not (tmp_path / "out" / "report.html").exists() and not (tmp_path / "index.html").exists()
    assert compare.main(["--results", str(numbers), "--out", out]) == 0
    again = ["--results", f"{out}/results.json", "--out", site]
    capsys.readouterr()
    assert compare.main([*again, "--publish", out]) == 2 and replaced in capsys.readouterr().err
    assert compare.main([*again, "--publish", f"{site}/published"]) == 0
    assert capsys.readouterr().out == f"report: {site}/report.html\n" and (tmp_path / "site" / "report.html").exists()


def test_a_folder_to_publish(tmp_path, monkeypatch):
    """Any static host can serve it: no path of this machine, nothing from elsewhere, the reference in it."""
    for name in ("draw", "draw_details"):  # pictures show names of optimizers alone
        monkeypatch.setattr(report, name, lambda results, path: path.write_bytes(b""))
    groups = two()
    for run in [run for runs in groups.values() for run in runs]:
        run.config.run.dir, run.config.data.dir = "/home/some one/runs/x", "/srv/data/prepared/stdlib"
        run.command = "python train.py /home/me/a.yaml run.dir='/home/some one/runs/x' data.dir=/srv/data/prepared/stdlib"
    results = results_of(groups) | {
        "command": "python -m launch.compare ~/x.yaml --out /tmp/w/out",
        "caveats": ["/a/b: 3/4, and/or"],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "other.csv").write_text("tokens,loss\n100,5\n")
    words = ["--results", str(tmp_path / "results.json"), "--reference", str(tmp_path / "other.csv")]
    assert compare.main([*words, "--out", str(tmp_path / "out"), "--publish", str(tmp_path / "site")]) == 0
    assert {path.name for path in (tmp_path / "site").iterdir()} == {"index.html", "results.json", "report.png", "details.png"}
    page, numbers = (tmp_path / "site" / "index.html").read_text(), (tmp_path / "site" / "results.json").read_text()
    for text in (re.sub(r"<script>.*?</script>", "", page, flags=re.S), numbers):
        assert not re.search(r"/home|some one|/srv|/tmp|~/", text)
        assert "other (reference)" in text and "stdlib" in text and "3/4, and/or" in text
    assert "src=" not in page and "href=" not in page
    assert json.loads(numbers)["runs"][0]["validation"] == results["runs"][0]["validation"]
    assert without_paths(ABOUT | {"runs": []}) == ABOUT | {"runs": []}
