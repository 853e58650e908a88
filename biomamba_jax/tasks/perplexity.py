"""Perplexity of whole documents: how well a model predicts a text, token-weighted and comparable between models.

Every token of every document counts once, its end included; nothing is averaged over batches. Perplexity is per token,
so it says as much about the tokenizer as about the model: of two equally good models, the one whose tokenizer cuts a
text into more and easier tokens has the lower perplexity. Bits per byte divide the same total by the bytes of the text,
which no tokenizer changes.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from biomamba_jax.tasks.documents import Document
from biomamba_jax.tasks.scoring import Scorer, check_finite
from biomamba_jax.tasks.statistics import Estimate, Resampling, bootstrap, difference_of_ratios, ratio_of_sums


@dataclass(frozen=True)
class DomainScores:
    """What a model makes of the documents of a domain; arrays [documents] in their order."""

    nats: np.ndarray
    """Negative log likelihood of each document, its end included."""
    tokens: np.ndarray
    """Tokens that it was predicted in."""
    bytes: np.ndarray
    words: np.ndarray
    position_nats: np.ndarray
    """Nats of all tokens at places 0, 1, 2-3, 4-7, 8-15, ... of their documents."""
    position_tokens: np.ndarray
    """How many tokens that are."""
    seconds: float


def score_domain(scorer: Scorer, documents: Sequence[Document]) -> DomainScores:
    """Scores every document once; memory does not grow with their length.

    Raises:
      UserError: the model gives something else than log probabilities.
    """
    start = time.perf_counter()
    nats, tokens = np.zeros(len(documents)), np.zeros(len(documents), np.int64)
    places = np.zeros((2, 64))
    for index, values in scorer.documents([document.text for document in documents]):
        nats[index], tokens[index] = values.sum(), len(values)
        bins = np.frexp(np.arange(len(values)))[1]  # 0 -> 0, 1 -> 1, 2-3 -> 2, 4-7 -> 3
        places += np.bincount(bins, values, 64), np.bincount(bins, minlength=64)
    check_finite(scorer, nats)
    used = int(np.flatnonzero(places[1])[-1]) + 1 if places[1].any() else 0
    return DomainScores(
        nats=nats,
        tokens=tokens,
        bytes=np.array([document.bytes for document in documents]),
        words=np.array([document.words for document in documents]),
        position_nats=places[0, :used],
        position_tokens=places[1, :used].astype(np.int64),
        seconds=time.perf_counter() - start,
    )


def exp(value: float) -> float:
    """exp, infinite where that overflows, and NaN of NaN."""
    return math.inf if value >= 700 else math.exp(value)


@dataclass(frozen=True)
class DomainMeasures:
    """Figures of one model on one domain, each with its bootstrap interval over documents."""

    cross_entropy: Estimate
    """Nats per token."""
    perplexity: Estimate
    """exp(cross_entropy), per token."""
    bits_per_byte: Estimate
    bits_per_word: Estimate
    tokens: int
    tokens_per_second: float
    positions: list[dict[str, float]]
    """For each range of places in a document: {"from", "to" (inclusive), "tokens", "cross_entropy"}."""


def measure(scores: DomainScores, resampling: Resampling) -> DomainMeasures:
    """The figures of a domain."""

    def per(denominator: np.ndarray) -> Estimate:
        return bootstrap(ratio_of_sums, scores.nats, denominator, resampling=resampling)

    cross_entropy = per(scores.tokens)
    positions = [
        {"from": 2 ** (i - 1) if i else 0, "to": 2**i - 1, "tokens": int(tokens), "cross_entropy": float(nats / tokens)}
        for i, (nats, tokens) in enumerate(zip(scores.position_nats, scores.position_tokens, strict=True))
    ]
    return DomainMeasures(
        cross_entropy=cross_entropy,
        perplexity=cross_entropy.map(exp),
        bits_per_byte=per(scores.bytes).map(_bits),
        bits_per_word=per(scores.words).map(_bits),
        tokens=int(scores.tokens.sum()),
        tokens_per_second=float(scores.tokens.sum()) / max(scores.seconds, 1e-9),
        positions=positions,
    )


@dataclass(frozen=True)
class Comparison:
    """Two models on the same documents, which are resampled together: much surer than two intervals side by side."""

    reference: str
    bits_per_byte: Estimate
    """This model's minus the reference's; below 0: this model predicts the text better."""
    perplexity_ratio: Estimate | None
    """The reference's perplexity over this model's; None unless both cut every document into as many tokens."""


def compare(reference: str, first: DomainScores, second: DomainScores, resampling: Resampling) -> Comparison:
    """The second model's figures relative to the first's, named `reference`."""
    difference = bootstrap(difference_of_ratios, second.nats, first.nats, first.bytes, resampling=resampling)
    ratio = None
    if np.array_equal(first.tokens, second.tokens):
        fall = bootstrap(difference_of_ratios, first.nats, second.nats, first.tokens, resampling=resampling)
        ratio = fall.map(exp)
    return Comparison(reference, difference.map(_bits), ratio)


def _bits(nats: float) -> float:
    return nats / math.log(2)
