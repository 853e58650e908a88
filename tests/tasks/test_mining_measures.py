"""Measures of text mining equal those of the field's programs on the same predictions."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from biomamba_jax.config import ExamplesConfig
from biomamba_jax.config.heads import HeadConfig
from biomamba_jax.data.annotation_files import read_annotated
from biomamba_jax.data.annotations import AnnotatedText, Relation, Span, from_tags, tag_names
from biomamba_jax.tasks.mining_measures import answer_measures, auroc, correlations, entities, measure, micro, word_f1
from biomamba_jax.tasks.relations import candidates, predicted_relations
from biomamba_jax.tasks.statistics import Resampling

FEW = Resampling(resamples=200)


def random_tags(texts=60, seed=0):
    """True and predicted tags, also such as no file would have: an I after O or after another type."""
    random, names = np.random.default_rng(seed), tag_names(["x", "y"])
    true = [random.choice(names, random.integers(1, 12)).tolist() for _ in range(texts)]
    found = [[tag if random.random() < 0.7 else random.choice(names) for tag in tags] for tags in true]
    return true, found


def tagged(tags):
    words = [(place, place + 1) for place in range(len(tags))]
    return AnnotatedText("", "w" * len(tags), tuple(from_tags(words, tags)))


def test_entities_are_measured_as_by_seqeval():
    seqeval = pytest.importorskip("seqeval.metrics", reason="the [test] extra has it")
    true, found = random_tags()
    ours = entities([tagged(tags) for tags in true], [tagged(tags) for tags in found])
    theirs = seqeval.classification_report(true, found, output_dict=True)
    for name, values in (("micro avg", ours), *ours["types"].items()):
        expected = [theirs[name][key] for key in ("precision", "recall", "f1-score", "support")]
        assert [values[key] for key in ("precision", "recall", "f1", "gold")] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("found", "correct"),
    [
        (Span(2, 5, "x"), 1),
        (Span(2, 4, "x"), 0),  # too short
        (Span(1, 5, "x"), 0),
        (Span(2, 5, "y"), 0),  # another type
        (Span(2, 5, "x", ("D1",)), 1),  # concepts do not count
    ],
)
def test_an_entity_counts_with_its_borders_and_type_alone(found, correct):
    values = entities([AnnotatedText("", "abcdef", (Span(2, 5, "x"),))], [AnnotatedText("", "abcdef", (found,))])
    assert (values["correct"], values["predicted"], values["gold"], values["f1"]) == (correct, 1, 1, float(correct))


def test_the_interval_is_over_texts():
    """Ten texts of one entity, eight of them found: the percentiles of a mean of ten."""
    gold, found = [{1}] * 10, [{1}] * 8 + [{2}] * 2
    values = micro(gold, found, Resampling(resamples=4000))
    low, high = (stats.binom.ppf(q, 10, 0.8) / 10 for q in (0.025, 0.975))
    assert values["f1"] == pytest.approx(0.8)
    assert values["f1_low"] == pytest.approx(low, abs=0.101) and values["f1_high"] == pytest.approx(high, abs=0.101)
    assert micro([set()], [set()], FEW)["f1"] == 0.0


def test_sets_of_labels_are_measured_as_by_scikit_learn():
    random, labels = np.random.default_rng(0), ("a", "b", "c", "d")
    truth = random.random((80, 4)) < (0.2, 0.5, 0.7, 0.0)  # no text has the last label
    scores = np.round(np.clip(truth * 0.3 + random.random((80, 4)) * 0.7, 0, 1), 2)  # some are equal
    sets = [
        [{label for label, on in zip(labels, row, strict=True) if on} for row in each] for each in (truth, scores > 0.5)
    ]
    texts = [AnnotatedText("", "", labels=tuple(own)) for own in sets[0]]
    found = [
        AnnotatedText("", "", labels=tuple(own), scores=dict(zip(labels, row, strict=True)))
        for own, row in zip(sets[1], scores.tolist(), strict=True)
    ]
    ours = measure(HeadConfig("multi_label", labels), texts, found, FEW)
    for average in ("micro", "macro"):
        expected = metrics.f1_score(truth, scores > 0.5, average=average, zero_division=0)
        assert ours["f1" if average == "micro" else "macro_f1"] == pytest.approx(expected)
    assert (
        ours["auroc"] == pytest.approx(metrics.roc_auc_score(truth[:, :3], scores[:, :3])) and ours["auroc_labels"] == 3
    )
    assert auroc([True, True], [0.1, 0.2]) is None
    assert ours["f1_low"] < ours["f1"] < ours["f1_high"]


def test_relations_are_measured_without_the_negative_class():
    random = np.random.default_rng(0)
    truth, guess = (random.choice(["none", "up", "down"], 90) for _ in range(2))
    texts, found = ([AnnotatedText("", "", labels=(str(each),)) for each in column] for column in (truth, guess))
    ours = measure(HeadConfig("classifier", ("down", "none", "up")), texts, found, FEW, negative="none")
    expected = metrics.f1_score(truth, guess, labels=["up", "down"], average="micro")
    assert ours["f1"] == pytest.approx(expected) and set(ours["classes"]) == {"up", "down"}


def test_correlations_are_those_of_scipy():
    random = np.random.default_rng(0)
    truth = np.round(4 * random.random(40), 1)
    guess = truth + random.standard_normal(40)
    ours = correlations(truth, guess, FEW)
    assert ours["pearson"] == pytest.approx(stats.pearsonr(truth, guess).statistic)
    assert ours["spearman"] == pytest.approx(stats.spearmanr(truth, guess).statistic)
    assert ours["pearson_low"] < ours["pearson"] < ours["pearson_high"]
    assert correlations([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], FEW)["pearson"] is None


@pytest.mark.parametrize(
    ("truth", "answer", "expected"),
    [
        ("The p53 gene", "p53 gene.", 1.0),
        ("insulin", "insulin receptor", 2 / 3),
        ("a b b", "b b", 1.0),  # articles do not count
        ("b c c", "c", 0.5),
        ("the", "", 1.0),
        ("insulin", "", 0.0),
    ],
)
def test_the_words_of_an_answer_are_compared_as_for_squad(truth, answer, expected):
    assert word_f1(truth, answer) == pytest.approx(expected)


def test_answers_are_measured_by_the_first_one_and_by_their_rank():
    ours = answer_measures([["p53", "TP53"], ["EGFR"], ["Kras"]], [["tp53"], ["HER2", "egfr"], []], FEW)
    assert (ours["exact_match"], ours["f1"]) == pytest.approx((1 / 3, 1 / 3))
    assert (ours["strict"], ours["lenient"], ours["mrr"]) == pytest.approx((1 / 3, 2 / 3, (1 + 1 / 2) / 3))


def test_every_pair_of_concepts_is_a_candidate_with_its_mentions_marked():
    spans = (Span(0, 1, "C", ("c1",)), Span(4, 5, "D", ("d1", "d2")), Span(8, 9, "C", ("c2",)))
    document = AnnotatedText("7", "a > b > c", spans, relations=(Relation("CID", "c1", "d2"),))
    pairs = list(candidates(document, "CID", ("C", "D")))
    assert [(p.relations[0].head, p.relations[0].tail, *p.labels) for p in pairs] == [
        ("c1", "d1", "none"),
        ("c1", "d2", "CID"),
        ("c2", "d1", "none"),
        ("c2", "d2", "none"),
    ]
    assert pairs[0].text == "<< a >> > [[ b ]] > c" and pairs[3].text == "a > [[ b ]] > << c >>"
    assert predicted_relations(pairs) == {"7": {Relation("CID", "c1", "d2")}}


def test_on_the_sample_of_bc5cdrs_program_its_published_counts_are_found(shared_data):
    """bc5cdr_sample.tsv: PMID, predicted diseases and pairs of BC5CDR_Evaluation 0.0.3, of the public domain."""
    training = str(shared_data / "text_mining/bc5cdr/CDR_TrainingSet.PubTator.txt")
    gold = {text.key: text for text in read_annotated(training, ExamplesConfig(format="pubtator", types=["Disease"]))}
    true, found = [], []
    for line in (Path(__file__).parent / "bc5cdr_sample.tsv").read_text().splitlines():
        key, mentions, pairs = line.split("\t")
        spans = tuple(Span(*map(int, each.split("-")), "Disease") for each in mentions.split())
        relations = tuple(Relation("CID", *each.split(">")) for each in pairs.split())
        true.append(gold[key])
        found.append(AnnotatedText(key, gold[key].text, spans, (), relations))
    diseases = entities(true, found)
    assert [diseases[key] for key in ("correct", "predicted", "gold")] == [303, 303 + 105, 303 + 121]
    assert diseases["f1"] == pytest.approx(0.7283653846153848)
    related = micro([text.relations for text in true], [text.relations for text in found])
    assert [related[key] for key in ("correct", "predicted", "gold")] == [90, 90 + 533, 90 + 33]
    assert related["f1"] == pytest.approx(0.24128686327077747)
