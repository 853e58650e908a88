"""Multiple choice by likelihood: MedQA, MedMCQA and MMLU as they are published, and what is laid out like them.

    MedQA (Jin et al. 2020)      {"question", "options": {"A": ..., ...}, "answer_idx": "A"} a line
    MedMCQA (Pal et al. 2022)    {"question", "opa", ..., "opd", "cop", "subject_name"} a line
    MMLU (Hendrycks et al. 2021) anatomy_test.csv without a header: question, A, B, C, D, letter
                                 {"question", "choices": [...], "answer": 0, "subject"}, also Parquet

Options may also be a list of {"key", "value"}, the whole question may be nested under "data", and the answer may be the
option's text.
"""

import csv
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import numpy as np

from biomamba_jax.config.evaluate import MultipleChoiceConfig
from biomamba_jax.data.readers import is_rows, read_rows
from biomamba_jax.data.text import normalized_digest
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_lines, uncompressed_name
from biomamba_jax.tasks.answers import label_predictions
from biomamba_jax.tasks.question_answering import Measures, TaskResult
from biomamba_jax.tasks.scoring import Request, Scorer, check_finite
from biomamba_jax.tasks.statistics import Resampling, wilson

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Question:
    """A question and its options, of which one is correct."""

    key: str
    """Id of the question, or its place."""
    question: str
    """The question."""
    options: tuple[str, ...]
    """Texts of the options A, B, ..."""
    answer: str
    """Letter of the correct one."""
    subject: str = ""
    """Its subject, "" where the file names none."""


@dataclass(frozen=True)
class ChoiceTask:
    """The questions of a task."""

    asked: list[Question]
    """Questions to answer."""
    train: list[Question]
    """Questions to show as examples; none of them is asked."""
    left_out: dict[str, int]
    """Number of questions that are not asked, by reason."""

    @property
    def chance(self) -> float:
        """Expected accuracy of random answers."""
        return sum(1 / len(question.options) for question in self.asked) / len(self.asked)


def read_task(name: str, config: MultipleChoiceConfig, seed: int) -> ChoiceTask:
    """Read the questions of a task.

    Args:
      name: the task's name, for errors.
      config: files, and number of questions.
      seed: of the sample, if the config limits the questions.

    Raises:
      UserError: a file that cannot be read or is laid out otherwise, no question, or too few examples.
    """
    left_out = Counter[str]()
    asked = [q for path in config.path for q in _read(Path(path), config, left_out)]
    if not asked:
        raise UserError(f"multiple_choice.{name}: {', '.join(config.path)} holds no question with an answer")
    number = min(config.max_questions or len(asked), len(asked))
    left_out["not in the sample"] = len(asked) - number
    chosen = sorted(random.Random(seed).sample(range(len(asked)), number))
    known = {normalized_digest(question.question) for question in asked}
    train = [q for path in config.train for q in _read(Path(path), config, Counter())]
    train = [question for question in train if normalized_digest(question.question) not in known]
    if len(train) < config.shots:
        raise UserError(
            f"multiple_choice.{name}.shots = {config.shots}: multiple_choice.{name}.train holds {len(train)} questions "
            "that are not asked; give more files or fewer shots"
        )
    return ChoiceTask([asked[index] for index in chosen], train, dict(+left_out))


def _read(path: Path, config: MultipleChoiceConfig, left_out: Counter[str]) -> Iterator[Question]:
    rows = list(_rows(path))
    first = _first_option(path, [row for _, row in rows], config)
    subject = re.sub("_(test|dev|val|train)$", "", Path(uncompressed_name(path)).stem) if _is_csv(path) else ""
    for where, row in rows:
        question, (keys, options) = row.get("question") or "", _options(row)
        texts = all(isinstance(each, str) for each in (question, *options))
        if not texts or not question.strip() or not 2 <= len(options) <= len(LETTERS):
            raise UserError(
                f"{where}: has no question with 2 to {len(LETTERS)} options and an answer; give MedQA, MedMCQA or MMLU "
                "as published"
            )
        answer = _answer(row, keys, options, first, where)
        if answer is None:
            left_out["without an answer"] += 1
        elif not all(option.strip() for option in options):
            left_out["with an empty option"] += 1
        elif len(set(options)) < len(options):
            left_out["with equal options"] += 1
        else:
            of = str(row.get("subject") or row.get("subject_name") or subject)
            stripped = tuple(option.strip() for option in options)
            yield Question(str(row.get("id") or where), question.strip(), stripped, LETTERS[answer], of)


def _first_option(path: Path, rows: Sequence[dict[str, Any]], config: MultipleChoiceConfig) -> int:
    """Return the number of the first option in MedMCQA's cop: 1 in the authors' files, 0 in those on the hub."""
    stated = {str(row["cop"]) for row in rows if "cop" in row} - {"-1", "None"}
    if config.first_option is not None or not stated:
        return config.first_option or 0
    if not stated & {"0", "4"}:
        raise UserError(f"{path}: its cop may count options from 0 or from 1; say which with first_option")
    return 0 if "0" in stated else 1


def _is_csv(path: Path) -> bool:
    return Path(uncompressed_name(path)).suffix == ".csv"


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if _is_csv(path):
        cells = csv.reader((f"{line}\n" for line in read_lines(path)), strict=True)
        try:
            for row in filter(None, cells):
                question, *options, answer = [*row, ""][: max(len(row), 2)]
                yield f"{path}, line {cells.line_num}", {"question": question, "options": options, "answer": answer}
        except csv.Error as error:
            raise UserError(f"{path}, line {cells.line_num}: is not CSV ({error})") from None
        return
    if not is_rows(path):
        raise UserError(f"{path}: unknown kind of file; give .jsonl, .json, .parquet or MMLU's .csv")
    for where, record in read_rows(path):
        nested = record["data"] if isinstance(record.get("data"), dict) else {}
        yield where, {key.lower().replace(" ", "_"): value for key, value in (record | nested).items()}


