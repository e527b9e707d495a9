"""What a report says, from runs whose curves are known."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from jinja2 import TemplateError

from celo2.training.search import Key, Search
from configs.load import ConfigError
from configs.schema import Config
from launch.compare import __main__ as compare
from launch.compare import report
from launch.compare.curves import Run, label_runs, other_differences, reaches, thinned, upto
from launch.compare.picture import COLORS, style
from launch.compare.report import render, to_json, write_report
from launch.compare.summary import summarize

ABOUT = {
    "title": "t",
    "command": "python -m launch.compare",
    "device": "x86_64",
    "versions": {"torch": "2"},
    "method": ["As it is done."],
}


def make_run(label, seed, final, seconds=1.0, steps=100, status="finished", start=8.0, name="adamw"):
    """A loss that falls in a straight line from `start` to `final` at 10 tokens and `seconds` a step."""
    config = Config()
    config.run.seed, config.optimizer.name, config.train.steps = seed, name, steps
    loss = lambda step: start + (final - start) * step / steps  # noqa: E731
    training = [
        {"step": s, "tokens": 10 * s, "loss": loss(s), "grad_norm": 1.0, "seconds": seconds * s} for s in range(10, steps + 1, 10)
    ]
    validation = [{"step": s, "tokens": 10 * s, "val_loss": loss(s)} for s in range(20, steps + 1, 20)]
    return Run(label, Path(f"runs/{label}_{seed}"), config, "python train.py", training, validation, status, 6.0, 1_500_000)


def search_of(losses, notes=()):
    """A search of learning rates with one seed."""
    return Search((Key("lr", min(losses, default=1.0)),), {(lr,): (loss,) for lr, loss in losses.items()}, list(notes))


def results_of(groups, searches=None):
    return summarize(groups, searches or {}, ABOUT)


def seeds(label, finals, **options):
    return [make_run(label, seed, final, **options) for seed, final in enumerate(finals, 1)]


def test_a_difference_outside_the_noise_is_a_claim():
    results = results_of({"adamw": seeds("adamw", [4.0, 4.2, 4.4]), "celo2": seeds("celo2", [3.9, 4.1, 4.301], seconds=2.0)})
    (said,) = results["sentences"]
    pattern = (
        r"celo2 has a lower loss than adamw, by 0\.100 ± 0\.001 \(3 seeds, p < 0\.001\); it reaches adamw's final loss with (.*)"
    )
    assert re.match(pattern, said)
    # From 8, 4.0 is reached at 4/4.1 of the way to 3.9, and so on seed by seed; a step takes twice the time.
    assert "with 3 % fewer tokens and 95 % more time." in said
    pair = results["pairs"][0]
    assert pair["claim"] and pair["paired"] and pair["reach"]["reached"] == 3
    assert pair["reach"]["tokens"] == pytest.approx((4 / 4.1 + 3.8 / 3.9 + 3.6 / 3.699) / 3)
    assert results["compared_at_tokens"] == 1000


def test_a_row_has_the_rates_that_parameters_have():
    """An optimizer that updates everything at one rate passes optimizer.adamw_lr over."""
    groups = {name: [make_run(name, 0, 3.0, name=name)] for name in ("adamw", "adafactor", "celo2-base")}
    for (run,) in groups.values():
        run.config.optimizer.lr, run.config.optimizer.adamw_lr = 5e-3, 1e-2
    rows = {row["label"]: (row["lr"], row["adamw_lr"]) for row in results_of(groups)["optimizers"]}
    assert rows == {"adamw": (5e-3, 1e-2), "adafactor": (5e-3, 5e-3), "celo2-base": (5e-3, 5e-3)}


def test_a_difference_inside_the_noise_is_none():
    results = results_of({"a": seeds("a", [4.0, 4.3, 4.1]), "b": seeds("b", [4.1, 4.2, 4.2])})
    assert results["sentences"] == ["a and b: no difference beyond the noise (−0.033 ± 0.287, 3 seeds, p = 0.67)."]
    assert not results["pairs"][0]["claim"]


def test_a_pair_that_only_the_correction_rejects():
    """p = 0.03 alone would be a claim; among three pairs, of which it is the best, it is none."""
    groups = {"a": seeds("a", [4.00, 4.00, 4.00]), "b": seeds("b", [4.04, 4.05, 4.07]), "c": seeds("c", [3.9, 4.3, 4.0])}
    results = results_of(groups)
    pair = next(p for p in results["pairs"] if {p["a"], p["b"]} == {"a", "b"})
    assert pair["p"] < 0.05 < pair["p_corrected"] and not pair["claim"]
    said = results["sentences"][results["pairs"].index(pair)]
    assert re.fullmatch(r"a and b: no difference beyond the noise \(.*, p = 0\.\d+ when corrected for 3 pairs\)\.", said), said


def test_one_seed_claims_nothing():
    (said,) = results_of({"a": seeds("a", [3.0]), "b": seeds("b", [4.0])})["sentences"]
    assert said == "a and b: one seed tells no difference from noise, so nothing is claimed (measured −1.000)."


def test_divergence_is_counted_and_not_compared():
    bad = [*seeds("b", [4.0, 4.1]), make_run("b", 3, 9.0, status="diverged")]
    search = search_of({1e-3: float("inf"), 2e-3: float("inf")}, ["every learning rate that was tried diverged"])
    results = results_of({"a": seeds("a", [3.0, 3.1, 3.2]), "b": bad, "c": []}, {"c": search})
    assert results["pairs"] == []
    assert results["sentences"] == [
        "b diverged in 1 of 3 seeds: its final loss is not compared.",
        "c diverged at every learning rate that was tried: it is not compared.",
    ]
    assert results["optimizers"][1]["diverged_seeds"] == [3]
    assert results["optimizers"][2]["loss"] is None and results["optimizers"][2]["search"]["trials"] == 2
    render(results)
    json.dumps(results, allow_nan=False)


def test_nothing_finished_at_all():
    results = results_of({"a": [make_run("a", 1, 9.0, status="diverged")], "b": []}, {"b": search_of({})})
    assert results["target_loss"] is None and len(results["sentences"]) == 2
    render(results)


def test_a_mean_that_is_lower_need_not_reach_in_every_run():
    """Unpaired: the first seed of a ends above b's mean."""
    a = [make_run("a", 1, 4.1), make_run("a", 2, 3.0), make_run("a", 3, 3.0)]
    b = [make_run("b", seed, final) for seed, final in ((11, 4.0), (12, 4.05), (13, 3.95))]
    pair = results_of({"a": a, "b": b})["pairs"][0]
    assert not pair["paired"] and (pair["reach"]["reached"], pair["reach"]["asked"]) == (2, 3)
    assert pair["reach"]["tokens"] == pytest.approx(0.8)


