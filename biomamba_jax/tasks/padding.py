"""Batches of ragged rows, padded to one of a few sizes so that few shapes are compiled."""

from collections.abc import Callable, Iterable, Sequence, Sized
from typing import TypeVar

import numpy as np

from biomamba_jax.data.records import batched

T = TypeVar("T")
Row = TypeVar("Row", bound=Sized)


def by_length(rows: Sequence[Row], size: int, compute: Callable[[list[Row]], Iterable[T]]) -> list[T]:
    """Return the result of each row; `compute` returns those of up to `size` rows of like length, the longest first."""
    results: dict[int, T] = {}
    for batch in batched(sorted(range(len(rows)), key=lambda index: -len(rows[index])), size):
        results |= dict(zip(batch, compute([rows[index] for index in batch]), strict=False))
    return [results[index] for index in range(len(rows))]


def bucket_length(length: int) -> int:
    """Return the smallest of 16, 24, 32, 48, 64, 96, ... that is at least `length`: wastes at most a third."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


def bucket_rows(rows: int) -> int:
    """Return the smallest power of two that is at least `rows`."""
    return 1 << (rows - 1).bit_length()


def pad_right(rows: Sequence[Sequence[int]] | np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return int32 `shape` [B L] with each row's tokens at its beginning and zeros elsewhere."""
    padded = np.zeros(shape, np.int32)
    for target, row in zip(padded, rows, strict=False):
        target[: len(row)] = row
    return padded


def pad_left(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return token and segment ids, int32 [B L]: each prompt is segment 1 at the end of its row, padding segment 0."""
    tokens, segment_ids = np.zeros((2, bucket_rows(len(prompts)), bucket_length(max(map(len, prompts)))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, -len(prompt) :], segment_ids[row, -len(prompt) :] = prompt, 1
    return tokens, segment_ids
