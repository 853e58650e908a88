"""The official measures: accuracy and macro F1 as scikit-learn defines them, and those of BioASQ task B.

BioASQ's are those of its evaluation program for phase B, version 5 and later (github.com/BioASQ/Evaluation-Measures):
all golden synonyms count, a system gives one name an answer, names are compared as they are but for case.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAX_FACTOID_ANSWERS = 5

Synonyms = Sequence[str]


class ClassMeasures(NamedTuple):
    """Measures of one class; 0 where they would divide by 0."""

    precision: float
    recall: float
    f1: float
    questions: int


@dataclass(frozen=True)
class Classification:
    """Measures of predicted labels."""

    accuracy: float
    macro_f1: float
    """Mean F1 of all classes that are true or predicted somewhere."""
    classes: dict[str, ClassMeasures]
    confusion: dict[str, dict[str, int]]
    """Questions by true, then by predicted label."""


def classification(truth: Sequence[str], predicted: Sequence[str]) -> Classification:
    """Accuracy, and F1 averaged over the classes that occur, as scikit-learn's `f1_score(average="macro")`.

    Args:
      truth: labels of at least one question.
      predicted: labels in the same order; one that is no true label of any question counts as a class of its own.
    """
    labels = list(dict.fromkeys([*truth, *predicted]))
    encoded_truth, encoded_predicted = encode(labels, truth, predicted)
    counts = confusion_counts(encoded_truth, encoded_predicted, len(labels))
    right = np.diagonal(counts)
    true, guessed = counts.sum(1), counts.sum(0)
    precision, recall, f1 = (_divide(right, guessed), _divide(right, true), _divide(2 * right, true + guessed))
    classes = {
        label: ClassMeasures(float(precision[i]), float(recall[i]), float(f1[i]), int(true[i]))
        for i, label in enumerate(labels)
    }
    confusion = {label: dict(zip(labels, map(int, counts[i]), strict=True)) for i, label in enumerate(labels)}
    return Classification(float(right.sum() / counts.sum()), float(f1.mean()), classes, confusion)


def encode(labels: Sequence[str], *columns: Sequence[str]) -> list[np.ndarray]:
    """Columns of labels as the labels' numbers."""
    number = {label: index for index, label in enumerate(labels)}
    return [np.array([number[label] for label in column]) for column in columns]


def confusion_counts(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """[..., true class, predicted class]: how many of the items along the last axis fall there."""
    pairs = truth * classes + predicted
    return np.stack([(pairs == pair).sum(-1) for pair in range(classes**2)], -1).reshape(
        *pairs.shape[:-1], classes, classes
    )


def macro_f1(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Macro F1 of encoded labels [..., items] over a fixed number of classes; for resampling."""
    counts = confusion_counts(truth, predicted, classes)
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    return _divide(2 * right, counts.sum(-1) + counts.sum(-2)).mean(-1)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=denominator != 0)


# --- BioASQ ---


class Factoid(NamedTuple):
    """Measures of one factoid question."""

    strict: float
    """1 if the first answer is right."""
    lenient: float
    """1 if one of the first five is."""
    reciprocal_rank: float
    """1 over the place of the first right one; 0 if there is none."""


class ListMeasures(NamedTuple):
    """Measures of one list question."""

    precision: float
    recall: float
    f1: float


def read_yesno(text: str) -> str:
    """ "yes" for what contains yes in any case, else "no" for what contains no, else "none": the official reading."""
    lowered = text.lower()
    return "yes" if "yes" in lowered else "no" if "no" in lowered else "none"


def yesno(truth: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy, F1 of yes, F1 of no and their mean, of golden and given answers.

    An answer that is neither counts as the wrong one, so that it costs recall of its class and precision of the other.
    """
    golden = [read_yesno(text) for text in truth]
    right = [read_yesno(text) == gold for text, gold in zip(answers, golden, strict=True)]
    other = {"yes": "no", "no": "yes", "none": "yes"}
    measured = classification(golden, [gold if r else other[gold] for r, gold in zip(right, golden, strict=True)])
    f1 = {label: measured.classes[label].f1 if label in measured.classes else 0.0 for label in ("yes", "no")}
    return {
        "accuracy": measured.accuracy,
        "macro_f1": (f1["yes"] + f1["no"]) / 2,
        "f1_yes": f1["yes"],
        "f1_no": f1["no"],
    }


def factoid(golden: Sequence[Synonyms], answers: Sequence[str]) -> Factoid:
    """Measures of a ranked list of answers, of which five count.

    Args:
      golden: the right answers, each with its synonyms.
      answers: one name each, the best first.
    """
    right = {name.lower() for synonyms in golden for name in synonyms}
    ranks = [rank for rank, name in enumerate(answers[:MAX_FACTOID_ANSWERS], 1) if name.lower() in right]
    if not ranks:
        return Factoid(0.0, 0.0, 0.0)
    return Factoid(float(ranks[0] == 1), 1.0, 1 / ranks[0])


def list_measures(golden: Sequence[Synonyms], answers: Sequence[str]) -> ListMeasures:
    """Precision, recall and F1 of a list of names; each golden item counts once, for the first name that matches it.

    As in the official program, a golden item that is left over although a given name matches it (its synonyms are
    shared with another item) is not held against the system: that name is used up for it instead.
    """
    left = [{name.lower() for name in synonyms} for synonyms in golden]
    names = [name.lower() for name in answers]
    if not names:
        return ListMeasures(0.0, 0.0, 0.0)
    true_positives = 0
    for name in names:
        match = next((item for item in left if name in item), None)
        if match is not None:
            left.remove(match)
            true_positives += 1
    false_negatives = 0
    for item in left:
        match_name = next((name for name in names if name in item), None)
        if match_name is None:
            false_negatives += 1
        else:
            names.remove(match_name)
    precision = true_positives / len(answers)
    recall = true_positives / (true_positives + false_negatives) if true_positives + false_negatives else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision and recall else 0.0
    return ListMeasures(precision, recall, f1)
