"""Answers: the likeliest whole answer, thresholds from development questions, and answers read from text."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from biomamba_jax.errors import UserError
from biomamba_jax.tasks import answers
from biomamba_jax.tasks.scoring import Continuation


class Fixed:
    """A scorer that gives an answer the log probabilities of a table."""

    def __init__(self, table):
        self.table = table

    def continuations(self, requests):
        return [[Continuation(self.table[text], True) for text in request.continuations] for request in requests]


def test_an_answer_is_scored_as_a_whole():
    scorer = Fixed({" yes": (-1.0,), " not at all": (-0.2, -0.3, -0.1)})
    scores = answers.likelihood_scores(scorer, ["p"], [" yes", " not at all"], "none")
    assert scores == pytest.approx(np.array([[-1.0, -0.6]]))
    assert answers.choose(scores).tolist() == [1]


def test_normalised_scores_are_per_byte_of_the_answer():
    scores = answers.likelihood_scores(
        Fixed({" yes": (-2.0,), " später": (-4.0,)}), ["p"], [" yes", " später"], "bytes"
    )
    assert scores == pytest.approx(np.array([[-2 / 4, -4 / 8]]))


def questions(seed=0, count=300):
    """Scores of three answers that are informative, but biased against the second and the third."""
    random = np.random.default_rng(seed)
    truth = random.choice(3, count, p=[0.55, 0.34, 0.11])
    scores = random.normal(0, 1, (count, 3))
    scores[np.arange(count), truth] += 2
    return scores - np.array([0, 3, 5]), truth


@pytest.mark.parametrize("objective", ["accuracy", "macro_f1"])
def test_thresholds_undo_a_model_s_bias_towards_an_answer(objective):
    scores, truth = questions()
    offsets = answers.fit_offsets(scores, truth, objective)
    before, after = (np.mean(answers.choose(questions(1)[0], o) == questions(1)[1]) for o in (None, offsets))
    assert after > before + 0.1
    assert offsets[0] == 0


def test_thresholds_that_change_nothing_are_zero():
    scores, truth = np.array([[0.0, -9, -9], [-9, 0.0, -9], [-9, -9, 0.0]]), np.array([0, 1, 2])
    assert answers.fit_offsets(scores, truth, "accuracy").tolist() == [0, 0, 0]


def test_of_equally_good_thresholds_the_smallest_is_taken_and_of_equal_answers_the_first():
    scores = np.array([[0.0, 10], [0.0, 2]])  # quantiles of 0.2 from -10 to -2: between them all are equally good
    assert answers.fit_offsets(scores, np.array([1, 0]), "accuracy") == pytest.approx([0, -2.1])
    assert answers.choose(np.array([[1.0, 2, 2]])).tolist() == [1]


def test_a_fold_s_own_questions_do_not_set_its_thresholds():
    """Alone the third question is wrong without a threshold; one that was fitted on it too would answer it rightly."""
    scores, truth = np.array([[0.0, -9], [-9, 0.0], [0.0, -1]]), np.array([0, 1, 1])
    assert answers.choose(scores, answers.fit_offsets(scores, truth, "accuracy")).tolist() == [0, 1, 1]
    assert answers.cross_validated(scores, truth, [0, 1, 2], "accuracy").tolist() == [0, 1, 0]


def test_fitting_is_by_the_measure_that_was_asked_for():
    """Answering every question with 0 is right for 8 of 10; macro-F1 gains by 2 right ones of class 1 for 3 wrong."""
    scores = np.array([[0.0, -margin] for margin in [2, 2, 2, 9, 9, 9, 9, 9, 3, 3]])
    truth = np.array([0] * 8 + [1] * 2)
    fitted = {goal: answers.fit_offsets(scores, truth, goal) for goal in ("accuracy", "macro_f1")}
    assert fitted["accuracy"].tolist() == [0, 0]
    assert answers.choose(scores, fitted["macro_f1"]).tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("text", "label"),
    [(" Yes, because", "yes"), ("It is NO.", "no"), ("not known", "none"), ("maybe yes", "maybe"), ("", "none")],
)
def test_a_label_is_read_from_generated_text_as_a_whole_word(text, label):
    assert answers.read_label(text, ("yes", "no", "maybe")) == label


def test_names_are_read_from_the_first_line_only():
    assert answers.read_names(" BRCA1; TP53 ;BRCA1;; p53.\nQuestion: x; y") == ["BRCA1", "TP53", "p53"]


def test_scores_that_are_no_numbers_are_refused_by_the_model_s_name():
    scorer = Fixed({" yes": (math.nan,), " no": (-1.0,)})
    scorer.facts = SimpleNamespace(name="mine", path="some/folder", dtype="bfloat16")
    with pytest.raises(UserError, match=r"models\.mine: some/folder gives NaN .* in bfloat16"):
        answers.likelihood_scores(scorer, ["p"], [" yes", " no"], "none")