def test_different_lengths_are_compared_where_the_shortest_ends():
    long, short = seeds("long", [3.0, 3.1], steps=200), seeds("short", [4.0, 4.1], steps=100)
    results = results_of({"long": long, "short": short})
    assert results["compared_at_tokens"] == 1000
    assert results["optimizers"][0]["final"] == pytest.approx({"1": 5.5, "2": 5.55})  # half of its way from 8
    assert results["sentences"][0].startswith("short has a lower loss than long, by 1.475")
    assert [row["interpolated"] for row in results["optimizers"]] == [False, False]
    assert "different lengths: they are compared at 1,000 tokens" in results["caveats"][0]
    assert any("neither the time of an optimizer step" in text for text in results["caveats"])


def test_targets_and_costs():
    results = results_of({"a": seeds("a", [4.0, 4.2]), "b": seeds("b", [3.0, 3.0], seconds=3.0)})
    a, b = results["optimizers"]
    assert results["target_loss"] == pytest.approx(4.2)  # the worst seed's
    assert b["to_target"] == pytest.approx(
        {"reached": 2, "asked": 2, "at_most": False, "tokens": 760, "steps": 76, "seconds": 228}
    )
    assert a["to_target"]["tokens"] == pytest.approx((950 + 1000) / 2)
    assert (a["step_seconds"], b["step_seconds"], a["state_bytes"]) == (1.0, 3.0, 1_500_000)


