"""A pseudorandom permutation that answers for many positions at once.

It is that of grain's `index_shuffle`, which derives its keys again for each position: rounds of the SIMON block cipher
(Beaulieu et al. 2013, eprint 2013/404) over the smallest even number of bits, at least 16, that holds all positions;
results outside are encrypted again. The round keys are those of C++'s `std::seed_seq` ([rand.util.seedseq]). Where the
number of elements is 2^n + 1, n even and at least 16, grain's repeats one; this one does not, and differs there.
"""

import functools

import numpy as np

_ROUNDS = 4  # what grain's own shuffle uses
_WORD = 2**32 - 1


def permuted(positions: np.ndarray, total: int, seed: int) -> np.ndarray:
    """Return the elements of range(total) at `positions` of the permutation drawn from `seed`, int64.

    Args:
      positions: integers in 0 ... total - 1.
      total: number of elements, at most 2^32.
      seed: 32 bits.
    """
    if total == 1:
        return np.zeros(len(positions), np.int64)
    half = max(8, ((total - 1).bit_length() + 1) // 2)  # bits of each half of a block
    found = _encrypt(positions, half, seed)
    if total > 2**14:
        while (outside := np.flatnonzero(found >= total)).size:
            found[outside] = _encrypt(found[outside], half, seed)
        return found
    # Few elements: chains of encryptions are long. `further` takes up to 16 of them at once.
    blocks = np.arange(2**16)
    further = np.where(blocks < total, blocks, _encrypt(blocks, half, seed))
    for _ in range(4):
        further = further[further]
    while (outside := np.flatnonzero(found >= total)).size:
        found[outside] = further[found[outside]]
    return found


def _encrypt(values: np.ndarray, half: int, seed: int) -> np.ndarray:
    round_function = _round_function(half)
    other, one = values >> half, values & (2**half - 1)
    for key in _round_keys(seed):
        other, one = one, other ^ round_function[one] ^ (key & (2**half - 1))
    return other << half | one


@functools.lru_cache(8)
def _round_function(half: int) -> np.ndarray:
    """Return SIMON's round function of every half of a block, int64 [2^half]."""
    values = np.arange(2**half)

    def rotated(bits: int) -> np.ndarray:
        bits %= half
        return (values << bits | values >> (half - bits)) & (2**half - 1)

    return rotated(1) & rotated(8) ^ rotated(2)


@functools.lru_cache(64)
def _round_keys(seed: int) -> list[int]:
    """Return what `std::seed_seq{seed}` generates."""
    n, begin, middle = _ROUNDS, 1, 2
    words = [0x8B8B8B8B] * n

    def mixed(word: int, factor: int) -> int:
        return factor * (word ^ word >> 27) & _WORD

    for k in range(n):
        to, third = (k + begin) % n, (k + middle) % n
        added = mixed(words[k] ^ words[to] ^ words[k - 1], 1664525)
        last = (added + (1 if k == 0 else k + (seed if k == 1 else 0))) & _WORD
        words[to], words[third] = (words[to] + added) & _WORD, (words[third] + last) & _WORD
        words[k] = last
    for k in range(n):
        to, third = (k + begin) % n, (k + middle) % n
        taken = mixed((words[k] + words[to] + words[k - 1]) & _WORD, 1566083941)
        last = (taken - k) & _WORD
        words[to] ^= taken
        words[third] ^= last
        words[k] = last
    return words
