"""The evaluation of rules on tasks that they never saw: search, table, continuation, mistakes."""

import json
import math

import numpy as np
import pytest
import torch

from celo2.metatrain import evaluate
from celo2.metatrain.evaluate import Row
from celo2.metatrain.evaluation.picture import gains
from celo2.metatrain.evaluation.suite import TASKS, build_optimizers, content_of, digest_of, optimizer_of
from celo2.rule_files import load_rule, save_rule
from celo2.training.search import Key, open_sides


@pytest.mark.parametrize("best", [1e-4, 5e-4, 1.3e-3, 2e-3, 3e-3, 1e-2])
def test_search_brackets_the_best_learning_rate(best):
    """With a loss that is lowest at `best`: six trials, and the best of them within a factor of sqrt 2, or at an edge."""
    s = evaluate.searched((Key("lr", 2e-3),), 6, lambda setting: {0: abs(math.log(setting[0] / best))})
    assert s.trials == 6
    edges = open_sides(s.keys, s.tried)
    assert bool(edges) == (best in (1e-4,))
    assert edges or s.tried[s.chosen] <= math.log(2) / 2 + 1e-9


def next_lr(found, first):
    """The search that made the published tables, as it was written then."""
    for lr in (first, 2 * first, first / 2):
        if lr not in found:
            return lr
    lrs = sorted(found)
    place = lrs.index(min(lrs, key=found.__getitem__))
    if place == 0:
        return lrs[0] / 2
    if place == len(lrs) - 1:
        return lrs[-1] * 2
    wider = place if lrs[place + 1] / lrs[place] >= lrs[place] / lrs[place - 1] else place - 1
    return math.sqrt(lrs[wider] * lrs[wider + 1])


@pytest.mark.parametrize("first", [2e-3, 0.02])
def test_search_of_learning_rates_is_the_one_of_the_published_tables(first):
    """To the last bit, so that the commands beside the tables print them."""
    for best in first * np.exp(np.linspace(-5, 5, 60)):
        loss = lambda lr, best=best: abs(math.log(lr / best)) + (lr > 2 * best)  # noqa: E731
        found: dict[float, float] = {}
        while len(found) < 9:
            lr = next_lr(found, first)
            found[lr] = loss(lr)
        s = evaluate.searched((Key("lr", first),), 9, lambda setting, loss=loss: {0: loss(setting[0])})
        assert {lr for (lr,) in s.tried} == set(found)


def test_search_survives_divergence():
    """Everything above the smallest learning rate diverges: the search goes down."""
    s = evaluate.searched((Key("lr", 2e-3),), 6, lambda setting: {0: 1.0 if setting[0] < 6e-4 else math.inf})
    assert min(s.tried)[0] == 2e-3 / 16


def row(task, optimizer, losses, lr=1e-3, edges=()):
    return Row(task, optimizer, {"lr": lr}, edges, dict(enumerate(losses)), {})


def test_table_pairs_by_seed():
    rows = [row("gpt", "hand-momentum", [2.0, 3.0], 2e-3), row("gpt", "celo2", [1.9, 2.9], edges=("lr",))]
    lines = evaluate.table(rows, 400).splitlines()
    assert lines[2] == "| gpt | hand-momentum | 0.002 | 2.5000 (0.7071) |  | 2 |"
    assert lines[3] == "| gpt | celo2 | 0.001 (edge) | 2.4000 (0.7071) | -0.1000 (0.0000) | 2 |"


def test_every_pair_on_a_task_is_tested():
    """Differences of 0.1, 0.2 and 0.3: mean 0.2, SD 0.1, t = 2 sqrt 3 with two degrees of freedom, so p = 0.074."""
    rows = [row(task, "a", [2.1, 3.2, 4.3]) for task in ("gpt", "vit")]
    rows += [row("gpt", "b", [2.0, 3.0, 4.0]), row("vit", "c", [2.0, 3.0, math.inf]), row("gpt", "d", [1.0, 2.0, 3.1])]
    _, _, gpt, _, _, vit, *_ = evaluate.pairs(rows).splitlines()
    assert gpt == "| gpt | a minus b | +0.2000 (0.1000) | ± 0.2484 | 0.074 | 0.074 | 3 |"  # the worst of three: uncorrected
    assert vit == "| vit | a minus c | -inf (nan) |  |  |  | 3 |"


