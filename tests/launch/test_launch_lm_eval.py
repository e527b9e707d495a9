"""Tasks of lm-eval while a model trains; they need that package."""

import socket

import pytest
from test_launch_evaluation import QUESTIONS, write

pytest.importorskip("lm_eval")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
"""


@pytest.mark.slow  # lm-eval lists thousands of tasks when it starts
def test_tasks_of_lm_eval_agree_with_our_own_and_touch_no_network(run, monkeypatch):
    """The same questions: the same accuracies. What needs text or the network is refused in a line."""
    questions = [question for question in QUESTIONS if question["question"]]
    file = write(run.tmp_path / "questions.jsonl", questions)
    folder = run.tmp_path / "tasks"
    folder.mkdir()
    choice = 'doc_to_choice: "{{choices}}"\nmetric_list: [{metric: acc}, {metric: acc_norm}]'
    choice_task = TASK.format(name="own_choice", file=file, kind="multiple_choice", target='"{{answer}}"', more=choice)
    (folder / "choice.yaml").write_text(choice_task)
    rolling = "metric_list: [{metric: bits_per_byte}]"
    rolling_task = TASK.format(name="own_text", file=file, kind="loglikelihood_rolling", target='"{{question}}"', more=rolling)
    (folder / "rolling.yaml").write_text(rolling_task.replace('doc_to_text: "{{question}}"', 'doc_to_text: ""'))
    text = "generation_kwargs: {until: ['.']}\nmetric_list: [{metric: exact_match}]"
    (folder / "text.yaml").write_text(TASK.format(name="own_writing", file=file, kind="generate_until", target="x", more=text))
    distant = choice_task.replace("own_choice", "own_distant").replace("dataset_path: json", "dataset_path: nobody/nothing")
    (folder / "distant.yaml").write_text(distant)

    def no_network(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    own = [f"eval.lm_eval_include={folder}", "log.sample_tokens=0", "train.steps=2", "eval.every=1"]
    status, records, error = run(*own, "eval.lm_eval=[own_choice, own_text]", f"eval.tasks={{own: {file}}}")
    assert status == 0, error
    for record in [record for record in records if "val_loss" in record]:
        for metric, same in (("acc", "accuracy"), ("acc_norm", "accuracy_norm")):
            assert record[f"lm_eval/own_choice/{metric}"] == record[f"task/own/{same}"]
        assert 2 < record["lm_eval/own_text/bits_per_byte"] < 9
    for name, message in (
        ("own_writing", "eval.lm_eval: own_writing needs generated text (generate_until)"),
        ("own_distant", "eval.lm_eval: the data of own_distant cannot be loaded without a network"),
        ("own_nothing", "eval.lm_eval: there is no task 'own_nothing'"),
    ):
        status, _, error = run(*own, f"eval.lm_eval=[{name}]", folder="refused")
        assert (status, error.count("\n")) == (2, 1) and message in error, error