def test_what_is_reached_before_the_first_evaluation_is_a_bound():
    """The first evaluation is at 200 of 1,000 tokens; a is below b's final loss there already, so 0.20 is no estimate."""
    groups = {"a": seeds("a", [1.0, 1.1], start=2.0), "b": seeds("b", [4.0, 4.2])}
    results = results_of(groups)
    assert results["pairs"][0]["reach"] | {"at_most": True, "tokens": 0.2} == results["pairs"][0]["reach"]
    said = "it reaches b's final loss with at least 80 % fewer tokens and at least 80 % less time."
    assert said in results["sentences"][0]
    assert [row["to_target"]["at_most"] for row in results["optimizers"]] == [True, False]
    assert ">≤ 200</td>" in render(results)


def test_tokens_to_a_loss_by_hand():
    """From 8 to 4 in 1,000 tokens: 5 is reached at 750, and 4.5 by a run that is cut at 800 tokens never."""
    run = make_run("a", 1, 4.0)
    assert reaches(run.losses(), 5.0) == pytest.approx(750)
    assert reaches(upto(run.losses(), 800), 4.5) is None
    assert reaches([(0, 4.0), (10, 5.0), (20, 3.0)], 4.0) == 0  # the first time counts, not the last
    assert reaches([(10, 4.0), (20, 4.0), (30, 4.0)], 4.0) == 10


def test_crossings_and_thinning():
    curve = [(0, 5.0), (10, 4.0), (20, 4.5), (30, 3.0)]
    assert reaches(curve, 4.5) == 5 and reaches(curve, 3.75) == 25 and reaches(curve, 2.0) is None and reaches(curve, 6) == 0
    assert upto(curve, 15) == [(0, 5.0), (10, 4.0), (15, 4.25)] and upto(curve, 40) == curve and upto(curve, 10) == curve[:2]
    assert thinned(range(5000), 100)[0] == 0 and thinned(range(5000), 100)[-1] == 4999 and len(thinned(range(5000), 100)) == 100


def test_labels_tell_settings_apart():
    runs = [make_run("", 1, 4.0), make_run("", 1, 4.0), make_run("", 1, 4.0, name="muon")]
    with pytest.raises(ConfigError, match="are both adamw with seed 1"):
        label_runs(runs)
    runs[1].config.optimizer.lr = 2e-3
    label_runs(runs)
    assert [run.label for run in runs] == ["adamw (lr 0.001)", "adamw (lr 0.002)", "muon"]
    runs[1].config.optimizer.arguments = {"betas": [0.8, 0.9]}
    label_runs(runs)
    assert runs[1].label == "adamw (arguments.betas [0.8, 0.9], lr 0.002)"
    assert other_differences(runs) == []
    runs[2].config.train.batch_size = 64
    assert other_differences(runs)[0].startswith("The runs differ in train.batch_size (32, 64)")


def test_runs_of_different_models_batches_or_data_are_no_seeds_of_one_optimizer(tmp_path):
    """With equal seeds they are no two runs of one setting, either."""
    runs = [make_run("", seed, 4.0) for seed in (1, 2, 1, 2, 3)]
    runs[2].config.model.width = runs[3].config.model.width = 32
    runs[3].config.train.batch_size = 64
    runs[4].config.data.dir = str(tmp_path / "other")
    for run in runs:
        run.config.data.dir = run.config.data.dir or str(tmp_path / "text")
    label_runs(runs)
    sizes = ["", "", "model.width 32, ", "model.width 32, "]
    assert [run.label for run in runs[:4]] == [
        f"adamw (data set text, {width}train.batch_size {64 if run is runs[3] else 32})"
        for run, width in zip(runs, sizes, strict=False)
    ]
    assert runs[4].label == "adamw (data set other, train.batch_size 32)"
    for key in ("model.width (32, None)", "train.batch_size (32, 64)", "the data set (other, text)"):
        assert f"The runs differ in {key}: their losses differ for that reason too." in other_differences(runs)