@pytest.mark.parametrize(("option", "default", "other"), [("final", 0.1, 0), ("validation_batches", 16, 2)])
def test_evaluation_with_another_end(option, default, other, tmp_path, capsys):
    """Runs of their own; lines from before the option are those of the default."""
    (tmp_path / "text.txt").write_bytes(bytes(np.random.default_rng(0).integers(97, 105, 12_000, np.uint8)))
    out = tmp_path / "runs.jsonl"
    arguments = ["--tasks", "gpt-tiny", "--text", str(tmp_path / "text.txt"), "--steps", "3", "--trials", "1", "--seeds", "1"]
    arguments += ["--baselines", "hand-momentum", "--out", str(out)]
    assert evaluate.main(arguments) == 0
    table = capsys.readouterr().out
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {record.pop(option) for record in records} == {default}
    out.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert evaluate.main(arguments) == 0
    assert capsys.readouterr().out == table and len(out.read_text().splitlines()) == 1
    assert evaluate.main([*arguments, f"--{option.replace('_', '-')}", str(other)]) == 0
    assert capsys.readouterr().out != table and len(out.read_text().splitlines()) == 2


def test_evaluation_at_a_given_rate(tmp_path, capsys):
    """`--lr` with one trial trains every optimizer at that rate, without a search; with three it is the middle one."""
    (tmp_path / "text.txt").write_bytes(bytes(np.random.default_rng(0).integers(97, 105, 12_000, np.uint8)))
    for trials, expected in (("1", {0.005}), ("3", {0.0025, 0.005, 0.01})):
        out = tmp_path / f"{trials}.jsonl"
        arguments = ["--tasks", "gpt-tiny", "--text", str(tmp_path / "text.txt"), "--steps", "2", "--trials", trials]
        arguments += ["--seeds", "1", "--lr", "0.005", "--baselines", "hand-momentum,muon", "--out", str(out)]
        assert evaluate.main(arguments) == 0
        records = [json.loads(line) for line in out.read_text().splitlines()]
        for name in ("hand-momentum", "muon"):
            assert {record["lr"] for record in records if record["optimizer"] == name} == expected
        assert {record["seed"] for record in records} == ({1} if trials == "1" else {0, 1})
        assert "0.005 (edge)" not in capsys.readouterr().out


def test_evaluation_table_and_continuation(tmp_path, capsys):
    """Two optimizers on a language model and an image task; the second command runs nothing again."""
    (tmp_path / "text.txt").write_bytes(bytes(np.random.default_rng(0).integers(97, 105, 12_000, np.uint8)))
    out = tmp_path / "runs.jsonl"
    arguments = ["hand-momentum", "--tasks", "gpt-tiny,autoencoder", "--text", str(tmp_path / "text.txt"), "--steps", "3"]
    arguments += ["--search-steps", "2", "--seeds", "2", "--baselines", "adamw", "--out", str(out)]
    assert evaluate.main(arguments) == 0
    table = capsys.readouterr().out
    losses, pairs = table.split("\n\n", 1)
    assert losses.count("| gpt-tiny | ") == 2 and losses.count("| autoencoder | hand-momentum |") == 1
    assert pairs.count("| adamw minus hand-momentum |") == 2
    lines = out.read_text()
    records = [json.loads(line) for line in lines.splitlines()]
    assert len(records) == 2 * 2 * (6 + 2)
    assert all(0 < record["loss"] < 10 for record in records)
    assert evaluate.main([*arguments, "--picture", str(tmp_path / "gain.png")]) == 0
    assert capsys.readouterr().out == table and out.read_text() == lines
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")


def test_gains_pair_by_seed():
    """A seed that diverged, which has a shorter curve, and one that the reference lacks do not count."""
    found = gains({0: [1.0, 2.0], 1: [3.0], 2: [1.0, 1.0], 3: [1.0, 1.0]}, {0: [1.5, 2.0], 1: [3.0, 3.0], 3: [0.0, 3.0]})
    assert found.tolist() == [[0.5, 0.0], [-1.0, 2.0]]


