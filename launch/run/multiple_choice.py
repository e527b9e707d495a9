"""Multiple choice from JSON lines, the built-in downstream task: {"question": TEXT, "choices": [TEXT, ...], "answer": NUMBER}.

`answer` counts from 0. HellaSwag, ARC, PIQA and similar tasks have this form. A space is put between question and choice unless
there is white space already. The model's answer is the choice with the largest log-probability (accuracy), or with the largest
log-probability divided by its length in characters (normalized accuracy). lm-eval's `acc` and `acc_norm` give the same numbers
for the same texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from configs.load import ConfigError
from data import first_line
from launch.run.scoring import Ask, Row, row

EXAMPLE = '{"question": "Snow is", "choices": ["white", "green"], "answer": 0}'


class Question(NamedTuple):
    """A tokenized question."""

    rows: list[Row]  # one for each choice
    lengths: list[int]  # of the choices, in characters
    answer: int


class MultipleChoice:
    """The questions of a file."""

    def __init__(self, name: str, path: str | Path, tokenizer: Tokenizer, end: int, context: int, most: int | None) -> None:
        """
        Args:
            name: the name of the task.
            path: its file.
            end: the token that ends a document; it replaces an empty question.
            context: tokens of a sequence of the model. The beginning of a longer question is cut off.
            most: how many questions to take, from the first on; None: all.

        Raises:
            ConfigError: the file is missing or empty, or a line is not a question; the message gives the line's number.
        """
        self.name, self.key = f"eval.tasks.{name}", f"task/{name}"
        lines = read_lines(self.name, Path(path))
        self.questions = []
        for number, line in lines:
            try:
                self.questions.append(parse(line, tokenizer, end, context))
            except ValueError as error:
                raise ConfigError(f"{self.name}: {path}, line {number}: {error}") from None
            if len(self.questions) == most:
                break
        if not self.questions:
            raise ConfigError(f"{self.name}: {path} holds no question; a line is {EXAMPLE}")

    def __call__(self, ask: Ask) -> dict[str, float]:
        """Return both accuracies; NaN if a log-probability is not finite."""
        scores = ask([one for question in self.questions for one in question.rows])[:, 0].numpy()
        right, right_by_length, at = 0, 0, 0
        for rows, lengths, answer in self.questions:
            of_choices = scores[at : at + len(rows)]
            at += len(rows)
            right += int(of_choices.argmax()) == answer
            right_by_length += int((of_choices / np.array(lengths)).argmax()) == answer
        count = len(self.questions) if np.isfinite(scores).all() else np.nan
        return {f"{self.key}/accuracy": right / count, f"{self.key}/accuracy_norm": right_by_length / count}


def read_lines(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file that are not blank, each with its number, counted from 1."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{name}: {path} cannot be read: {first_line(error)}") from None


def parse(line: str, tokenizer: Tokenizer, end: int, context: int) -> Question:
    """Parse a line of the file. Raises ValueError with the reason if it is not a question."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError(f"not JSON; a line is {EXAMPLE}") from None
    if not isinstance(found, dict) or (missing := {"question", "choices", "answer"} - found.keys()):
        lacks = f"lacks {sorted(missing)[0]!r}" if isinstance(found, dict) else "is no mapping"
        raise ValueError(f"it {lacks}; a line is {EXAMPLE}")
    question, choices, answer = checked_text(found["question"], "question"), found["choices"], found["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise ValueError("choices is not a list of two or more texts")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise ValueError(f"answer is {answer!r}, expected the number of a choice, from 0 to {len(choices) - 1}")
    rows = []
    for number, choice in enumerate(choices):
        if not checked_text(choice, f"choice {number}"):
            raise ValueError(f"choice {number} is empty")
        space = "" if not question or question[-1].isspace() or choice[0].isspace() else " "
        try:
            rows.append(row(*encoded(question, space + choice, tokenizer, end), context))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"choice {number} ({choice[:40]!r}): {first_line(error)}") from None
    return Question(rows, [len(choice) for choice in choices], answer)


def checked_text(value: Any, what: str) -> str:
    """Return `value` if it is a text that can be encoded. JSON may contain lone surrogates, which cannot."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {value!r:.40}, expected a text")
    try:
        value.encode()
    except UnicodeError:
        raise ValueError(f"{what} holds half a character (a lone surrogate)") from None
    return value


def encoded(before: str, after: str, tokenizer: Tokenizer, end: int) -> tuple[Sequence[int], Sequence[int]]:
    """Return the tokens of a text and of its continuation. White space between the two belongs to the continuation."""
    bare = before.rstrip()
    whole = tokenizer.encode(before + after, add_special_tokens=False).ids
    if not bare:
        return [end], whole
    first = tokenizer.encode(bare, add_special_tokens=False).ids
    return whole[: len(first)], whole[len(first) :]
