"""The official measures: accuracy and macro-F1 as scikit-learn defines them, and those of BioASQ task B.

BioASQ's are those of its evaluation program for phase B, version 5 and later (github.com/BioASQ/Evaluation-Measures):
all golden synonyms count, a system gives one name an answer, names are compared exactly except for case. Ideal answers
are scored as BioASQ's platform does, with ROUGE-1.5.5 -2 4 -u (Lin 2004): neither stemming nor a list of stop words.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAX_FACTOID_ANSWERS = 5
"""Ranked answers to a question that count."""

Synonyms = Sequence[str]


class ClassMeasures(NamedTuple):
    """Measures of one class; 0 where they would divide by 0."""

    precision: float
    """Share of its predictions that are correct."""
    recall: float
    """Share of its questions that are found."""
    f1: float
    """Harmonic mean of precision and recall."""
    questions: int
    """Number of questions whose true label it is."""


@dataclass(frozen=True)
class Classification:
    """Measures of predicted labels."""

    accuracy: float
    """Share of correct labels."""
    macro_f1: float
    """Mean F1 over all classes that are true or predicted for some question."""
    classes: dict[str, ClassMeasures]
    """Measures of each of these classes."""
    confusion: dict[str, dict[str, int]]
    """Number of questions by true, then by predicted label."""


def classification(truth: Sequence[str], predicted: Sequence[str]) -> Classification:
    """Return accuracy and F1, averaged over the classes that occur as in scikit-learn's `f1_score(average="macro")`.

    Args:
      truth: labels of at least one question.
      predicted: labels in the same order; one that is not the true label of any question is a class of its own.
    """
    labels = list(dict.fromkeys([*truth, *predicted]))
    encoded_truth, encoded_predicted = encode(labels, truth, predicted)
    counts = confusion_counts(encoded_truth, encoded_predicted, len(labels))
    correct, true, guessed = np.diagonal(counts), counts.sum(1), counts.sum(0)
    f1 = _divide(2 * correct, true + guessed)
    columns = (_divide(correct, guessed), _divide(correct, true), f1, true)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    classes = {label: ClassMeasures(*row) for label, row in zip(labels, rows, strict=True)}
    confusion = {label: dict(zip(labels, row, strict=True)) for label, row in zip(labels, counts.tolist(), strict=True)}
    return Classification(float(correct.sum() / counts.sum()), float(f1.mean()), classes, confusion)


def encode(labels: Sequence[str], *columns: Sequence[str]) -> list[np.ndarray]:
    """Return each column of labels as indices into `labels`."""
    number = {label: index for index, label in enumerate(labels)}
    return [np.array([number[label] for label in column]) for column in columns]


def confusion_counts(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return the number of items along the last axis by class, [..., true class, predicted class]."""
    pairs = truth * classes + predicted
    counts = np.stack([(pairs == pair).sum(-1) for pair in range(classes**2)], -1)
    return counts.reshape(*pairs.shape[:-1], classes, classes)


def macro_f1(truth: np.ndarray, predicted: np.ndarray, classes: int, axis: int = -1) -> np.ndarray:
    """Return the macro-F1 of encoded labels [..., items] over a fixed number of classes, for resampling.

    Args:
      truth: true labels.
      predicted: predicted labels.
      classes: number of classes; one that does not occur in a resample counts with an F1 of 0.
      axis: of the items; always the last one.
    """
    counts = confusion_counts(truth, predicted, classes)
    correct = np.diagonal(counts, axis1=-2, axis2=-1)
    return _divide(2 * correct, counts.sum(-1) + counts.sum(-2)).mean(-1)


def _divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=denominator != 0)


# --- BioASQ ---


class Factoid(NamedTuple):
    """Measures of one factoid question."""

    strict: float
    """1 if the first answer is correct."""
    lenient: float
    """1 if one of the first five answers is correct."""
    reciprocal_rank: float
    """1 / rank of the first correct answer; 0 without one."""


class ListMeasures(NamedTuple):
    """Measures of one list question."""

    precision: float
    """Share of the given names that are correct."""
    recall: float
    """Share of the golden items that are named."""
    f1: float
    """Harmonic mean of precision and recall."""


def read_yesno(text: str) -> str:
    """Return "yes" if the text contains yes in any case, else "no" if it contains no, else "none": official reading."""
    lowered = text.lower()
    return "yes" if "yes" in lowered else "no" if "no" in lowered else "none"


