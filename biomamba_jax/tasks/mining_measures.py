"""Measures of text mining, with bootstrap intervals over texts.

Entities as conlleval and seqeval count them: a span is correct if its first and last character and its type are. Micro
figures are ratios of sums over texts, of items that each text has once. Answers as SQuAD's (exact match and F1 of
words, without case, punctuation and articles) and BioASQ's programs (see `measures.factoid`).
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
from scipy import stats

from biomamba_jax.config.heads import HeadConfig
from biomamba_jax.data.annotations import AnnotatedText
from biomamba_jax.tasks.measures import factoid
from biomamba_jax.tasks.statistics import Resampling, bootstrap, ratio_of_sums

Texts = Sequence[AnnotatedText]
Items = Sequence[Collection[Hashable]]
"""For each text, what it holds or what is predicted of it."""


def micro(gold: Items, predicted: Items, resampling: Resampling | None = None) -> dict[str, float | int | None]:
    """Return micro precision, recall and F1 of the items of all texts; 0 where they would divide by 0.

    Args:
      gold: true items of each text.
      predicted: predicted ones, in the same order.
      resampling: for the interval of F1; None for none.
    """
    pairs = [(set(truth), set(found)) for truth, found in zip(gold, predicted, strict=True)]
    counts = np.array([(len(truth & found), len(found), len(truth)) for truth, found in pairs]).reshape(-1, 3)
    correct, guessed, true = counts.sum(0).tolist()
    ratios = [(correct, guessed), (correct, true), (2 * correct, guessed + true)]
    values = [over / under if under else 0.0 for over, under in ratios]
    results: dict[str, float | int | None] = dict(zip(("precision", "recall", "f1"), values, strict=True))
    results |= {"correct": correct, "predicted": guessed, "gold": true}
    if resampling is not None and guessed + true:
        with np.errstate(invalid="ignore"):  # a resample of texts without any item
            found = bootstrap(_f1, 2 * counts[:, 0], counts[:, 1] + counts[:, 2], resampling=resampling)
        results |= {"f1_low": found.low, "f1_high": found.high}
    return results


def _f1(numerator: np.ndarray, denominator: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.nan_to_num(ratio_of_sums(numerator, denominator, axis))


def entities(gold: Texts, predicted: Texts, resampling: Resampling | None = None) -> dict[str, Any]:
    """Return strict measures of spans: micro, and by type under "types"."""
    true, found = ([{(s.start, s.end, s.type) for s in text.spans} for text in texts] for texts in (gold, predicted))
    types = sorted({kind for spans in [*true, *found] for _, _, kind in spans})
    return micro(true, found, resampling) | {"types": by_group(types, true, found, itemgetter(2))}


def multi_label(
    labels: Sequence[str], gold: Items, predicted: Items, scores: Sequence[dict[str, float]], resampling: Resampling
) -> dict[str, Any]:
    """Return micro and macro F1 and the macro area under the ROC curve of sets of labels.

    The area is a mean over the labels that some texts have and others lack; their number is `auroc_labels`.
    """
    of_label = by_group(labels, gold, predicted)
    areas = [auroc([label in each for each in gold], [each[label] for each in scores]) for label in labels]
    known = [area for area in areas if area is not None]
    return micro(gold, predicted, resampling) | {
        "macro_f1": float(np.mean([values["f1"] for values in of_label.values()])),
        "auroc": float(np.mean(known)) if known else None,
        "auroc_labels": len(known),
        "labels": of_label,
    }


def by_group(
    groups: Sequence[str], gold: Items, predicted: Items, group_of: Callable[[Any], str] = lambda item: item
) -> dict[str, Any]:
    """Return the measures of each group of items by itself; by default each item is one."""

    def of(group: str, column: Items) -> Items:
        return [{item for item in items if group_of(item) == group} for items in column]

    return {group: micro(of(group, gold), of(group, predicted)) for group in groups}


def auroc(truth: Sequence[bool], scores: Sequence[float]) -> float | None:
    """Return the probability that a true item has a higher score than a false one; None without both kinds."""
    positive = np.asarray(truth, bool)
    true, false = np.asarray(scores)[positive], np.asarray(scores)[~positive]
    if not true.size or not false.size:
        return None
    return float(stats.mannwhitneyu(true, false, method="asymptotic").statistic / (true.size * false.size))


def correlations(truth: Sequence[float], predicted: Sequence[float], resampling: Resampling) -> dict[str, float | None]:
    """Return Pearson's and Spearman's correlation; None where one side is constant."""
    columns = np.asarray(truth, np.float64), np.asarray(predicted, np.float64)
    results: dict[str, float | None] = {}
    for name, statistic in (("pearson", _pearson), ("spearman", _spearman)):
        with np.errstate(invalid="ignore", divide="ignore"):
            found = bootstrap(statistic, *columns, resampling=resampling)
        results |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return {name: value if value is not None and np.isfinite(value) else None for name, value in results.items()}


def _pearson(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    x, y = (column - column.mean(axis, keepdims=True) for column in (x, y))
    return (x * y).sum(axis) / np.sqrt((x**2).sum(axis) * (y**2).sum(axis))


def _spearman(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    return _pearson(stats.rankdata(x, axis=axis), stats.rankdata(y, axis=axis), axis=axis)


# --- Answers ---------------------------------------------------------------------------------------------------------


def answer_measures(
    gold: Sequence[Sequence[str]], answers: Sequence[Sequence[str]], resampling: Resampling
) -> dict[str, float | None]:
    """Return SQuAD's exact match and F1 of the first answer, and BioASQ's strict and lenient accuracy and MRR.

    Args:
      gold: the correct answers to each question.
      answers: those that were given, the best first.
      resampling: for the interval of F1.
    """
    firsts = [given[0] if given else "" for given in answers]
    pairs = list(zip(gold, firsts, strict=True))
    exact = [max(float(_words(truth) == _words(first)) for truth in each) if each else 0.0 for each, first in pairs]
    f1 = np.array([max((word_f1(truth, first) for truth in each), default=0.0) for each, first in pairs])
    ranked = [factoid([each], given) for each, given in zip(gold, answers, strict=True)]
    interval = bootstrap(ratio_of_sums, f1, np.ones_like(f1), resampling=resampling)
    f1_measures = {"f1": interval.value, "f1_low": interval.low, "f1_high": interval.high}
    strict, lenient, mrr = map(float, np.mean(ranked, axis=0))
    return {"exact_match": float(np.mean(exact)), **f1_measures, "strict": strict, "lenient": lenient, "mrr": mrr}


def word_f1(truth: str, answer: str) -> float:
    """Return SQuAD's F1 of the words of an answer; 1 if both have none."""
    wanted, given = Counter(_words(truth)), Counter(_words(answer))
    if not wanted or not given:
        return float(wanted == given)
    return 2 * (wanted & given).total() / (wanted.total() + given.total())


