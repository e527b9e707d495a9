"""What a report says, from runs whose curves are known."""

import json
import re
from pathlib import Path

import pytest

from configs.load import ConfigError
from configs.schema import Config
from launch.compare.curves import Run, label_runs, other_differences, reaches, thinned, upto
from launch.compare.report import render, write_report
from launch.compare.search import Search
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
    run = Run(label, Path(f"runs/{label}_{seed}"), config, "python train.py", training, validation, status, 6.0, 1_500_000)
    run.clock = [(0.0, 0.0)] + [(r["tokens"], r["seconds"]) for r in training]
    return run


def results_of(groups, searches=None):
    return summarize(groups, searches or {}, ABOUT)


def seeds(label, finals, **options):
    return [make_run(label, seed, final, **options) for seed, final in enumerate(finals, 1)]


def test_a_difference_outside_the_noise_is_a_claim():
    results = results_of({"adamw": seeds("adamw", [4.0, 4.2, 4.4]), "celo2": seeds("celo2", [3.9, 4.1, 4.301], seconds=2.0)})
    (said,) = results["sentences"]
    pattern = (
        r"celo2 is lower than adamw by 0\.100 ± 0\.001 \(3 seeds, p < 0\.001\); it reaches adamw's final loss with (.*) of its"
    )
    assert re.match(pattern, said)
    # From 8, 4.0 is reached at 4/4.1 of the way to 3.9, and so on seed by seed; a step takes twice the time.
    assert "with 0.97 of its tokens and 1.95 of its time." in said
    pair = results["pairs"][0]
    assert pair["claim"] and pair["paired"] and pair["reach"]["reached"] == 3
    assert pair["reach"]["tokens"] == pytest.approx((4 / 4.1 + 3.8 / 3.9 + 3.6 / 3.699) / 3)
    assert results["compared_at_tokens"] == 1000


def test_a_difference_inside_the_noise_is_none():
    results = results_of({"a": seeds("a", [4.0, 4.3, 4.1]), "b": seeds("b", [4.1, 4.2, 4.2])})
    assert results["sentences"] == ["a and b: no difference beyond the noise (−0.033 ± 0.287, 3 seeds, p = 0.67)."]
    assert not results["pairs"][0]["claim"]


def test_a_pair_that_only_the_correction_rejects():
    """p = 0.03 alone would be a claim; among three pairs, of which it is the best, it is none."""
    groups = {"a": seeds("a", [4.00, 4.00, 4.00]), "b": seeds("b", [4.04, 4.05, 4.07]), "c": seeds("c", [3.9, 4.3, 4.0])}
    pair = next(p for p in results_of(groups)["pairs"] if {p["a"], p["b"]} == {"a", "b"})
    assert pair["p"] < 0.05 < pair["p_corrected"] and not pair["claim"]


def test_one_seed_claims_nothing():
    (said,) = results_of({"a": seeds("a", [3.0]), "b": seeds("b", [4.0])})["sentences"]
    assert said == "a and b: one seed tells no difference from noise, so nothing is claimed (measured −1.000)."


def test_divergence_is_counted_and_not_compared():
    bad = [*seeds("b", [4.0, 4.1]), make_run("b", 3, 9.0, status="diverged")]
    search = Search(losses={1e-3: float("inf"), 2e-3: float("inf")}, notes=["every learning rate that was tried diverged"])
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
    results = results_of({"a": [make_run("a", 1, 9.0, status="diverged")], "b": []}, {"b": Search()})
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
    assert results["sentences"][0].startswith("short is lower than long by 1.475")
    assert "different lengths: they are compared at 1,000 tokens" in results["caveats"][0]
    assert any("neither the time of an optimizer step" in text for text in results["caveats"])


def test_targets_and_costs():
    results = results_of({"a": seeds("a", [4.0, 4.2]), "b": seeds("b", [3.0, 3.0], seconds=3.0)})
    a, b = results["optimizers"]
    assert results["target_loss"] == pytest.approx(4.2)  # the worst seed's
    assert b["to_target"] == pytest.approx({"reached": 2, "asked": 2, "tokens": 760, "steps": 76, "seconds": 228})
    assert a["to_target"]["tokens"] == pytest.approx((950 + 1000) / 2)
    assert (a["step_seconds"], b["step_seconds"], a["state_bytes"]) == (1.0, 3.0, 1_500_000)


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


EVIL = "</script><script>alert(1)</script>&\"'{{data}}"


def test_the_page_is_one_file_and_holds_no_foreign_markup(tmp_path):
    groups = {EVIL: seeds(EVIL, [4.0, 4.1, 4.2]), "b": seeds("b", [3.0, 3.1, 3.2])}
    searches = {label: Search(losses={1e-3: 4.0, 2e-3: 3.9, 4e-3: float("inf")}, notes=[EVIL]) for label in groups}
    results = summarize(groups, searches, ABOUT | {"title": EVIL, "command": EVIL, "method": [EVIL]})
    page = write_report(tmp_path, results).read_text()
    assert page.count("<script") == page.count("</script>") == 2 and "alert(1)</script" not in page
    assert "{{" not in page.replace("{{data}}", "")
    assert not re.search(r"(src|href)=|https?://(?!www\.w3\.org/2000/svg)|@import|url\((?!#)", page.replace("url(#clip", ""))
    embedded = re.search(r'<script type="application/json" id="results">(.*?)</script>', page, re.S)[1]
    drawn = json.loads(embedded)
    assert drawn["title"] == EVIL and drawn["runs"][0]["validation"]["val_loss"][-1] == 4.0
    assert json.loads((tmp_path / "results.json").read_text())["runs"][0]["config"].startswith("run:")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "b is lower than" in page and "Its optimizer" not in page


def test_the_script_needs_nothing_that_the_page_lacks():
    """Every element that the script asks for by id is on the page."""
    page = render(results_of({"a": seeds("a", [4.0])}, {"a": Search(losses={1e-3: 4.0})}))
    for name in set(re.findall(r'(?:getElementById|control)\("([\w-]+)"', page)):
        assert f'id="{name}"' in page, name