def yesno_predictions(truth: Sequence[str], answers: Sequence[str]) -> list[str]:
    """Return each answer as yes or no; one that is not the correct answer counts as the other, even if it is neither.

    So an unreadable answer costs recall of its class and precision of the other, as in the official program.
    """
    other = {"yes": "no", "no": "yes", "none": "yes"}
    golden = [read_yesno(text) for text in truth]
    return [gold if read_yesno(text) == gold else other[gold] for text, gold in zip(answers, golden, strict=True)]


def yesno(truth: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Return accuracy, F1 of yes, F1 of no and their mean; see `yesno_predictions`.

    Args:
      truth: golden answers.
      answers: given answers, as text.
    """
    measured = classification([read_yesno(text) for text in truth], yesno_predictions(truth, answers))
    yes, no = (measured.classes[label].f1 if label in measured.classes else 0.0 for label in ("yes", "no"))
    return {"accuracy": measured.accuracy, "macro_f1": (yes + no) / 2, "f1_yes": yes, "f1_no": no}


def factoid(golden: Sequence[Synonyms], answers: Sequence[str]) -> Factoid:
    """Return the measures of a ranked list of answers, of which five count.

    Args:
      golden: the correct answers, each with its synonyms.
      answers: one name each, the best first.
    """
    correct = {name.lower() for synonyms in golden for name in synonyms}
    ranks = [rank for rank, name in enumerate(answers[:MAX_FACTOID_ANSWERS], 1) if name.lower() in correct]
    if not ranks:
        return Factoid(0.0, 0.0, 0.0)
    return Factoid(float(ranks[0] == 1), 1.0, 1 / ranks[0])


def list_measures(golden: Sequence[Synonyms], answers: Sequence[str]) -> ListMeasures:
    """Return precision, recall and F1 of a list of names; a golden item matches the first name that is a synonym of it.

    As in the official program, an unmatched golden item that shares a name with a matched one is not a false negative;
    it uses up that name instead.

    Args:
      golden: the golden items, each with its synonyms.
      answers: the given names.
    """
    unmatched = [{name.lower() for name in synonyms} for synonyms in golden]
    names = [name.lower() for name in answers]
    if not names:
        return ListMeasures(0.0, 0.0, 0.0)
    true_positives = false_negatives = 0
    for name in names:
        match = next((item for item in unmatched if name in item), None)
        if match is not None:
            unmatched.remove(match)
            true_positives += 1
    for item in unmatched:
        shared = next((name for name in names if name in item), None)
        if shared is None:
            false_negatives += 1
        else:
            names.remove(shared)
    precision = true_positives / len(answers)
    recall = true_positives / (true_positives + false_negatives) if true_positives else 0.0
    f1 = 2 * precision * recall / (precision + recall) if true_positives else 0.0
    return ListMeasures(precision, recall, f1)


class Rouge(NamedTuple):
    """Overlap of a text with golden texts; 0 where it would divide by 0."""

    recall: float
    """Share of the golden texts' units that the text has too."""
    f1: float
    """Harmonic mean of precision and recall."""


def rouge_2(golden: Sequence[str], answer: str) -> Rouge:
    """Return ROUGE-2, the overlap in pairs of neighbouring words; counts of several golden texts are summed."""
    return _rouge([_bigrams(text, 0, unigrams=False) for text in golden], _bigrams(answer, 0, unigrams=False))


def rouge_su4(golden: Sequence[str], answer: str) -> Rouge:
    """Return ROUGE-SU4, the overlap in words and in pairs of words with at most four others between them.

    As in the official program, a text's last word counts in pairs only.
    """
    return _rouge([_bigrams(text, 4, unigrams=True) for text in golden], _bigrams(answer, 4, unigrams=True))


def _bigrams(text: str, gap: int, *, unigrams: bool) -> Counter[tuple[str, ...]]:
    """Count the pairs of words with up to `gap` words between them; as officially, of ASCII characters alone."""
    words = re.findall("[a-z0-9]+", text.encode("ascii", "ignore").decode().lower())
    pairs = [(a, b) for i, a in enumerate(words) for b in words[i + 1 : i + gap + 2]]
    return Counter([*pairs, *((word,) for word in words[:-1] if unigrams)])


def _rouge(golden: Sequence[Counter[tuple[str, ...]]], answer: Counter[tuple[str, ...]]) -> Rouge:
    hits = sum((each & answer).total() for each in golden)
    wanted, given = sum(each.total() for each in golden), len(golden) * answer.total()
    return Rouge(hits / wanted, 2 * hits / (wanted + given)) if hits else Rouge(0.0, 0.0)
