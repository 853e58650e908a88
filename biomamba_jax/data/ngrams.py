"""Unigram and bigram baselines with add-k smoothing, on exactly the tokens that a trained model predicts.

Every token of a held-out document is predicted, its first (after the start token, as for the model) and its final EOS
included:
    unigram p(t) = (n(t) + k) / (N + k V)          bigram p(t | s) = (n(s, t) + k) / (n(s) + k V)
The counts are the training split's; k is a fixed number for each, never fitted to the held-out text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, log

import numpy as np

from biomamba_jax.data.shards import ShardReader

UNIGRAM_K, BIGRAM_K = 1.0, 0.05
_BLOCK = 8192  # documents whose tokens are in memory at a time


@dataclass(frozen=True)
class Baseline:
    """A baseline's result on held-out text."""

    name: str
    """Kind of model and its k."""
    perplexity: float
    """Per token."""
    bits_per_byte: float
    """Per UTF-8 byte."""
    tokens: int
    """Number of predicted tokens."""


def ngram_baselines(
    train: ShardReader,
    heldout: ShardReader,
    *,
    vocab_size: int,
    unigram_k: float = UNIGRAM_K,
    bigram_k: float = BIGRAM_K,
) -> list[Baseline]:
    """Evaluate unigram and bigram models of `train` on `heldout`.

    Args:
      train: documents to count.
      heldout: at least one document to predict; its pairs are held in memory.
      vocab_size: V, one more than the largest id.
      unigram_k: added to the count of every token.
      bigram_k: added to the count of every pair of tokens.
    """
    firsts, seconds = zip(*_token_pairs(heldout), strict=True)
    wanted, times = np.unique(np.concatenate(firsts) * vocab_size + np.concatenate(seconds), return_counts=True)
    first, second = np.divmod(wanted, vocab_size)

    single, before = np.zeros((2, vocab_size), np.int64)  # n(t) and n(s)
    together = np.zeros(len(wanted) + 1, np.int64)  # n(s, t) of held-out pairs; the last entry counts all others
    for previous, token in _token_pairs(train):
        single += np.bincount(token, minlength=vocab_size)
        before += np.bincount(previous, minlength=vocab_size)
        pair = previous * vocab_size + token
        place = np.minimum(np.searchsorted(wanted, pair), len(wanted) - 1)
        together += np.bincount(np.where(wanted[place] == pair, place, len(wanted)), minlength=len(together))

    unigram = (single[second] + unigram_k) / (single.sum() + unigram_k * vocab_size)
    bigram = (together[:-1] + bigram_k) / (before[first] + bigram_k * vocab_size)
    tokens = int(times.sum())
    num_bytes = sum(heldout[i].num_bytes for i in range(len(heldout)))
    results = []
    for name, k, probability in (("unigram", unigram_k, unigram), ("bigram", bigram_k, bigram)):
        nats = -float(times @ np.log(probability))
        results.append(Baseline(f"{name}, add-{k:g}", exp(nats / tokens), nats / log(2) / num_bytes, tokens))
    return results


def _token_pairs(reader: ShardReader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield blocks of (previous token, predicted token), each int64 [tokens of some documents]."""
    for start in range(0, len(reader), _BLOCK):
        documents = [reader[i] for i in range(start, min(start + _BLOCK, len(reader)))]
        pairs = np.concatenate([(document.inputs, document.targets) for document in documents], axis=1, dtype=np.int64)
        yield pairs[0], pairs[1]
