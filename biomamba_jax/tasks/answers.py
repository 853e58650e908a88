"""How a model answers: by the likeliest of given answers, or by text that it generates.

Thresholds are numbers added to the scores of the answers. They are found on development questions only; how much they
help is told by cross-validation there (found on nine folds, tried on the tenth), never by the test set.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from biomamba_jax.tasks import measures
from biomamba_jax.tasks.scoring import Request, Scorer, check_finite

UNANSWERED = "none"
"""The label of a generated text that holds none of the answers."""
_CUTS = 41
"""Thresholds tried for each label."""


@dataclass(frozen=True)
class Prediction:
    """One question's answer, as it is saved."""

    key: str
    truth: str | list[list[str]]
    prediction: str | list[str]
    correct: bool | None
    """None where an answer is not simply right or wrong."""
    scores: dict[str, float] | None = None
    """Natural log of the probability of each answer behind the prompt, as it was compared but for thresholds."""
    text: str | None = None
    """What was generated."""
    batch: str | None = None
    """File that the question is from, where there are several."""


def likelihood_scores(
    scorer: Scorer, prompts: Sequence[str], answers: Sequence[str], normalize: Literal["none", "bytes"]
) -> np.ndarray:
    """Log probability of each answer as a whole behind each prompt, float64 [prompts, answers].

    Args:
      normalize: bytes divides by the answer's length in UTF-8, so that long answers are not at a disadvantage.

    Raises:
      UserError: the model gives something else than log probabilities.
    """
    requests = [Request(prompt, tuple(answers)) for prompt in prompts]
    totals = [[answer.total for answer in row] for row in scorer.continuations(requests)]
    scores = np.array(totals, np.float64).reshape(len(prompts), len(answers))
    check_finite(scorer, scores)
    return scores / [len(answer.encode()) for answer in answers] if normalize == "bytes" else scores


def choose(scores: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """The place of the best answer in each row; of equal ones, the first."""
    return (scores if offsets is None else scores + offsets).argmax(-1)


def fit_offsets(scores: np.ndarray, truth: np.ndarray, objective: Literal["accuracy", "macro_f1"]) -> np.ndarray:
    """What to add to each answer's score, the first answer's 0, so that these questions are answered best.

    Tries 0, values between quantiles of the differences to the first answer's score, and one beyond either end of
    them; of equally good ones it takes the smallest.

    Args:
      scores: [questions, answers] of development questions.
      truth: [questions] places of the right answers.
    """
    classes = scores.shape[1]
    differences = scores[:, :1] - scores[:, 1:]
    quantiles = [np.unique(np.quantile(column, np.linspace(0, 1, _CUTS))) for column in differences.T]
    cuts = [[0.0, q[0] - 1, *((q[1:] + q[:-1]) / 2), q[-1] + 1] for q in quantiles]
    candidates = np.array([(0.0, *rest) for rest in itertools.product(*cuts)])
    candidates = candidates[np.argsort(np.abs(candidates).sum(1), kind="stable")]
    predicted = np.stack([choose(scores, offsets) for offsets in candidates])
    if objective == "accuracy":
        goodness = (predicted == truth).mean(-1)
    else:
        goodness = measures.macro_f1(np.broadcast_to(truth, predicted.shape), predicted, classes)
    return candidates[goodness.argmax()]


def cross_validated(
    scores: np.ndarray, truth: np.ndarray, folds: Sequence[Sequence[int]], objective: Literal["accuracy", "macro_f1"]
) -> np.ndarray:
    """Predictions [questions] of each fold with offsets fitted on the others."""
    predicted = np.zeros(len(truth), np.int64)
    for fold in folds:
        others = np.setdiff1d(np.arange(len(truth)), fold)
        predicted[fold] = choose(scores[fold], fit_offsets(scores[others], truth[others], objective))
    return predicted


def read_label(text: str, labels: Sequence[str]) -> str:
    """The first of the labels that occurs in a text as a word, in any case, or UNANSWERED."""
    found = re.search(rf"\b({'|'.join(map(re.escape, labels))})\b", text, re.IGNORECASE)
    return found[1].lower() if found else UNANSWERED


def read_names(text: str) -> list[str]:
    """The names in a generated line, divided by semicolons, without white space and full stops around them."""
    names = [name.strip().rstrip(".").strip() for name in text.strip().partition("\n")[0].split(";")]
    return [name for name in dict.fromkeys(names) if name]