def test_evaluation_in_bfloat16(tmp_path, capsys):
    """Runs of their own, which differ from those in float32 by rounding."""
    (tmp_path / "text.txt").write_bytes(bytes(np.random.default_rng(0).integers(97, 105, 12_000, np.uint8)))
    arguments = ["hand-momentum", "--tasks", "gpt-tiny", "--text", str(tmp_path / "text.txt"), "--steps", "3", "--trials", "1"]
    arguments += ["--seeds", "1", "--baselines", "muon", "--out", str(tmp_path / "runs.jsonl")]
    assert evaluate.main(arguments) == evaluate.main([*arguments, "--precision", "bf16"]) == 0
    full, low = np.array_split([json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()], 2)
    for a, b in zip(full, low, strict=True):
        assert (a["optimizer"], a["seed"], a["precision"], b["precision"]) == (b["optimizer"], b["seed"], "fp32", "bf16")
        assert 0 < abs(a["loss"] - b["loss"]) < 0.01  # worst measured 0.001
    capsys.readouterr()


def test_evaluation_with_another_adamw_lr(tmp_path, capsys):
    """Runs of their own; without it the table is as it was before."""
    (tmp_path / "text.txt").write_bytes(bytes(np.random.default_rng(0).integers(97, 105, 12_000, np.uint8)))
    arguments = ["--tasks", "gpt-tiny", "--text", str(tmp_path / "text.txt"), "--steps", "3", "--trials", "1", "--seeds", "1"]
    arguments += ["--baselines", "hand-momentum", "--out", str(tmp_path / "runs.jsonl")]
    tables = []
    for more in ([], ["--adamw-lr", "0.03"], []):
        assert evaluate.main([*arguments, *more]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[2] != tables[1]
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(record["adamw_lr"], record["lr"]) for record in records] == [(0.003, 0.002), (0.03, 0.002)]
    rule, adamw = build_optimizers(optimizer_of("hand-momentum"), TASKS["gpt-tiny"].build(), 1e-3, 0.5)
    assert [group["lr"] for group in rule.param_groups + adamw.param_groups] == [1e-3, 0.5]


def test_weight_decay_of_each_optimizer(tmp_path, capsys):
    """Muon's learning rates are ten times those of a rule, and so its decay is smaller; one for all where the caller says so."""
    (tmp_path / "text.txt").write_bytes(bytes(np.random.default_rng(0).integers(97, 105, 12_000, np.uint8)))
    arguments = ["--tasks", "gpt-tiny", "--text", str(tmp_path / "text.txt"), "--steps", "2", "--trials", "1", "--seeds", "1"]
    arguments += ["--baselines", "muon,hand-nesterov", "--out", str(tmp_path / "runs.jsonl")]
    for more in ([], ["--weight-decay", "0.2"], ["--weight-decay", "0.2,muon=0", "--lr", "muon=0.5"]):
        assert evaluate.main([*arguments, *more]) == 0
    table = capsys.readouterr().out
    assert table.count("| gpt-tiny | muon | 0.02 | 0.03 |") == table.count("| gpt-tiny | hand-nesterov | 0.002 | 0.1 |") == 1
    records = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    found = [(record["weight_decay"], record["lr"]) for record in records]  # of muon and hand-nesterov, in turns
    assert found == [(0.03, 0.02), (0.1, 0.002), (0.2, 0.02), (0.2, 0.002), (0, 0.5)]  # the last of hand-nesterov is known


def test_search_with_several_seeds(tmp_path, capsys):
    """Every learning rate of the search with each of its seeds; the one of the lowest mean, with other seeds."""
    (tmp_path / "text.txt").write_bytes(bytes(np.random.default_rng(0).integers(97, 105, 12_000, np.uint8)))
    arguments = ["--tasks", "gpt-tiny", "--text", str(tmp_path / "text.txt"), "--steps", "3", "--trials", "3", "--seeds", "1"]
    arguments += ["--search-seeds", "2", "--baselines", "hand-momentum", "--out", str(tmp_path / "runs.jsonl")]
    assert evaluate.main(arguments) == 0
    capsys.readouterr()
    *search, last = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert [(r["lr"], r["seed"]) for r in search] == [(lr, seed) for lr in (1e-3, 2e-3, 4e-3) for seed in (0, 1)]
    means = {a["lr"]: a["loss"] + b["loss"] for a, b in zip(search[::2], search[1::2], strict=True)}
    assert (last["lr"], last["seed"]) == (min(means, key=means.__getitem__), 2)


