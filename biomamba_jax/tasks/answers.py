"""Answers of a model: the most likely of given answers, or an answer read from generated text.

Thresholds are offsets added to the answers' scores. They are fitted on development questions only; how much they help
is measured there by cross-validation (fitted on nine folds, applied to the tenth), never on the test set.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from biomamba_jax.tasks import measures
from biomamba_jax.tasks.scoring import Request, Scorer, check_finite

Objective = Literal["accuracy", "macro_f1"]

UNANSWERED = "none"
"""Label of a generated text that contains none of the answers."""
_QUANTILES = 41
"""Quantiles of the score differences, between which thresholds are tried."""


@dataclass(frozen=True)
class Prediction:
    """The answer to one question, as it is saved."""

    key: str
    """The question's identifier in its file."""
    truth: str | list[list[str]]
    """The correct label, or the correct names with their synonyms."""
    prediction: str | list[str]
    """The predicted label or names."""
    correct: bool | None
    """None for list answers, which are partly correct."""
    scores: dict[str, float] | None = None
    """Log-likelihood of each answer after the prompt, normalized as they were compared, without thresholds."""
    text: str | None = None
    """Generated text."""
    batch: str | None = None
    """The question's file, where there are several."""


def label_predictions(
    keys: Sequence[str], truth: Sequence[str], predicted: Sequence[str], **columns: Sequence[Any] | None
) -> list[Prediction]:
    """Return the predictions of questions that have one correct label.

    Args:
      keys: the questions' identifiers.
      truth: their correct labels.
      predicted: their predicted labels.
      **columns: further fields of `Prediction`, one value a question; None for a field that is not set.
    """
    given = {name: column for name, column in columns.items() if column is not None}
    return [
        Prediction(*each, each[1] == each[2], **{name: column[index] for name, column in given.items()})
        for index, each in enumerate(zip(keys, truth, predicted, strict=True))
    ]


def score_table(labels: Sequence[str], scores: np.ndarray) -> list[dict[str, float]]:
    """Return the score of each label, for each row of `scores` [questions, labels]."""
    return [dict(zip(labels, row, strict=True)) for row in scores.tolist()]


def likelihood_scores(
    scorer: Scorer, prompts: Sequence[str], answers: Sequence[str], normalize: Literal["none", "bytes"] = "none"
) -> np.ndarray:
    """Return the log-likelihood of each whole answer after each prompt, float64 [prompts, answers], in nats.

    Args:
      scorer: the model.
      prompts: texts before the answer.
      answers: possible answers, their leading space included.
      normalize: bytes divides by the answer's length in UTF-8, so that long answers are not at a disadvantage.

    Raises:
      UserError: a log-likelihood is NaN or infinite.
    """
    requests = [Request(prompt, tuple(answers)) for prompt in prompts]
    totals = [[answer.total for answer in row] for row in scorer.continuations(requests)]
    scores = np.array(totals, np.float64).reshape(len(prompts), len(answers))
    check_finite(scorer, scores)
    return scores / [len(answer.encode()) for answer in answers] if normalize == "bytes" else scores


def choose(scores: np.ndarray, offsets: np.ndarray | None = None) -> np.ndarray:
    """Return the index of the best answer in each row, the first of equal ones."""
    return (scores if offsets is None else scores + offsets).argmax(-1)


def fit_offsets(scores: np.ndarray, truth: np.ndarray, objective: Objective) -> np.ndarray:
    """Fit offsets of the answers' scores that maximize the objective on development questions.

    The first answer's offset is 0. The others' candidates are 0, the midpoints between quantiles of the differences to
    the first answer's score, and one value beyond either end; of equally good candidates the smallest is taken.

    Args:
      scores: [questions, answers] of development questions.
      truth: [questions] indices of the correct answers.
      objective: what to maximize.

    Returns:
      Offsets [answers].
    """
    differences = scores[:, :1] - scores[:, 1:]
    quantiles = [np.unique(np.quantile(column, np.linspace(0, 1, _QUANTILES))) for column in differences.T]
    cuts = [[0.0, q[0] - 1, *((q[1:] + q[:-1]) / 2), q[-1] + 1] for q in quantiles]
    candidates = np.array([(0.0, *rest) for rest in itertools.product(*cuts)])
    candidates = candidates[np.argsort(np.abs(candidates).sum(1), kind="stable")]
    predicted = np.stack([choose(scores, offsets) for offsets in candidates])
    if objective == "accuracy":
        goodness = (predicted == truth).mean(-1)
    else:
        goodness = measures.macro_f1(np.broadcast_to(truth, predicted.shape), predicted, scores.shape[1])
    return candidates[goodness.argmax()]


def cross_validated(scores: np.ndarray, truth: np.ndarray, folds: Sequence[int], objective: Objective) -> np.ndarray:
    """Return predictions [questions]: those of each fold with offsets fitted on the others; `folds` names each's."""
    predicted = np.zeros(len(truth), np.int64)
    for fold in set(folds):
        inside = np.equal(folds, fold)
        predicted[inside] = choose(scores[inside], fit_offsets(scores[~inside], truth[~inside], objective))
    return predicted


def read_label(text: str, labels: Sequence[str]) -> str:
    """Return the first label that occurs in the text as a whole word, in any case, or UNANSWERED."""
    found = re.search(rf"\b({'|'.join(map(re.escape, labels))})\b", text, re.IGNORECASE)
    return found[1].lower() if found else UNANSWERED


def read_names(text: str) -> list[str]:
    """Return the names in a generated line: separated by semicolons, without white space and full stops around them."""
    names = [name.strip().rstrip(".").strip() for name in text.strip().partition("\n")[0].split(";")]
    return [name for name in dict.fromkeys(names) if name]
