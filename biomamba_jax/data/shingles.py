"""Shingles: hashes of runs of n words, by which near duplicates and contamination are found.

A word is a run of letters and digits, ignoring case, so that punctuation and white space do not count. A run of n words
becomes one 64-bit hash; two different runs collide with a probability of 2**-64.
"""

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying loses nothing
_PADDING = 0  # follows the words of a text that has fewer than n


@lru_cache(1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(errors="replace"), digest_size=8).digest(), "little")


def shingles(texts: Sequence[str], words: int) -> tuple[np.ndarray, np.ndarray]:
    """Hash the runs of `words` words of every text, in order, with repetitions.

    Returns:
      Hashes uint64 [runs of all texts], and the offsets of each text's runs, int64 [texts + 1]; each text has at least
      one run.
    """
    hashes: list[int] = []
    lengths = []
    for text in texts:
        found = _WORD.findall(text.casefold())
        hashes.extend(map(_word_hash, found))
        hashes.extend([_PADDING] * (words - len(found)))
        lengths.append(max(len(found), words))
    flat = np.array(hashes, np.uint64)
    ends = np.cumsum(np.array(lengths, np.int64))
    offsets = np.concatenate([[0], ends - (words - 1) * np.arange(1, len(lengths) + 1)])
    if not lengths:
        return flat, offsets
    runs = np.zeros(len(flat) - words + 1, np.uint64)
    for place in range(words):
        runs = runs * _FACTOR + flat[place : len(flat) - words + 1 + place]
    runs ^= runs >> np.uint64(29)  # the lowest bits of a product depend on the lowest bits alone
    crossing = (
        ends[:-1, None] - np.arange(words - 1, 0, -1)
    ).ravel()  # runs that begin in one text and end in the next
    return np.delete(runs, crossing), offsets
