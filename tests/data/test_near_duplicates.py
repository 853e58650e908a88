"""Near duplicates: what MinHash proposes and the texts' own similarity confirms, and nothing else."""

import itertools
import json
import random

import hypothesis
import numpy as np
import pytest
from corpora import documents, make_shards
from hypothesis import strategies as st
from nlm_xml import article, write_set

from biomamba_jax.config import PrepareConfig
from biomamba_jax.data.build import REMOVED_NAME
from biomamba_jax.data.near_duplicates import Bands, band_values, choose_bands, near_duplicates, similarity

VOCABULARY = [f"word{i}" for i in range(500)]


def prose(seed: object, words: int = 150) -> list[str]:
    return random.Random(str(seed)).choices(VOCABULARY, k=words)


def changed(words: list[str], times: int, seed: object) -> list[str]:
    random_, words = random.Random(str(seed)), list(words)
    for place in random_.sample(range(len(words)), times):
        words[place] = f"new{seed}"
    return words


def found_in(texts: list[str], threshold: float) -> dict[int, int]:
    values = band_values(texts, choose_bands(threshold))
    return {d.place: d.earlier for d in near_duplicates(iter(values.T), texts.__getitem__, threshold)}


def test_similarity_is_jaccard_s_of_runs_of_five_words():
    assert similarity("a b c d e f", "A b, c d e. F") == 1.0
    assert similarity("a b c d e f", "a b c d e g") == pytest.approx(1 / 3)
    assert similarity("a b c", "d e f") == 0.0


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_bands_find_a_pair_at_the_threshold_19_times_in_20(threshold):
    bands = choose_bands(threshold)
    assert bands.number * bands.rows <= 128
    assert 1 - (1 - threshold**bands.rows) ** bands.number >= 0.95


def test_at_a_threshold_of_0_8_there_are_the_18_bands_that_the_memory_is_reckoned_with():
    assert choose_bands(0.8) == Bands(18, 7)


def test_slightly_changed_copies_are_found_and_other_texts_are_not():
    """Against comparing all pairs: none is wrong, and at least 95 % of those at the threshold or above are found."""
    texts = [" ".join(prose(n)) for n in range(150)]
    for n in range(150):
        texts.append(" ".join(changed(prose(n), n % 8, n)))
    pairs = itertools.combinations(range(len(texts)), 2)
    expected = {(b, a) for a, b in pairs if b == a + 150 and similarity(texts[a], texts[b]) >= 0.7}
    found = set(found_in(texts, 0.7).items())
    assert found <= expected
    assert len(found) >= 0.95 * len(expected) > 80


@pytest.mark.parametrize(("threshold", "found"), [(0.5, {1: 0}), (0.51, {})])
def test_a_pair_of_just_the_threshold_s_similarity_is_a_near_duplicate(threshold, found):
    texts = ["a b c d e f g", "a b c d e f x"]  # two of four runs are shared
    one_band = iter([np.zeros(2, np.uint64)])
    assert {d.place: d.earlier for d in near_duplicates(one_band, texts.__getitem__, threshold)} == found


def test_a_chain_of_copies_leaves_the_first_and_what_is_unlike_it():
    first = prose(0, 200)
    texts = [" ".join(changed(first, times, "x")) for times in (0, 0, 1, 1)] + [" ".join(prose(1))]
    assert found_in(texts, 0.8) == {1: 0, 2: 0, 3: 0}


@hypothesis.given(st.lists(st.integers(0, 5), max_size=12))
@hypothesis.settings(max_examples=60)
def test_of_equal_texts_the_first_stays(which):
    texts = [" ".join(prose(n)) for n in which]
    expected = {i: which.index(n) for i, n in enumerate(which) if which.index(n) < i}
    assert found_in(texts, 0.9) == expected


def test_values_do_not_hang_on_the_texts_beside():
    texts = [" ".join(prose(n, n)) for n in range(1, 30)]
    bands = choose_bands(0.8)
    alone = np.concatenate([band_values([text], bands) for text in texts])
    np.testing.assert_array_equal(band_values(texts, bands), alone)
    assert band_values([], bands).shape == (0, 18)


def test_a_later_near_duplicate_is_left_out_counted_and_listed(tmp_path):
    """Across files, after versions and deletions were settled: what was replaced makes nothing a duplicate."""

    def record(pmid: int, words: list[str]) -> str:
        return article(pmid, f"<AbstractText>{' '.join(words)}</AbstractText>", title="")

    baseline = [record(pmid, prose(pmid)) for pmid in range(1, 60)]
    copies = [record(100 + pmid, changed(prose(pmid), 1, pmid)) for pmid in (7, 8)]
    write_set(tmp_path / "pubmed26n0001.xml", *baseline)
    write_set(tmp_path / "pubmed26n0002.xml", record(8, prose("rewritten")), *copies)
    settings = PrepareConfig(near_duplicates=0.8, train_tokenizer=275)
    inputs = [str(tmp_path / f"pubmed26n000{number}.xml") for number in (1, 2)]
    manifest = make_shards(inputs, tmp_path / "o", settings=settings, workers=2)
    assert manifest.filters["near_duplicate"] == 1
    assert {107, 108} & documents(tmp_path / "o").keys() == {108}
    (line,) = (tmp_path / "o" / REMOVED_NAME).read_text().splitlines()
    entry = json.loads(line)
    share = entry.pop("share")
    assert entry == {
        "reason": "near_duplicate",
        "pmid": 107,
        "version": 1,
        "source": "pubmed26n0002.xml",
        "repeats": "PMID 7",
    }
    assert 0.9 < share < 1
