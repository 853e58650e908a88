"""Perplexity and bits per byte of whole documents.

Every token of every document counts once, its end included; nothing is averaged over batches. Perplexity is per token,
so it depends on the tokenizer as much as on the model: of two equally good models, the one whose tokenizer splits a
text into more tokens has the lower perplexity. Bits per byte divide the same total by the bytes of the text, which no
tokenizer changes.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from biomamba_jax.ops.cross_entropy import perplexity
from biomamba_jax.tasks.documents import Document
from biomamba_jax.tasks.scoring import DocumentsScore, Scorer, check_finite
from biomamba_jax.tasks.statistics import Estimate, Resampling, bootstrap, difference_of_ratios, ratio_of_sums


@dataclass(frozen=True)
class DomainScores:
    """Negative log-likelihoods of the documents of a domain; arrays [documents] in their order."""

    nats: np.ndarray
    """Negative log-likelihood of each document in nats, its end included."""
    tokens: np.ndarray
    """Number of predicted tokens of each document."""
    bytes: np.ndarray
    """Length of each document in UTF-8."""
    words: np.ndarray
    """Number of words of each document."""
    position_nats: np.ndarray
    """Sum of the nats of all tokens at positions 0, 1, 2-3, 4-7, 8-15, ... of their documents, [ranges]."""
    position_tokens: np.ndarray
    """Number of tokens at these positions, [ranges]."""
    seconds: float
    """Time that scoring took."""


def score_domain(scorer: Scorer, documents: Sequence[Document], score: DocumentsScore | None = None) -> DomainScores:
    """Score every document once; memory does not grow with their length.

    Args:
      scorer: the model.
      documents: the domain's documents.
      score: the scorer's method that yields the nats of each token; default: its `documents`.

    Raises:
      UserError: a log-likelihood is NaN or infinite.
    """
    start = time.perf_counter()
    nats, tokens = np.zeros(len(documents)), np.zeros(len(documents), np.int64)
    positions = np.zeros((2, 64))
    for index, values in (score or scorer.documents)([document.text for document in documents]):
        nats[index], tokens[index] = values.sum(), len(values)
        bins = np.frexp(np.arange(len(values)))[1]  # 0 -> 0, 1 -> 1, 2-3 -> 2, 4-7 -> 3
        positions += np.bincount(bins, values, 64), np.bincount(bins, minlength=64)
    check_finite(scorer, nats)
    used = np.count_nonzero(positions[1])  # the first ranges, without gaps
    return DomainScores(
        nats=nats,
        tokens=tokens,
        bytes=np.array([document.bytes for document in documents]),
        words=np.array([document.words for document in documents]),
        position_nats=positions[0, :used],
        position_tokens=positions[1, :used].astype(np.int64),
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class DomainMeasures:
    """Figures of one model on one domain, each with its bootstrap interval over documents."""

    cross_entropy: Estimate
    """Nats per token."""
    perplexity: Estimate
    """exp(cross_entropy), per token."""
    bits_per_byte: Estimate
    """Bits per UTF-8 byte of the text."""
    bits_per_word: Estimate
    """Bits per word of the text."""
    tokens: int
    """Number of predicted tokens."""
    tokens_per_second: float
    """Speed of scoring."""
    positions: list[dict[str, float]]
    """For each range of positions in a document: {"from", "to" (inclusive), "tokens", "cross_entropy"}."""
    pll_word_l2r: "DomainMeasures | None" = None
    """The same figures by PLL-word-l2r, of a masked model; those above are by the measure of Salazar et al."""


def measure(scores: DomainScores, resampling: Resampling) -> DomainMeasures:
    """Return the figures of a domain.

    Args:
      scores: the model's scores.
      resampling: of the intervals.
    """

    def per(denominator: np.ndarray) -> Estimate:
        return bootstrap(ratio_of_sums, scores.nats, denominator, resampling=resampling)

    cross_entropy = per(scores.tokens)
    positions = [
        {"from": 2 ** (i - 1) if i else 0, "to": 2**i - 1, "tokens": int(tokens), "cross_entropy": float(nats / tokens)}
        for i, (nats, tokens) in enumerate(zip(scores.position_nats, scores.position_tokens, strict=True))
    ]
    return DomainMeasures(
        cross_entropy=cross_entropy,
        perplexity=cross_entropy.map(perplexity),
        bits_per_byte=per(scores.bytes).map(_bits),
        bits_per_word=per(scores.words).map(_bits),
        tokens=int(scores.tokens.sum()),
        tokens_per_second=float(scores.tokens.sum()) / max(scores.seconds, 1e-9),
        positions=positions,
    )


@dataclass(frozen=True)
class Comparison:
    """Paired comparison of two models on the same documents, resampled together: tighter than two intervals."""

    reference: str
    """Name of the reference model."""
    bits_per_byte: Estimate
    """This model's minus the reference's; negative: this model predicts the text better."""
    perplexity_ratio: Estimate | None
    """The reference's perplexity over this model's; None unless both split every document into as many tokens."""


def compare(reference: str, first: DomainScores, second: DomainScores, resampling: Resampling) -> Comparison:
    """Compare the second model with the first.

    Args:
      reference: the first model's name.
      first: scores of the reference.
      second: scores of the other model on the same documents.
      resampling: of the intervals.
    """
    difference = bootstrap(difference_of_ratios, second.nats, first.nats, first.bytes, resampling=resampling)
    ratio = None
    if np.array_equal(first.tokens, second.tokens):
        fall = bootstrap(difference_of_ratios, first.nats, second.nats, first.tokens, resampling=resampling)
        ratio = fall.map(perplexity)
    return Comparison(reference, difference.map(_bits), ratio)


def _bits(nats: float) -> float:
    return nats / math.log(2)