def test_what_changes_no_loss_tells_no_runs_apart():
    runs = [make_run("", 1, 4.0), make_run("", 2, 4.1)]
    runs[0].config.train.tokens, runs[0].config.train.compile, runs[0].config.eval.every = 10, True, 7
    runs[0].config.train.max_bad_steps, runs[0].config.train.spike, runs[0].config.train.deterministic = 3, 0.0, True
    runs[0].config.model.gradient_checkpointing, runs[0].config.train.on_batch_change = "true", "allow"
    label_runs(runs)
    assert [run.label for run in runs] == ["adamw", "adamw"] and other_differences(runs) == []


EVIL = "</script><script>alert(1)</script>&\"'{{data}}"


def test_the_page_is_one_file_and_holds_no_foreign_markup(tmp_path):
    groups = {EVIL: seeds(EVIL, [4.0, 4.1, 4.2]), "b": seeds("b", [3.0, 3.1, 3.2])}
    searches = {label: search_of({1e-3: 4.0, 2e-3: 3.9, 4e-3: float("inf")}, [EVIL]) for label in groups}
    results = summarize(groups, searches, ABOUT | {"title": EVIL, "command": EVIL, "method": [EVIL]})
    page = write_report(tmp_path, results).read_text()
    assert page.count("<script") == page.count("</script>") == 2 and "alert(1)</script" not in page
    assert "{{" not in page.replace("{{data}}", "")
    assert "uPlot (v1.6.32)" in page and "Copyright (c) 2022 Leon Sorokin" in page  # its licence goes with it
    own = page.replace("/*! https://github.com/leeoniya/uPlot (v1.6.32) */", "")
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)|@import|url\(", own)
    embedded = re.search(r'<script type="application/json" id="results">(.*?)</script>', page, re.S)[1]
    drawn = json.loads(embedded)
    assert drawn["title"] == EVIL and drawn["runs"][0]["validation"]["val_loss"][-1] == 4.0
    assert json.loads((tmp_path / "results.json").read_text())["runs"][0]["config"].startswith("run:")
    for name in ("report.png", "details.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert "b has a lower loss than" in page and "Its optimizer" not in page


def test_the_script_needs_nothing_that_the_page_lacks():
    """Every element that the script asks for by id is on the page."""
    page = render(results_of({"a": seeds("a", [4.0])}, {"a": search_of({1e-3: 4.0})}))
    for name in set(re.findall(r'(?:getElementById|control)\("([\w-]+)"(?!\)\?)', page)):
        assert f'id="{name}"' in page, name


def test_many_optimizers_few_runs_and_holes(tmp_path):
    """More optimizers than colors, names that are long, a run that diverged, numbers that are missing."""
    groups = {f"library.optimizers.Name{i}{{arguments: {{betas: [0.9, 0.9{i}]}}}}": [] for i in range(10)}
    for i, label in enumerate(groups):
        groups[label] += seeds(label, [4.0 + i / 10])
    label = list(groups)[3]
    groups[label].append(make_run(label, 2, 1e9, status="diverged"))
    for record in groups[label][0].training[2:5]:
        record["grad_norm"] = None
    results = summarize(groups, {}, ABOUT)
    looks = [tuple(map(str, style(label, list(groups)).values())) for label in groups]
    assert len(set(looks)) == 10
    page = write_report(tmp_path, results).read_text()
    assert page.count('class="mean"') == 9 + 1 and "1 diverged" in page
    alone = write_report(tmp_path / "alone", results_of({"a": seeds("a", [4.0])})).read_text()
    assert '<i class="mean" style="left:50.0%">' in alone and "<h2>Differences" not in alone
    none = results_of({"a": [make_run("a", 1, 9.0, status="diverged")]})
    assert "<h2>Cost" not in write_report(tmp_path / "none", none).read_text()


def test_the_picture_has_the_colors_of_the_page():
    css = (Path(report.__file__).parent / "page.css").read_text().partition("@media")[0]
    assert tuple(re.findall(r"--c\d: (#\w{6})", css)) == COLORS


def test_a_pair_and_a_table_say_the_same():
    """± is half a confidence interval in both; the standard deviation stands by itself."""
    results = results_of({"a": seeds("a", [4.0, 4.2, 4.4]), "b": seeds("b", [3.0, 3.2, 3.4])})
    loss, page = results["optimizers"][0]["loss"], render(results)
    assert loss["sd"] == pytest.approx(0.2) and loss["half"] == pytest.approx(4.302653 * 0.2 / 3**0.5)
    assert f"<td>4.2000</td>\n<td>± {loss['half']:.4f}</td>\n<td>0.2000</td>" in page
    assert page.count("± stands") + page.count("±\nstands") == 1


def test_what_older_versions_wrote_is_drawn(tmp_path):
    """results.json without `at_most`, commands of the search and configurations, and with every curve that was logged."""
    results = results_of({"a": seeds("a", [4.0, 4.2]), "b": seeds("b", [3.0, 3.2])}, {"a": search_of({1e-3: 4.0})})
    for row in results["optimizers"]:
        del row["to_target"]["at_most"]
    for run in results["runs"]:
        del run["config"], run["command"]
        run["training"]["optimizer_seconds"] = [0.1] * len(run["training"]["step"])
    del results["pairs"][0]["reach"]["at_most"]
    (tmp_path / "old.json").write_text(json.dumps(results, indent=1))
    assert compare.main(["--results", str(tmp_path / "old.json"), "--out", str(tmp_path / "out")]) == 0
    assert "Every run behind" not in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == json.loads(json.dumps(results))


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's script here")
def test_the_script_counts_as_python_does(tmp_path):
    """`crossing` is `reaches`; ticks are named with one unit and as many decimals as they need; a flat curve has a range."""
    source = "".join((Path(report.__file__).parent / name).read_text() for name in ("chart.js", "page.js"))
    names = ("unitOf", "short", "tickNames", "logTicks", "padded", "crossing", "cell")
    functions = [re.search(rf"^function {name}\(.*?^}}$", source, re.M | re.S)[0] for name in names]
    curve = [(10, 5.0), (20, 4.0), (30, 4.5), (40, 3.0)]
    xs, ys = map(list, zip(*curve, strict=True))
    targets = [6, 5, 4.25, 3.75, 2]
    asked = [f"{targets}.map((t) => crossing({xs}, {ys}, t))"]
    ticks = ["0, 2e5, 4e5, 6e5, 8e5, 1e6", "4.5, 5, 5.5, 6", "...logTicks(1e-4, 0.1, 6)", "4, 5, 6"]
    ticks += ["0, 0.5e-4, 1e-4, 1.5e-4, 2e-4", "...logTicks(0.9e4, 2.3e4, 6)", "...logTicks(4.1, 4.3, 6)"]
    asked += [f"tickNames([{values}])" for values in ticks]
    asked += ["""['=1+1', '-0.5', 'a,b', 'say "x"', 3].map(cell)"""]
    asked += ["padded([1e-3 - 1e-19, 1e-3], 0.05, false)", "padded([2, 2], 0.05, true)", "padded([1, 2], 0.5, false)"]
    (tmp_path / "script.js").write_text("\n".join([*functions, f"console.log(JSON.stringify([{', '.join(asked)}]))"]))
    said = subprocess.run(["node", str(tmp_path / "script.js")], capture_output=True, text=True, check=True).stdout
    crossings, *names, cells, flat, flat_log, usual = json.loads(said)
    assert cells == ["'=1+1", "-0.5", '"a,b"', '"say ""x"""', "3"]
    assert crossings == [reaches(curve, target) for target in targets]
    assert names[0] == ["0", "0.2M", "0.4M", "0.6M", "0.8M", "1.0M"]
    assert names[1] == ["4.5", "5.0", "5.5", "6.0"]
    assert names[2] == ["1e−4", "0.001", "0.01", "0.1"]
    assert names[3] == ["4", "5", "6"]
    assert names[4] == ["0", "0.5e−4", "1.0e−4", "1.5e−4", "2.0e−4"]
    assert names[5] == ["9k", "10k", "15k", "20k"]
    assert names[6] == ["4.10", "4.15", "4.20", "4.25", "4.30"]
    assert flat == pytest.approx([0.95e-3, 1.05e-3]) and flat_log == pytest.approx([2 / 1.1, 2.2]) and usual == [0.5, 2.5]


def test_the_committed_comparison_is_what_the_documents_say():
    root = Path(report.__file__).parents[2]
    results = json.loads((root / "docs" / "compare.json").read_text())
    paths = (root / "README.md", *sorted((root / "docs").glob("*.md")))
    documents = " ".join(" ".join(path.read_text() for path in paths).split())  # wherever their lines end
    for text in results["sentences"]:
        if text.startswith(("celo2 has a lower loss than muon", "celo2 has a lower loss than adamw")):
            assert text in documents
    for row in results["optimizers"]:
        loss = row["loss"]
        assert f"| {row['label']} | {loss['mean']:.3f} | {loss['sd']:.3f} | {loss['n']} | {row['lr']:g} |" in documents
    assert all(pair["claim"] == (pair["p_corrected"] < 0.05) for pair in results["pairs"])
    assert render(results).count("<h2>") == 6


def leaves(tree, path=()):
    """The places of all values in a tree of JSON, of a list that of its first entry."""
    if isinstance(tree, dict):
        return [found for key, value in tree.items() for found in leaves(value, (*path, key))]
    return leaves(tree[0], (*path, 0)) if isinstance(tree, list) and tree else [path]


def test_no_value_of_a_results_file_becomes_markup():
    """A results.json from somebody else may hold text wherever a number or a word should be."""
    groups = {"a": seeds("a", [4.0, 4.2], steps=20), "b": seeds("b", [3.0, 3.1], steps=20)}
    searches = {label: search_of({1e-3: 4.0}, ["one"]) for label in groups}
    text = report.to_json(summarize(groups, searches, ABOUT))
    drawn = []
    for path in leaves(json.loads(text)):
        results = at = json.loads(text)
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = "<img src=x onerror=alert(1)></script>"
        try:
            page = render(results)
        except (ValueError, LookupError, TypeError, AttributeError, TemplateError):
            continue  # python -m launch.compare says in one line that it is not a results.json
        drawn.append(path)
        assert "<img" not in page and page.count("<script") == page.count("</script>") == 2, path
    assert {("title",), ("runs", 0, "seed"), ("pairs", 0, "n"), ("optimizers", 0, "loss", "n")} <= set(drawn)


def test_the_page_runs_its_own_script_alone():
    """Its policy names the script by hash, and allows nothing from elsewhere."""
    page = render(results_of({"a": seeds("a", [4.0, 4.2])}))
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="(.*?)">', page)[1]
    script = re.search(r"<script>(.*?)</script>", page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_further_evaluations_are_in_the_report(tmp_path):
    """Sets, tasks and averages: a table of the last ones, a chart of those that are no other form of a loss."""
    groups = {"adamw": seeds("adamw", [3.0, 3.2]), "muon": seeds("muon", [2.9, 3.0])}
    for n, run in enumerate(groups["adamw"]):
        run.validation[-1] |= {"val_perplexity": 20.0, "val_loss/code": 2.0 + n, "average/task/arc/accuracy": 0.25}
    results = results_of(groups)
    found = {row["key"]: row["optimizers"] for row in results["evaluations"]}
    assert found["val_loss/code"] == {"adamw": {"mean": 2.5, "sd": pytest.approx(0.7071, abs=1e-4), "n": 2}}
    assert found["average/task/arc/accuracy"]["adamw"]["mean"] == 0.25
    columns = set(results["runs"][0]["validation"])
    assert columns == {"step", "tokens", "seconds", "val_loss", "val_loss/code", "average/task/arc/accuracy"}
    page = render(json.loads(to_json(results)))
    assert "val_loss/code" in page and "2.5000 (SD 0.7071)" in page
    assert "Other evaluations" not in render({key: value for key, value in results.items() if key != "evaluations"})