def _words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


# --- All of a head ---------------------------------------------------------------------------------------------------


def measure(
    head: HeadConfig, gold: Texts, predicted: Texts, resampling: Resampling, *, negative: str = ""
) -> dict[str, Any]:
    """Return the measures of a head's predictions.

    Args:
      head: what was predicted.
      gold: texts as they are annotated; at least one.
      predicted: the same texts as `HeadModel.annotate` returns them.
      resampling: of the intervals.
      negative: class that stands for none, which F1 leaves out.
    """
    results: dict[str, Any] = {"texts": len(gold)}
    if head.kind == "token_classifier":
        return results | entities(gold, predicted, resampling)
    if head.kind == "span":
        true, given = ([[t.text[s.start : s.end] for s in t.spans] for t in texts] for texts in (gold, predicted))
        return results | answer_measures(true, given, resampling)
    if head.kind == "regression":
        truth = [float("nan") if text.score is None else text.score for text in gold]
        return results | correlations(truth, [text.score or 0.0 for text in predicted], resampling)
    wanted, found = ([set(text.labels) - {negative} for text in texts] for texts in (gold, predicted))
    if head.kind == "multi_label":
        return results | multi_label(head.labels, wanted, found, [text.scores for text in predicted], resampling)
    counted = [label for label in head.labels if label != negative]
    return results | micro(wanted, found, resampling) | {"classes": by_group(counted, wanted, found)}
