"""The official measures: PubMedQA's against scikit-learn, BioASQ's against cases worked by hand."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from biomamba_jax.tasks import measures

LABELS = ("yes", "no", "maybe")


@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from([*LABELS, "none"])), min_size=1, max_size=40))
def test_accuracy_and_macro_f1_are_scikit_learn_s(pairs):
    """What the official evaluation script of PubMedQA calls, also where a class never occurs or an answer is none."""
    sklearn = pytest.importorskip("sklearn.metrics", reason="the oracle")
    truth, predicted = zip(*pairs, strict=True)
    ours = measures.classification(truth, predicted)
    assert ours.accuracy == pytest.approx(sklearn.accuracy_score(truth, predicted))
    assert ours.macro_f1 == pytest.approx(sklearn.f1_score(truth, predicted, average="macro", zero_division=0))


def test_measures_of_each_class_worked_by_hand():
    ours = measures.classification(["yes", "yes", "yes", "no"], ["yes", "yes", "no", "no"])
    assert ours.classes["yes"] == (1.0, pytest.approx(2 / 3), pytest.approx(0.8), 3)
    assert ours.classes["no"] == (0.5, 1.0, pytest.approx(2 / 3), 1)
    assert ours.confusion == {"yes": {"yes": 2, "no": 1}, "no": {"yes": 0, "no": 1}}


def test_always_yes_scores_what_the_majority_does_on_the_official_500():
    truth = ["yes"] * 276 + ["no"] * 169 + ["maybe"] * 55
    ours = measures.classification(truth, ["yes"] * 500)
    assert (ours.accuracy, ours.macro_f1) == (0.552, pytest.approx(0.2371, abs=1e-4))


def test_resampled_macro_f1_of_the_sample_itself_is_its_macro_f1():
    truth, predicted = ["yes", "no", "no", "maybe", "yes"], ["yes", "no", "yes", "no", "yes"]
    columns = measures.encode(LABELS, truth, predicted)
    both = measures.macro_f1(*(np.stack([column, column[::-1]]) for column in columns), 3)
    assert both == pytest.approx([measures.classification(truth, predicted).macro_f1] * 2)


def test_a_class_that_a_resample_lacks_counts_with_an_f1_of_0():
    yes = np.zeros(4, int)
    assert measures.macro_f1(yes, yes, 2) == 0.5


@pytest.mark.parametrize(
    ("text", "read"),
    [("yes", "yes"), ("Yes, it does.", "yes"), ("NO", "no"), ("no, yes", "yes"), ("unknown", "no"), ("?", "none")],
)
def test_yes_and_no_are_read_as_bioasq_does(text, read):
    assert measures.read_yesno(text) == read


def test_bioasq_yes_no_worked_by_hand():
    # Golden yes x 3, no x 1. Right: two yes. The unanswered yes counts as no, the no answered yes as yes.
    found = measures.yesno(["yes", "yes", "yes", "no"], ["Yes", "yes", "", "yes"])
    # F1 yes: 2*2 / (2*2 + 1 missed + 1 false) = 2/3; F1 no: no true positive.
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx(1 / 3), "f1_yes": pytest.approx(2 / 3), "f1_no": 0.0}


GOLD = [["BRCA1", "Breast cancer 1"], ["TP53", "p53"]]

FACTOIDS = {
    "right at once": (["brca1"], (1, 1, 1)),
    "a synonym in another case": (["BREAST CANCER 1"], (1, 1, 1)),
    "right in second place": (["egfr", "BRCA1"], (0, 1, 1 / 2)),
    "right in fifth place": (["a", "b", "c", "d", "p53"], (0, 1, 1 / 5)),
    "sixth answers do not count": (["a", "b", "c", "d", "e", "p53"], (0, 0, 0)),
    "part of a name is not the name": (["BRCA"], (0, 0, 0)),
    "white space is not forgiven": ([" brca1"], (0, 0, 0)),
    "no answer": ([], (0, 0, 0)),
}


@pytest.mark.parametrize("case", FACTOIDS)
def test_factoids_worked_by_hand(case):
    answers, expected = FACTOIDS[case]
    assert measures.factoid(GOLD, answers) == pytest.approx(expected)


LISTS = {
    "all of them, by synonyms": (GOLD, ["P53", "breast cancer 1"], (1, 1)),
    "one of two": (GOLD, ["tp53"], (1, 1 / 2)),
    "one right, one wrong": (GOLD, ["tp53", "egfr"], (1 / 2, 1 / 2)),
    "two names of one item: the second is false": (GOLD, ["tp53", "p53"], (1 / 2, 1 / 2)),
    "all wrong": (GOLD, ["egfr"], (0, 0)),
    "none given": (GOLD, [], (0, 0)),
    # Both golden items are called x. The first x takes one; the other golden item is not missed, since x names it too.
    "one name of two golden items": ([["x"], ["x", "y"]], ["x"], (1, 1)),
    "two names for two items that share one": ([["x"], ["x", "y"]], ["x", "y"], (1, 1)),
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_worked_by_hand(case):
    golden, answers, (precision, recall) = LISTS[case]
    f1 = 2 * precision * recall / (precision + recall) if precision and recall else 0
    assert measures.list_measures(golden, answers) == pytest.approx((precision, recall, f1))


# What ROUGE-1.5.5 -n 4 -2 4 -u prints, as BioASQ runs it: text in ASCII, no stemming, one file an answer.
OFFICIAL_ROUGE = {
    "words in another order": (
        "Insulin lowers serum glucose in mice.",
        ["In mice, serum glucose is lowered by insulin."],
        (0.28571, 0.33333, 0.15625, 0.19231),
    ),
    "hyphens, capitals and digits": (
        "IL-6 and TNF-alpha rose by 2.5 mg/l",
        ["The IL 6 level rose 2.5-fold, TNF alpha did not."],
        (0.27273, 0.28572, 0.25, 0.26415),
    ),
    "Greek letters": (
        "β-cell mass fell in naïve mice",
        ["the beta-cell mass of naive mice fell"],
        (0.14286, 0.16667, 0.21875, 0.26923),
    ),
    "repeated words": (
        "the the the cell the cell",
        ["the cell of the mouse and the cell of the rat"],
        (0.2, 0.26667, 0.24, 0.34286),
    ),
    "two golden answers": (
        "BRCA1 is a tumour suppressor gene on chromosome 17.",
        ["BRCA1 is a gene on chromosome 17.", "It is a tumour suppressor."],
        (0.8, 0.61538, 0.75, 0.51724),
    ),
    "no word in common": ("yes", ["the gene is not expressed"], (0, 0, 0, 0)),
    "one word: the last one counts in pairs only": ("insulin", ["insulin"], (0, 0, 0, 0)),
    "equal": ("Insulin lowers serum glucose.", ["insulin lowers serum glucose"], (1, 1, 1, 1)),
    "nothing": ("", ["insulin lowers serum glucose"], (0, 0, 0, 0)),
}


@pytest.mark.parametrize("case", OFFICIAL_ROUGE)
def test_ideal_answers_are_scored_as_the_official_program_does(case):
    answer, golden, official = OFFICIAL_ROUGE[case]
    found = (*measures.rouge_2(golden, answer), *measures.rouge_su4(golden, answer))
    assert found == pytest.approx(official, abs=1.1e-5)  # it prints five digits, F1 from rounded ones


def test_rouge_2_of_one_golden_text_is_that_of_rouge_score():
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="the oracle").RougeScorer(["rouge2"])
    draw = random.Random(0)
    for _ in range(50):
        texts = [
            " ".join(draw.choices(["insulin", "the", "IL-6", "mice.", "p<0.05", "of"], k=draw.randint(0, 30)))
            for _ in range(2)
        ]
        theirs = scorer.score(*texts)["rouge2"]
        assert measures.rouge_2(texts[:1], texts[1]) == pytest.approx((theirs.recall, theirs.fmeasure))
