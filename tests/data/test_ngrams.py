"""Unigram and bigram baselines against counting one token at a time."""

import random
from collections import Counter
from math import exp, isclose, log

import numpy as np
import pytest

from biomamba_jax.data import ngrams
from biomamba_jax.data.ngrams import ngram_baselines
from biomamba_jax.data.shards import Document, ShardReader, write_documents

V, EOS, START = 7, 0, 6


def write(folder, documents) -> ShardReader:
    write_documents(folder, (Document(np.array(ids), None, None, 0, 2 * len(ids)) for ids in documents))
    return ShardReader(folder, start_id=START)


@pytest.mark.parametrize("block", [1, 3, 8192])
def test_perplexity_and_bits_per_byte_are_those_of_the_plain_sums(tmp_path, monkeypatch, block):
    monkeypatch.setattr(ngrams, "_BLOCK", block)
    draw = random.Random(0)
    train = [[*draw.choices(range(1, V), k=draw.randint(0, 9)), EOS] for _ in range(20)]
    heldout = [[*draw.choices(range(1, V), k=draw.randint(0, 9)), EOS] for _ in range(5)]
    pairs = [pair for ids in train for pair in zip([START, *ids], ids, strict=False)]
    n1, n2, before = Counter(t for _, t in pairs), Counter(pairs), Counter(s for s, _ in pairs)
    nats = [0.0, 0.0]
    for ids in heldout:
        for s, t in zip([START, *ids], ids, strict=False):
            nats[0] -= log((n1[t] + 2) / (len(pairs) + 2 * V))
            nats[1] -= log((n2[s, t] + 0.5) / (before[s] + 0.5 * V))
    tokens = sum(map(len, heldout))
    results = ngram_baselines(
        write(tmp_path / "a", train),
        write(tmp_path / "b", heldout),
        vocab_size=V,
        unigram_k=2,
        bigram_k=0.5,
    )
    for result, expected in zip(results, nats, strict=True):
        assert result.tokens == tokens
        assert isclose(result.perplexity, exp(expected / tokens), rel_tol=1e-12)
        assert isclose(result.bits_per_byte, expected / log(2) / (2 * tokens), rel_tol=1e-12)
    assert [result.name for result in results] == ["unigram, add-2", "bigram, add-0.5"]


def test_a_certain_bigram_has_perplexity_near_one(tmp_path):
    train, heldout = write(tmp_path / "a", [[1, 2, 3, EOS]] * 500), write(tmp_path / "b", [[1, 2, 3, EOS]])
    unigram, bigram = ngram_baselines(train, heldout, vocab_size=V)
    assert isclose(unigram.perplexity, 4, rel_tol=0.01)
    assert bigram.perplexity < 1.01
