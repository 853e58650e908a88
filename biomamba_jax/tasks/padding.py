"""Batches of ragged rows, packed or padded to one of a few sizes so that few shapes are compiled."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import TypeVar

import numpy as np

from biomamba_jax.data.packing import Piece, best_fit_decreasing, fill_row
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


def packed_batches(lengths: np.ndarray, width: int, rows: int) -> Iterator[list[list[list[Piece]]]]:
    """Yield lists of batches of rows of pieces; the recurrent states carry from batch to batch of a list.

    First the documents that fit into a row, packed, one batch a list; then the longer ones, each in a row of its own
    over as many batches as it needs. Documents without tokens are in none.

    Args:
      lengths: tokens of each document, integers [documents].
      width: tokens of a row.
      rows: rows of a batch; the last batch of either kind has fewer.
    """
    short = np.flatnonzero((lengths > 0) & (lengths <= width))
    packed: dict[int, list[Piece]] = defaultdict(list)
    for document, row in zip(short.tolist(), best_fit_decreasing(lengths[short], width).tolist(), strict=True):
        packed[row].append(Piece(document, 0, int(lengths[document])))
    yield from ([batch] for batch in batched(packed.values(), rows))
    long = np.flatnonzero(lengths > width)
    ascending = long[np.argsort(lengths[long], kind="stable")]  # documents of a batch end at about the same time
    for batch in batched(ascending.tolist(), rows):
        ends = lengths[batch].tolist()
        yield [
            [
                [Piece(document, start, min(start + width, end))] if start < end else []
                for document, end in zip(batch, ends, strict=True)
            ]
            for start in range(0, ends[-1], width)
        ]


def filled_rows(
    batch: Sequence[Sequence[Piece]], rows: int, width: int, read: Callable[[int], tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the rows of a batch as arrays, int32 [rows width] each, of which those beyond it are padding.

    Args:
      batch: pieces of each row.
      rows: number of rows.
      width: tokens of a row.
      read: see `fill_row`, which fills each of them.
    """
    filled = [fill_row(pieces, width, read) for pieces in [*batch, *[[]] * (rows - len(batch))]]
    return {name: np.stack([row[name] for row in filled]) for name in filled[0]}