def test_runs_are_known_by_what_rule_and_text_hold(tmp_path, capsys):
    """A joint search; then the same rule and text under other names run nothing, another rule under the old name all of it."""
    text = bytes(np.random.default_rng(0).integers(97, 105, 12_000, np.uint8))
    (tmp_path / "a.txt").write_bytes(text)
    (tmp_path / "b.txt").write_bytes(text)
    save_rule(load_rule("celo2"), tmp_path / "mine.safetensors")
    save_rule(load_rule("celo2"), tmp_path / "copy.safetensors")
    out = tmp_path / "runs.jsonl"

    def start(rule, name):
        words = [str(tmp_path / rule), "--tasks", "gpt-tiny", "--text", str(tmp_path / name), "--steps", "2", "--trials", "5"]
        words += ["--search", "weight_decay,lr", "--seeds", "1", "--baselines", "", "--out", str(out)]
        assert evaluate.main(words) == 0
        capsys.readouterr()
        return out.read_text().splitlines()

    lines = start("mine.safetensors", "a.txt")
    records = [json.loads(line) for line in lines]
    assert len(records) == 5 + 1 and len({r["lr"] for r in records}) >= 3 and len({r["weight_decay"] for r in records}) >= 2
    out.write_text("\n".join(lines) + '\n{"task": "gp')  # as a kill leaves it
    assert start("copy.safetensors", "b.txt") == lines
    save_rule(load_rule("hand-nesterov"), tmp_path / "mine.safetensors")
    assert len(start("mine.safetensors", "a.txt")) == 12
    out.write_text("these are notes")
    assert evaluate.main(["--tasks", "gpt-tiny", "--text", str(tmp_path / "a.txt"), "--out", str(out)]) == 2
    assert "not a file of training runs" in capsys.readouterr().err and out.read_text() == "these are notes"
    for wrong in ({"loss": None}, {"loss": "low"}, {"curve": 3}, {"curve": [None]}):
        out.write_text(damaged := json.dumps(records[0] | wrong) + "\n")
        assert evaluate.main(["--tasks", "gpt-tiny", "--text", str(tmp_path / "a.txt"), "--out", str(out)]) == 2
        assert "expected an object with a loss and a curve" in capsys.readouterr().err and out.read_text() == damaged
    assert content_of("adamw") is None and content_of(load_rule("celo2")) != content_of(load_rule("celo2-lm"))
    assert digest_of(torch.zeros(3)) != digest_of(torch.ones(3))


def test_adamw_lr_is_no_key_of_a_rule_that_trains_every_parameter(tmp_path, capsys):
    """No trial is spent on it, no value shown; runs of earlier files, which name one, are known."""
    (tmp_path / "text.txt").write_bytes(bytes(np.random.default_rng(0).integers(97, 105, 12_000, np.uint8)))
    out = tmp_path / "runs.jsonl"
    words = ["celo2-base", "--baselines", "muon", "--tasks", "gpt-tiny", "--text", str(tmp_path / "text.txt"), "--steps", "2"]
    words += ["--trials", "4", "--search", "lr,adamw_lr", "--seeds", "1", "--out", str(out)]
    assert evaluate.main(words) == 0
    table = capsys.readouterr().out
    header, _, muon, base = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[:4])
    assert header[:5] == ["task (2 steps)", "optimizer", "lr", "weight_decay", "adamw_lr"]
    assert muon[4] and not base[4] and all(len(line) == len(header) for line in (muon, base))
    records = [json.loads(line) for line in out.read_text().splitlines()]
    of_base = [record for record in records if record["optimizer"] == "celo2-base"]
    assert len(of_base) == len(records) - len(of_base) == 4 + 1 and len({record["lr"] for record in of_base}) == 4
    assert all(("adamw_lr" in record) == (record["optimizer"] == "muon") for record in records)
    lines = [json.dumps({"adamw_lr": 0.003} | record) + "\n" for record in records]
    out.write_text("".join(lines))
    assert evaluate.main(words) == 0 and capsys.readouterr().out == table and out.read_text() == "".join(lines)
    assert evaluate.main([*words, "--search", "adamw_lr"]) == 2
    assert capsys.readouterr().err == (
        "error: --search adamw_lr: celo2-base does not use it, since it trains every parameter itself; add lr\n"
    )


