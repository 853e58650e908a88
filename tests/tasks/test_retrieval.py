"""Retrieval measures: hand-worked ranks, scikit-learn's nDCG, and what finds what."""

from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from biomamba_jax.config.prepare import TextFields
from biomamba_jax.errors import UserError
from biomamba_jax.tasks import retrieval
from biomamba_jax.tasks.retrieval import Pair, query_measures
from biomamba_jax.tasks.statistics import Resampling

QUICK = Resampling(resamples=20)
PAIRS = [
    Pair("insulin in mice", "Mice were given insulin and their glucose fell."),
    Pair("aspirin and stroke", "Aspirin prevents stroke; insulin does not."),
    Pair("letter", "We read the article on warfarin."),
    Pair("letter", "A reply on warfarin."),
]


def test_measures_are_those_worked_out_by_hand():
    scores = np.array([[0.9, 0.8, 0.7, *np.linspace(0.6, 0.1, 9)]])
    relevance = np.zeros((1, 12))
    relevance[0, [1, 11]] = 1  # ranks 2 and 12
    found = {name: values.item() for name, values in query_measures(scores, relevance).items()}
    assert (found["recall_at_1"], found["recall_at_10"], found["recall_at_100"]) == (0, 0.5, 1)
    assert found["mrr"] == 0.5
    assert found["ndcg_at_10"] == pytest.approx((1 / np.log2(3)) / (1 + 1 / np.log2(3)))


def test_ndcg_is_that_of_scikit_learn():
    draw = np.random.default_rng(0)
    scores, relevance = draw.normal(size=(20, 40)), draw.integers(0, 4, (20, 40))
    assert query_measures(scores, relevance)["ndcg_at_10"].mean() == pytest.approx(ndcg_score(relevance, scores, k=10))


def test_equal_scores_give_no_credit():
    found = query_measures(np.zeros((1, 4)), np.array([[1, 0, 0, 0]]))
    assert (found["recall_at_1"].item(), found["mrr"].item()) == (0, 0.25)


def test_documents_of_equal_queries_are_all_relevant():
    ideal = np.eye(4)
    found = retrieval.measure(PAIRS, lambda block: ideal[block], QUICK)
    assert found["recall_at_1"].value == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
    assert found["mrr"].value == 1


def test_cosine_ignores_the_length_of_a_vector():
    vectors = {
        pair.query: scale * np.eye(4)[i] for i, (pair, scale) in enumerate(zip(PAIRS, (1, 9, 2, 2), strict=True))
    }
    vectors |= {pair.document: np.eye(4)[i] / (1 + i) for i, pair in enumerate(PAIRS)}
    score = retrieval.by_cosine(PAIRS, lambda texts: np.stack([vectors[text] for text in texts]))
    np.testing.assert_allclose(score(slice(0, 2)), np.eye(4)[:2], atol=1e-7)


def test_pairs_are_first_lines_and_the_rest_and_others_are_counted(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"q": "insulin", "d": "glucose fell", "pmid": 7}\n{"d": "no query"}\n')
    left_out = Counter()
    pairs = retrieval.read_pairs([str(path)], "-", TextFields(text="d", title="q"), left_out)
    assert pairs == [Pair("insulin", "glucose fell")]
    assert left_out == {"of one line": 1}
    path.write_text('{"d": "no query"}\n')
    with pytest.raises(UserError, match="--title"):
        retrieval.read_pairs([str(path)], "-", TextFields(text="d"), left_out)


def test_bm25_finds_shared_words_and_negatives_are_the_nearest_of_other_queries():
    assert retrieval.measure(PAIRS[:3], retrieval.by_words(PAIRS[:3]), QUICK)["recall_at_1"].value >= 2 / 3
    negatives = retrieval.hard_negatives(PAIRS, 2)
    assert negatives[0][0] == 1  # the other text with insulin
    assert not {2, 3} & {*negatives[2], *negatives[3]}
    assert retrieval.hard_negatives(PAIRS, 0) == [[], [], [], []]
