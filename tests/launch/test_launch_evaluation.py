"""Validation sets by name, multiple choice, and both on several processes; docs/evaluation.md."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.load import ConfigError
from data.prepare import prepare
from data.tokenizer import byte_tokenizer
from launch.run.multiple_choice import MultipleChoice, parse
from launch.run.scoring import Row, passes_of, row
from models import CausalLMLoss, build_model

ROOT = Path(__file__).parents[2]
END = 256
QUESTIONS = [
    {"question": "Pretrain a language model with a learned", "choices": ["optimizer.", "zzz", "??"], "answer": 0},
    {"question": "every option with its ", "choices": ["QQQQQQ", "default"], "answer": 1},
    {"question": "", "choices": ["torchrun", "XQXQXQXQXQXQXQXQXQXQXQXQXQ"], "answer": 0},
    {"question": "one page, read from top to\n", "choices": ["@@@@", "bottom."], "answer": 1},
    {
        "question": "a question that is much longer than the context of the model, which sees its end",
        "choices": ["a", "%%"],
        "answer": 0,
    },
]


def write(path, questions):
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    return path


@pytest.fixture
def others(prepared, tmp_path_factory):
    """A folder of other text with the same tokenizer, and one of another tokenizer."""
    folder = prepared.parent / "others"
    if not folder.exists():
        folder.mkdir()
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": "UPPER CASE " * n}) + "\n" for n in range(3, 30)))
        prepare(str(folder / "text.jsonl"), folder / "upper", tokenizer=str(prepared), val_fraction=0.3, workers=1)
        prepare(str(folder / "text.jsonl"), folder / "whole", tokenizer=str(prepared), val_fraction=0, workers=1)
        prepare(str(folder / "text.jsonl"), folder / "bpe", tokenizer="bpe", vocab_size=257, val_fraction=0.3, workers=1)
    return folder


def evaluations(records):
    return [record for record in records if "val_loss" in record]


def test_sets_and_tasks_beside_the_main_set(run, prepared, others, capsys):
    from launch.evaluate import main as evaluate

    own = ["log.sample_tokens=0", "train.steps=2", "eval.every=1", "checkpoint.every=0"]
    _, plain, _ = run(*own, folder="plain")
    sets = f"eval.sets={{upper: {others / 'upper'}, 2024: {{dir: {prepared}, split: train}}}}"
    task = f"eval.tasks={{tiny: {write(run.tmp_path / 'tiny.jsonl', QUESTIONS)}}}"
    status, records, error = run(*own, sets, task, "eval.tasks_every=2", "log.trackers=[tensorboard]")
    assert status == 0, error
    known = ("step", "tokens", "val_loss", "val_perplexity", "val_bits_per_byte")
    assert [{key: r[key] for key in known} for r in evaluations(records)] == evaluations(plain)
    first, last = evaluations(records)
    names = [f"{key}/{name}" for key in known[2:] for name in ("upper", "2024")]
    assert set(first) == {*known, *names}
    assert set(last) == {*first, "task/tiny/accuracy", "task/tiny/accuracy_norm"}
    assert last["val_perplexity/upper"] == math.exp(last["val_loss/upper"])
    assert "upper: loss" in run.out and "task/tiny: accuracy 0." in run.out
    capsys.readouterr()
    for name, arguments in (("upper", [str(others / "upper")]), ("2024", [str(prepared), "--split", "train"])):
        assert evaluate([str(run.tmp_path / "run"), *arguments, "--sequences", "8"]) == 0
        assert f"loss {last[f'val_loss/{name}']:.4f}" in capsys.readouterr().out
    whole = others / "whole"
    for given, message in (
        (whole, f"{whole}: the split 'val' is empty; take its split train: --split train"),
        (whole / "index.json", f"{whole / 'index.json'}: a file, not a prepared folder; name the folder: {whole}"),
    ):
        assert evaluate([str(run.tmp_path / "run"), str(given)]) == 2
        assert capsys.readouterr().err == f"evaluate: {message}\n"
    assert evaluate([str(run.tmp_path / "run"), str(whole), "--split", "train", "--sequences", "2"]) == 0


def test_what_is_asked_of_a_finished_run_is_said_to_be_left_out(run, prepared, others):
    """`eval.sets` with the command that evaluates it, tasks without one; not what is the same, nor a run that goes on."""
    folder, sets = run.tmp_path / "run", [f"eval.sets={{old: {{dir: {prepared}, split: train}}}}", "train.steps=1"]
    finished = "the run is finished, and what is new in"
    assert run(*sets)[0] == 0
    assert run(*sets)[0] == 0 and finished not in run.out
    command = f"python -m launch.evaluate {folder} {others / 'upper'} --split val --sequences 8"
    new = f"eval.sets={{old: {{dir: {prepared}, split: train}}, new: {others / 'upper'}}}"
    _, records, _ = run(*sets, new)
    assert f"{finished} eval.sets is not evaluated; a set is evaluated by {command}\n" in run.out
    assert not any("val_loss/new" in record for record in records)
    tasks = f"eval.tasks={{tiny: {write(run.tmp_path / 'tiny.jsonl', QUESTIONS)}}}"
    assert run(*sets, tasks)[0] == 0 and f"{finished} eval.tasks is not evaluated\n" in run.out
    _, records, _ = run(*sets, new, "train.steps=2")
    assert finished not in run.out and any("val_loss/new" in record for record in records)


def test_scores_of_rows_are_those_of_the_logits():
    """Worst log-probability: 2e-6. The rows that are scored together depend on nothing but the rows."""
    torch.manual_seed(0)
    model = build_model(layers=1, width=32, heads=2, context=64, vocab_size=300)
    model.get_output_embeddings().weight.data.mul_(20)
    loss = CausalLMLoss(model).eval()
    rows = [row(list(range(n)), list(range(n, n + m)), 64) for n, m in ((3, 4), (20, 1), (1, 1), (60, 10))]
    assert len(rows[-1].tokens) == 65
    for chunked in (True, False):
        loss.chunked = chunked
        for numbers, length in passes_of(rows, 128):
            assert length == 64 and len(numbers) == 2
            inputs, targets = torch.full((2, length), 7), torch.full((2, length), -100)
            for i, n in enumerate(numbers):
                tokens, scored = rows[n]
                inputs[i, : len(tokens) - 1] = torch.from_numpy(tokens[:-1])
                targets[i, len(tokens) - 1 - scored : len(tokens) - 1] = torch.from_numpy(tokens[-scored:])
            with torch.no_grad():
                found = loss(inputs, targets, by_row=True)
                for i, n in enumerate(numbers):
                    tokens, scored = rows[n]
                    log_p = model(torch.from_numpy(tokens[None, :-1]).long()).logits[0, -scored:].log_softmax(-1)
                    wanted = torch.from_numpy(tokens[-scored:]).long()
                    expected = log_p.gather(1, wanted[:, None]).sum()
                    assert abs(found[i, 0] - expected) < 1e-4
                    assert found[i, 1] == (log_p.argmax(1) == wanted).all()
                    assert abs(loss(inputs[i : i + 1], targets[i : i + 1]) + expected) < 1e-4
    with pytest.raises(ValueError, match="65 tokens to score, the context has 64"):
        row([1], list(range(65)), 64)


def asked(scores):
    """A model that gives these log-probabilities."""
    return lambda rows: torch.tensor([[score, 0.0] for score in scores], dtype=torch.float64)[: len(rows)]


def test_accuracies_by_hand(tmp_path):
    """By the sum the first choice, by the length in characters the second; one that is not finite says nothing."""
    path = write(tmp_path / "t.jsonl", [{"question": "a", "choices": ["é", "long choice"], "answer": 1}] * 2)
    task = MultipleChoice("t", path, byte_tokenizer(), END, 32, None)
    assert task.questions[0].lengths == [1, 11]
    assert task(asked([-2.0, -3.0, -2.0, -1.0])) == {"task/t/accuracy": 0.5, "task/t/accuracy_norm": 1.0}
    assert all(map(math.isnan, task(asked([-2.0, math.nan, -2.0, -1.0])).values()))
    assert len(MultipleChoice("t", path, byte_tokenizer(), END, 32, 1).questions) == 1


@pytest.mark.parametrize(
    ("question", "choice", "tokens", "scored"),
    [
        ("ab", "cd", b"ab cd", 3),
        ("ab ", "cd", b"ab cd", 3),  # the white space belongs to the choice, as in lm-eval
        ("ab", " cd", b"ab cd", 3),
        ("ab\n", "cd", b"ab\ncd", 3),
        ("", "cd", [END, *b"cd"], 2),
    ],
)
def test_where_question_and_choice_meet(question, choice, tokens, scored):
    line = json.dumps({"question": question, "choices": [choice, "x"], "answer": 0})
    found: Row = parse(line, byte_tokenizer(), END, 32).rows[0]
    assert (found.tokens.tolist(), found.scored) == (list(tokens), scored)


GOOD = '{"question": "a", "choices": ["b", "c"], "answer": 0}\n'
BROKEN = {
    "{": "not JSON",
    "[1]": "it is no mapping",
    '{"question": "a", "choices": ["b", "c"]}': "it lacks 'answer'",
    '{"question": 3, "choices": ["b", "c"], "answer": 0}': "question is 3, expected a text",
    '{"question": "a", "choices": ["b"], "answer": 0}': "choices is not a list of two or more texts",
    '{"question": "a", "choices": "bc", "answer": 0}': "choices is not a list",
    '{"question": "a", "choices": ["b", null], "answer": 0}': "choice 1 is None, expected a text",
    '{"question": "a", "choices": ["b", ""], "answer": 0}': "choice 1 is empty",
    '{"question": "a", "choices": ["b", "c"], "answer": 2}': "answer is 2, expected the number of a choice, from 0 to 1",
    '{"question": "a", "choices": ["b", "c"], "answer": "A"}': "answer is 'A'",
    '{"question": "a", "choices": ["b", "c"], "answer": true}': "answer is True",
    '{"question": "a", "choices": ["b", "\\ud800"], "answer": 0}': "choice 1 holds half a character",
    json.dumps({"question": "a", "choices": ["b", "c" * 40], "answer": 0}): "tokens to score, the context has 32",
}


@pytest.mark.parametrize("line", BROKEN)
def test_a_broken_line_is_named_by_its_number(line, tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(GOOD + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        MultipleChoice("t", path, byte_tokenizer(), END, 32, None)
    assert f"eval.tasks.t: {path}, line 3: " in str(error.value) and BROKEN[line] in str(error.value)
    assert len(MultipleChoice("t", path, byte_tokenizer(), END, 32, 1).questions) == 1  # which is never reached


def test_a_choice_that_has_no_tokens(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tok = Tokenizer(models.BPE({"a": 0, "b": 1}, []))  # leaves out what it does not know
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"choice 1 \('zz'\): no token to score"):
        parse('{"question": "a", "choices": ["b", "zz"], "answer": 0}', tok, END, 32)


def test_bad_input_is_one_line(run, prepared, others):
    (run.tmp_path / "empty.jsonl").write_text("\n")
    (run.tmp_path / "latin.jsonl").write_bytes(b"\xff\xfe")
    (run.tmp_path / "broken.jsonl").write_text(GOOD + "{\n")
    for overrides, message in (
        (["eval.sets={new: nowhere}"], "eval.sets.new: nowhere: no such folder; prepare it first"),
        ([f"eval.sets={{new: {others / 'bpe'}}}"], f"has another tokenizer than {prepared}: prepare it with --tokenizer"),
        (
            [f"eval.sets={{z: {others / 'whole'}}}"],
            f"eval.sets.z: {others / 'whole'}: the split 'val' is empty; take its split train: {{dir: {others / 'whole'}, "
            "split: train}",
        ),
        ([f"eval.sets={{'a/b': {prepared}}}"], "eval.sets has the name 'a/b', expected letters"),
        ([f"eval.sets={{a: {{dir: {prepared}, part: 1}}}}"], "eval.sets.a has the unknown key 'part'; a set is FOLDER or"),
        ([f"eval.sets={{a: {{dir: {prepared}, split: test}}}}"], "eval.sets.a.split is 'test', expected train or val"),
        (["eval.sets={a: 3}"], "eval.sets.a is 3, expected a path"),
        (["eval.tasks={a: nothing.jsonl}"], "eval.tasks.a: nothing.jsonl cannot be read"),
        ([f"eval.tasks={{a: {run.tmp_path / 'empty.jsonl'}}}"], "holds no question; a line is {"),
        ([f"eval.tasks={{a: {run.tmp_path / 'latin.jsonl'}}}"], "cannot be read: 'utf-8' codec"),
        ([f"eval.tasks={{a: {run.tmp_path / 'broken.jsonl'}}}"], "broken.jsonl, line 2: not JSON"),
        (["eval.tasks={a: a.jsonl}", "eval.tasks_every=4"], "eval.tasks_every is 4, expected a multiple of eval.every 3"),
        (["eval.tasks_every=3"], "eval.tasks_every 3 is for eval.tasks and eval.lm_eval, and neither is set: leave it out"),
        (["eval.lm_eval_include=folder"], "eval.lm_eval_include folder is for eval.lm_eval, which is empty: leave it out"),
    ):
        status, _, error = run(*overrides, folder="bad")
        assert (status, error.count("\n")) == (2, 1) and message in error, (overrides, error)


def test_lm_eval_that_is_missing_is_one_line(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    status, _, error = run("eval.lm_eval=[hellaswag]", folder="bad")
    assert status == 2 and "eval.lm_eval needs lm-eval, which is not installed (pip install lm-eval)" in error
    status, _, error = run("eval.lm_eval=[hellaswag]", "eval.lm_eval_include=nowhere")
    assert status == 2 and error == "error: eval.lm_eval_include: nowhere is not a folder\n"


def test_the_task_that_ships():
    lines = (ROOT / "configs/tasks/python.jsonl").read_text(encoding="utf-8").splitlines()
    found = [parse(line, byte_tokenizer(), END, 256) for line in lines]
    assert len(found) == 20 and np.bincount([question.answer for question in found]).min() >= 5


@pytest.mark.slow  # two starts of several processes
@pytest.mark.parametrize("world", [2, 3])
def test_scores_are_exact_on_several_processes(world, run, prepared, others):
    """From one checkpoint, which is evaluated and not trained: scores to the bit, losses and averages to rounding."""
    from test_train_distributed import LAYOUTS, spawn

    folder = run.tmp_path
    assert run("train.average={kind: ema, decay: 0.5}", "eval.every=0", "train.steps=3", "train.batch_size=6")[0] == 0
    state = folder / "run" / "checkpoints" / "step_00000003"
    own = [f"eval.sets={{upper: {others / 'upper'}}}", f"eval.tasks={{tiny: {write(folder / 'tiny.jsonl', QUESTIONS)}}}"]
    own += [f"checkpoint.resume={state}", "train.average={kind: ema, decay: 0.5}", "train.steps=4", "log.sample_tokens=0"]
    own += ["train.batch_size=6", "train.micro_batch_size=2", "optimizer.lr=0", "optimizer.adamw_lr=0"]
    status, alone, error = run(*own, folder="alone")
    assert status == 0, error
    common = [str(folder / "config.yaml"), f"data.dir={prepared}", *own]
    layouts = [name for name in LAYOUTS if name != "hsdp"]
    runs = [[*common, *LAYOUTS[name], f"run.dir={folder / name}"] for name in layouts]
    spawn(world, folder, runs, [0] * len(layouts))
    expected = evaluations(alone)[-1]
    for name in layouts:
        found = evaluations([json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()])[-1]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == value if "task/" in key else math.isclose(found[key], value, rel_tol=1e-6), (name, key)
