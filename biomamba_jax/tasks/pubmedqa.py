"""PubMedQA (Jin et al. 2019, arXiv 1909.06146): its questions, its official test set and its authors' ten folds.

The authors split the 1,000 labelled questions with Python's random numbers from seed 0: 500 for the test, 500 for
ten-fold cross-validation, both stratified by label. `official_split` draws the same numbers, so it reproduces the
authors' test set and folds without their files.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from biomamba_jax.config.evaluate import YES_NO_MAYBE, PubMedQAConfig
from biomamba_jax.config.finetune import FOLDS
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json

_SEED = 0
OFFICIAL_SIZE = 500
"""Number of questions of the authors' test set."""


@dataclass(frozen=True)
class Question:
    """One labelled question."""

    key: str
    """PMID of the article whose title it was."""
    question: str
    """The question."""
    contexts: tuple[tuple[str, str], ...]
    """Label and text of each section of the abstract except its conclusion."""
    answer: str
    """yes, no or maybe."""
    long_answer: str
    """The conclusion; never part of a prompt."""

    @property
    def context(self) -> str:
        """The sections, one paragraph each, with their labels in front."""
        return "\n".join(self.paragraphs)

    @property
    def paragraphs(self) -> list[str]:
        """The sections with their labels in front."""
        return [f"{label}: {text}" if label else text for label, text in self.contexts]

    def prompt(self, config: PubMedQAConfig, context: str | None = None) -> str:
        """Return the question's prompt, with its own context by default."""
        return config.prompt.format(question=self.question, context=self.context if context is None else context)


class Split(NamedTuple):
    """The authors' split of the questions."""

    folds: list[list[Question]]
    """Ten folds of the 500 development questions; fold i is predicted by what is trained on the nine others."""
    test: list[Question]
    """The official test set."""

    @property
    def development(self) -> list[Question]:
        """The questions of all folds."""
        return [question for fold in self.folds for question in fold]


def read_questions(path: str | Path) -> list[Question]:
    """Read `ori_pqal.json` as the authors publish it, in the order of the file.

    Raises:
      UserError: the file cannot be read, or an entry has no question, contexts or decision; names it.
    """
    questions = []
    for key, entry in read_json(path).items():
        try:
            texts, labels = entry["CONTEXTS"], entry.get("LABELS") or []
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise TypeError
            labels = [*labels, *[""] * (len(texts) - len(labels))]
            contexts = tuple((str(label), text) for label, text in zip(labels, texts, strict=True))
            answer = entry["final_decision"]
            if answer not in YES_NO_MAYBE or not entry["QUESTION"].strip():
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}: {key} has no QUESTION, CONTEXTS or final_decision of yes, no, maybe; "
                "give ori_pqal.json of PubMedQA"
            ) from None
        questions.append(Question(key, entry["QUESTION"], contexts, answer, str(entry.get("LONG_ANSWER") or "")))
    if not questions:
        raise UserError(f"{path}: holds no questions; give ori_pqal.json of PubMedQA")
    return questions


def official_split(
    questions: Sequence[Question], test_ids: str | Path | None = None, source: str | Path = "PubMedQA"
) -> Split:
    """Return the authors' test set and folds.

    Args:
      questions: all questions, in the order of the authors' file, which the split depends on.
      test_ids: the authors' test_ground_truth.json, to check the test set against.
      source: the file of the questions, for messages.

    Raises:
      UserError: the test set differs from `test_ids`, or there are too few questions.
    """
    draw = random.Random(_SEED)
    development, test = _stratified(questions, 2, draw, source)
    if test_ids is not None and read_json(test_ids) != {question.key: question.answer for question in test}:
        raise UserError(
            f"{test_ids}: is not the test set that the authors' procedure gives for these {len(questions)} "
            "questions; give ori_pqal.json and test_ground_truth.json of the same release, unchanged"
        )
    if len(development) < FOLDS:
        raise UserError(f"{source}: {len(questions)} questions are too few for a test set and ten folds")
    return Split(_stratified(development, FOLDS, draw, source), test)


def random_test(questions: Sequence[Question]) -> list[Question]:
    """Return the random subset that the published BioMamba code tests on: a permutation of NumPy's default generator.

    It is `train_test_split(test_size=0.2, seed=42)["test"]` of Hugging Face's datasets.
    """
    order = np.random.default_rng(42).permutation(len(questions))
    return [questions[index] for index in order[: math.ceil(0.2 * len(questions))]]


def stratified_sample(questions: Sequence[Question], size: int, seed: int) -> list[Question]:
    """Return a random sample in the order of `questions`, in which each answer has its share.

    Shares are rounded; an answer that occurs has at least one question if `size` allows it.
    """
    groups = {label: [question for question in questions if question.answer == label] for label in YES_NO_MAYBE}
    groups = {label: group for label, group in groups.items() if group}
    counts, size = dict.fromkeys(groups, 0), min(size, len(questions))
    for _ in range(size):
        missing = {label: size * len(group) / len(questions) - counts[label] for label, group in groups.items()}
        counts[max(missing, key=lambda label: (counts[label] == 0, missing[label]))] += 1
    draw = random.Random(seed)
    chosen = {id(question) for label, group in groups.items() for question in draw.sample(group, counts[label])}
    return [question for question in questions if id(question) in chosen]


def _stratified(
    questions: Sequence[Question], parts: int, draw: random.Random, source: str | Path
) -> list[list[Question]]:
    """Return `parts` stratified lists of questions, drawn as the authors draw them."""
    divided: list[list[Question]] = [[] for _ in range(parts)]
    for label in YES_NO_MAYBE:
        chosen = [question for question in questions if question.answer == label]
        draw.shuffle(chosen)
        size = math.ceil(len(chosen) / parts)
        for index, part in enumerate(divided):
            part += chosen[index * size : (index + 1) * size]
    last = divided[-1]
    if len(last) != len(divided[0]):  # rounding up left it short: it takes one question of each other part
        for part in divided[:-1]:
            if not part:
                raise UserError(f"{source}: {len(questions)} questions are too few to be divided into {parts} parts")
            moved = draw.choice(part)
            part.remove(moved)
            last.append(moved)
    return divided