def _options(row: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Return the keys of the options, letters where they have none, and their texts; nothing of another layout."""
    given = row.get("options") or row.get("choices") or [row[f"op{x}"] for x in "abcd" if f"op{x}" in row]
    if isinstance(given, dict):
        given = [{"key": key, "value": given[key]} for key in sorted(given)]
    listed = given if isinstance(given, list) else []
    pairs = [(each.get("key"), each.get("value")) if isinstance(each, dict) else (None, each) for each in listed]
    keys = [letter if key is None else str(key) for (key, _), letter in zip(pairs, LETTERS, strict=False)]
    return keys, [text for _, text in pairs]


def _answer(row: dict[str, Any], keys: Sequence[str], options: Sequence[str], first: int, where: str) -> int | None:
    """Return the index of the correct option, None if the row names none."""
    named = (row[key] for key in ("cop", "answer_idx", "correct_option", "answer") if row.get(key) not in (None, ""))
    value = next(named, None)
    if isinstance(value, float) and value.is_integer():  # as Parquet has them where some are missing
        value = int(value)
    columns: tuple[Sequence[str], ...] = (keys, LETTERS, options)
    if "cop" in row:
        value = None if str(value) in ("-1", "None") else str(value)
        columns = ([str(first + index) for index in range(len(options))],)
    if type(value) is int and any(key.isdecimal() for key in keys):  # a number is an index unless it is a key
        value = str(value)
    if isinstance(value, str):
        value = next((list(column).index(value) for column in columns if value in list(column)), -1)
    if value is not None and (type(value) is not int or not 0 <= value < len(options)):
        raise UserError(f"{where}: its answer is none of its {len(options)} options; correct it or leave it out")
    return value


def prompt_of(question: Question, config: MultipleChoiceConfig, train: Sequence[Question]) -> str:
    """Return the prompt of a question: examples with their answers, from its subject where there are enough, then it.

    The examples are the first ones of the training files.
    """
    same = [example for example in train if example.subject == question.subject]
    shown = (same if len(same) >= config.shots else train)[: config.shots]

    def fill(each: Question) -> str:
        options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, each.options, strict=False))
        return config.template.format(question=each.question, options=options)

    examples = [fill(each) + continuations(each, config)[LETTERS.index(each.answer)] for each in shown]
    return "\n\n".join([*examples, fill(question)])


def continuations(question: Question, config: MultipleChoiceConfig) -> tuple[str, ...]:
    """Return what may follow the prompt: the options' texts or letters, each after a space."""
    shown = LETTERS[: len(question.options)] if config.answer == "letter" else question.options
    return tuple(f" {each}" for each in shown)


def answer(scorer: Scorer, config: MultipleChoiceConfig, task: ChoiceTask, resampling: Resampling) -> TaskResult:
    """Answer each question by the likeliest option; also measure the likeliest per byte of its text.

    Raises:
      UserError: a log-likelihood is NaN.
    """
    start, asked = time.perf_counter(), task.asked
    texts = [continuations(question, config) for question in asked]
    prompts = [prompt_of(question, config, task.train) for question in asked]
    requests = [Request(*each) for each in zip(prompts, texts, strict=True)]
    scores = [np.array([each.total for each in row]) for row in scorer.continuations(requests)]
    check_finite(scorer, np.concatenate(scores))
    seconds = time.perf_counter() - start
    chosen = {"accuracy": [LETTERS[row.argmax()] for row in scores]}
    if config.answer == "text":
        sizes = [[len(text.encode()) for text in each] for each in texts]
        chosen["accuracy_per_byte"] = [LETTERS[(r / s).argmax()] for r, s in zip(scores, sizes, strict=True)]
    return _result(asked, chosen, scores, resampling, seconds)


def majority(task: ChoiceTask, resampling: Resampling) -> TaskResult | None:
    """Return the result of always giving the most frequent letter of the training questions; None without any."""
    if not task.train:
        return None
    chosen = {"accuracy": [mode(question.answer for question in task.train)] * len(task.asked)}
    return _result(task.asked, chosen, None, resampling, 0.0)


def _result(
    asked: Sequence[Question],
    chosen: dict[str, list[str]],
    scores: Sequence[np.ndarray] | None,
    resampling: Resampling,
    seconds: float,
) -> TaskResult:
    """Return the result of letters chosen by each rule, of which the first one's are the predictions."""

    def measured(subject: str | None = None) -> Measures:
        inside = [index for index, question in enumerate(asked) if subject in (None, question.subject)]
        correct = {rule: sum(given[i] == asked[i].answer for i in inside) for rule, given in chosen.items()}
        return {rule: wilson(count, len(inside), resampling.confidence) for rule, count in correct.items()}

    keys, truth = [each.key for each in asked], [each.answer for each in asked]
    batch = [each.subject or None for each in asked]
    table = None if scores is None else [dict(zip(LETTERS, row.tolist(), strict=False)) for row in scores]
    predictions = label_predictions(keys, truth, chosen["accuracy"], scores=table, batch=batch)
    subjects = {subject: measured(subject) for subject in sorted({question.subject for question in asked})}
    answered = len(asked) if seconds else 0
    return TaskResult(measured(), predictions, len(asked), seconds, answered, {"batches": subjects})