def test_what_is_named_twice_is_compared_once(tmp_path, capsys):
    """As `hand-nesterov`, which is a baseline: no pair with itself, and Holm's correction is for one pair. One seed has no SD."""
    (tmp_path / "text.txt").write_bytes(bytes(np.random.default_rng(0).integers(97, 105, 12_000, np.uint8)))
    words = ["hand-nesterov", "--baselines", "muon,hand-nesterov,muon", "--tasks", "gpt-tiny,gpt-tiny", "--steps", "2"]
    words += ["--trials", "1", "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "runs.jsonl"), "--seeds"]
    assert evaluate.main([*words, "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("| gpt-tiny | muon ") == 2 and out.count("| gpt-tiny | hand-nesterov ") == 1 and "nan" not in out
    assert evaluate.main([*words, "3"]) == 0
    (pair,) = [line for line in capsys.readouterr().out.splitlines() if " minus " in line and "muon minus" in line]
    *_, p, corrected, _, _ = pair.split("|")
    assert p == corrected != "  "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no rule 'nothing'"),
        (["--tasks", "gtp"], "task 'gtp': expected one of"),
        ([], "need --text"),
        (["--text", "missing.txt"], "text missing.txt: cannot be read"),
        (["--seeds", "0"], "expected at least 1"),
        (["--search-steps", "0"], "expected at least 1"),
        (["--search-seeds", "0"], "expected at least 1"),
        (["--out", "no/such/x.jsonl"], "--out no/such/x.jsonl: expected a file that can be written, in a folder that exists"),
        (["--out", "."], "--out .: expected a file that can be written"),
        (["--search", "lr,beta"], "--search lr,beta: expected one or more, without repetition, of lr, adamw_lr, weight_decay"),
        (["--search", "lr,lr"], "expected one or more, without repetition, of lr,"),
        (["--search", "lr,adamw_lr", "--adamw-lr", "0"], "a search of adamw_lr multiplies by factors; give a value above 0"),
        (["--adamw-lr", "nan"], "--adamw-lr nan: expected at least 0"),
        (["--validation-batches", "0"], "--validation-batches 0: expected at least 1"),
        (["--lr", "0"], "--lr 0: expected a number above 0"),
        (["--lr", "fast"], "--lr fast: expected a number of at least 0, or OPTIMIZER=NUMBER"),
        (["--lr", ","], "--lr ,: expected a number of at least 0, or OPTIMIZER=NUMBER"),
        (["--weight-decay", "0.1,"], "--weight-decay 0.1,: expected a number of at least 0, or OPTIMIZER=NUMBER"),
        (["--lr", "=3"], "--lr =3: unknown optimizer '', expected one of adamw, muon,"),
        (["--lr", "0.1,0.2"], "--lr 0.1,0.2: two numbers for all"),
        (["--lr", "0.1,moun=0.2"], "--lr moun=0.2: unknown optimizer 'moun', expected one of adamw, muon,"),
        (["--weight-decay", "-1"], "--weight-decay -1: expected a number of at least 0"),
        (
            ["--search", "weight_decay", "--weight-decay", "0"],
            "a search of weight_decay multiplies by factors; give a value above 0",
        ),
        (["--final", "1.5"], "--final 1.5: expected 0 to 1"),
        (["--picture", "missing/gain.png"], "expected a name that ends in .png, in a folder that exists"),
        (["--device", "tpu"], "--device tpu: expected cpu, or cuda on a machine with a GPU"),
    ],
)
def test_evaluation_mistakes(arguments, message, capsys):
    assert evaluate.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "hand-momentum", "adam-orthogonalized", "celo2-base"])
@pytest.mark.parametrize("task", sorted(set(TASKS) - {"gpt", "gpt-wide"}))
def test_every_parameter_of_every_network_is_trained_once(task, optimizer):
    network = TASKS[task].build()
    parts = build_optimizers(optimizer_of(optimizer), network, 1e-3)
    claimed = [id(p) for part in parts for group in part.param_groups for p in group["params"]]
    assert sorted(claimed) == sorted(id(p) for p in network.parameters())
    if optimizer == "hand-momentum":
        assert sum(p.ndim == 2 for p in parts[0].param_groups[0]["params"]) >= 2
