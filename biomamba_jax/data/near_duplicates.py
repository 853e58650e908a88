"""Near duplicates: MinHash LSH proposes pairs of documents, the exact Jaccard similarity of their texts decides.

While files are spooled, every document gets the LSH band hashes of its MinHash (STEM.bands.npy). Documents that share a
band hash are compared; with the number of bands chosen here, a pair at the threshold shares at least one with a
probability of 95 % or more. A hash alone never removes a document.

One band of all documents is in memory at a time: 8 bytes each and 40 while they are sorted, 1.3 GB for the 27 million
abstracts of PubMed. On disk all 18 bands (at a threshold of 0.8) take 3.9 GB.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import rensa

from biomamba_jax.data.shingles import shingles

WORDS = 5
_HASHES = 128
_RECALL = 0.95
_SEED = 1
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


class Bands(NamedTuple):
    """Shape of the LSH bands."""

    number: int
    """Number of bands."""
    rows: int
    """MinHash values in a band."""


class NearDuplicate(NamedTuple):
    """A document that repeats an earlier one; both by their index among all documents."""

    place: int
    """The document."""
    earlier: int
    """The document that it repeats."""
    similarity: float
    """Jaccard similarity."""


def choose_bands(threshold: float) -> Bands:
    """Return the most selective bands that find a pair of similarity `threshold` with a probability of `_RECALL`."""
    for rows in range(_HASHES, 0, -1):
        bands = Bands(_HASHES // rows, rows)
        if 1 - (1 - threshold**bands.rows) ** bands.number >= _RECALL:
            return bands
    return Bands(_HASHES, 1)


def band_values(texts: Sequence[str], bands: Bands) -> np.ndarray:
    """Return LSH band hashes, uint64 [texts, bands.number]; similar documents share at least one."""
    if not texts:
        return np.zeros((0, bands.number), np.uint64)
    runs, offsets = shingles(texts, WORDS)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        runs, offsets.astype(np.uint64), bands.number * bands.rows, _SEED
    )
    hashes = np.array(matrix.to_rows(), np.uint64).reshape(len(texts), bands.number, bands.rows)
    values = np.zeros(hashes.shape[:2], np.uint64)
    for row in range(bands.rows):
        values = values * _FACTOR + hashes[:, :, row]
    return values


def similarity(one: str, other: str) -> float:
    """Return the Jaccard similarity of two texts' sets of runs of `WORDS` words."""
    first, second = (set(shingles([text], WORDS)[0].tolist()) for text in (one, other))
    return len(first & second) / len(first | second)


def near_duplicates(
    band_columns: Iterator[np.ndarray], read: Callable[[int], str], threshold: float
) -> Iterator[NearDuplicate]:
    """Yield the documents that repeat an earlier one, in order.

    A document is compared with the first and the last one before it that share a band hash. If such a document is
    a near duplicate itself, the document that it repeats takes its place, so `earlier` is always a kept document.

    Args:
      band_columns: for each band its hashes, uint64 [documents]; only one column is held at a time.
      read: returns the text of a document by its index.
      threshold: least similarity of a near duplicate.
    """
    pairs = np.unique(np.concatenate([np.zeros((0, 2), np.int64), *map(_pairs, band_columns)]), axis=0)
    stands_for: dict[int, int] = {}
    for place in np.split(pairs, np.flatnonzero(np.diff(pairs[:, 0])) + 1) if len(pairs) else []:
        later = int(place[0, 0])
        best = (0.0, 0)
        for earlier in sorted({stands_for.get(other, other) for other in place[:, 1].tolist()}):
            best = max(best, (similarity(read(later), read(earlier)), -earlier))
        if best[0] >= threshold:
            stands_for[later] = -best[1]
            yield NearDuplicate(later, -best[1], round(best[0], 4))


def _pairs(values: np.ndarray) -> np.ndarray:
    """Pair each document with the first and the last before it of equal hash: int64 [pairs, 2], the later one first."""
    order = np.argsort(values, kind="stable")
    same = values[order[1:]] == values[order[:-1]]
    later, last = order[1:][same], order[:-1][same]
    starts = np.maximum.accumulate(np.where(same, 0, np.arange(1, len(order))))  # of the run of equals, or 0
    first = order[starts[same]]
    return np.concatenate([np.stack([later, last], 1), np.stack([later, first], 1)])
