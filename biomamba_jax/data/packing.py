"""Packing of whole documents into rows of fixed length: a deterministic sequence of rows with random access.

    epoch    every document once, in an order drawn from (seed, epoch) by `permutation.permuted`, which answers for any
             positions, so 38 million documents need no table
    window   about `window` neighbours of that order, packed on their lengths alone by best fit decreasing
    row      the window's rows in an order drawn from (seed, epoch, window)

Row i is thus a pure function of (lengths, sequence length, seed, window) and i: hosts, workers and batch size only
choose which rows they read, and a run resumes at row i without replay.
"""

import bisect
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from biomamba_jax.data.permutation import permuted

DEFAULT_WINDOW = 4096
_KEPT_WINDOWS = 4  # windows cached; a batch rarely spans more


class Piece(NamedTuple):
    """Tokens [start, stop) of a document; start > 0 only in documents longer than a row."""

    document: int
    """Index of the document."""
    start: int
    """Index of the first token."""
    stop: int
    """Index after the last token."""


class WindowStart(NamedTuple):
    """Where a window begins in the sequence of rows."""

    window: int
    """Index of the window, counted through all epochs."""
    row: int
    """Its first row."""
    drawn: tuple[int, ...] = ()
    """In a mixture: documents, then tokens, that each source contributed before."""


FIRST_WINDOW = WindowStart(0, 0)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of every item, int64 [items], so that the lengths in a row sum to at most `capacity`.

    Items, longest first, go to the fullest row that still has room (Johnson 1974: at most 11/9 of the optimum).
    `lengths` are integers in 1 ... capacity. Rows with k tokens of room are found by bit k of one integer. Items of
    equal length go to the same row while it has room for them, or to many rows at once.
    """
    lengths = lengths.astype(np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    occupied = 0  # bit k is set while rows_with_room[k] is not empty
    rows: list[int] = []  # of the items, longest first
    num_rows = 0
    sizes, counts = np.unique(lengths, return_counts=True)
    for length, left in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            fitting = occupied >> length << length
            if fitting:
                lowest = fitting & -fitting
                room = lowest.bit_length() - 1
                number = 1 if room >= 2 * length else left
                chosen = rows_with_room[room][: -number - 1 : -1]
                del rows_with_room[room][-number:]
                if not rows_with_room[room]:
                    occupied ^= lowest
            else:
                room, chosen = capacity, [num_rows]
                num_rows += 1
            each = min(left, room // length) if len(chosen) == 1 else 1
            rows += chosen * each
            left -= len(chosen) * each
            room -= length * each
            if room:
                rows_with_room[room] += chosen
                occupied |= 1 << room
    row_of = np.empty(len(lengths), np.int64)
    row_of[np.argsort(-lengths, kind="stable")] = rows
    return row_of


class WindowedRows(ABC):
    """A sequence of rows, packed window by window on demand: `rows[i]` lists the pieces of row i.

    A subclass defines which documents a window holds. Safe to share between threads.
    """

    def __init__(self, sequence_length: int, *, seed: int | None, window: int, start: WindowStart):
        if sequence_length < 1 or window < 1:
            raise ValueError(f"cannot pack {window} documents a window into rows of {sequence_length}")
        self.sequence_length = sequence_length
        self._seed = seed
        self._first_window = start.window
        self._starts = [start.row]  # first row of windows _first_window, _first_window + 1, ...
        self._kept: OrderedDict[int, _PackedWindow] = OrderedDict()
        self._lock = threading.Lock()

    @abstractmethod
    def _documents_of(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the documents of a window, in an order that depends on the seed, and their lengths: [documents]."""

    @abstractmethod
    def _row_key(self, window: int) -> tuple[int, ...]:
        """Return the key that decides, with the seed, the order of the window's rows."""

    @property
    def next_window_row(self) -> int:
        """First row of the first window that has not been packed yet."""
        return self._starts[-1]

    def drawn_before(self, window: int) -> tuple[int, ...]:
        """Return what a mixture has drawn when `window` begins, see `WindowStart`; () without a mixture."""
        return ()

    def _ends_before(self, window: int) -> bool:
        """Return True if the sequence ends before `window`."""
        return False

    def __getitem__(self, row: int) -> list[Piece]:
        start = self.window_start(row)
        with self._lock:
            return self._window(start.window).row(row - start.row)

    def window_start(self, row: int) -> WindowStart:
        """Return the start of the window that holds `row`, from which another plan can start."""
        with self._lock:
            if row < self._starts[0]:
                raise IndexError(f"row {row} is before row {self._starts[0]}, where the plan starts")
            while self._starts[-1] <= row:
                following = self._first_window + len(self._starts) - 1
                if self._ends_before(following):
                    raise IndexError(f"row {row} of {self._starts[-1]}")
                self._starts.append(self._starts[-1] + self._window(following).rows)
            index = bisect.bisect_right(self._starts, row) - 1
            window = self._first_window + index
            return WindowStart(window, self._starts[index], self.drawn_before(window))

    def _window(self, window: int) -> "_PackedWindow":
        """Return the rows of a window, from the cache if possible. The caller holds the lock."""
        if window not in self._kept:
            self._kept[window] = self._pack(window)
            if len(self._kept) > _KEPT_WINDOWS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(window)
        return self._kept[window]

    def _pack(self, window: int) -> "_PackedWindow":
        documents, lengths = self._documents_of(window)
        pieces = -(-lengths // self.sequence_length)
        document = np.repeat(documents, pieces)
        start = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * self.sequence_length
        stop = np.minimum(start + self.sequence_length, np.repeat(lengths, pieces))
        row_of = best_fit_decreasing(stop - start, self.sequence_length)
        by_row = np.argsort(row_of, kind="stable")
        ends = np.cumsum(np.bincount(row_of))
        order = _shuffled(np.arange(len(ends)), len(ends), self._seed, *self._row_key(window))
        return _PackedWindow(np.stack([document, start, stop], axis=1)[by_row], ends, order)


class _PackedWindow(NamedTuple):
    """The rows of a window."""

    pieces: np.ndarray
    """Document, start and stop of each piece, row by row, int64 [pieces, 3]."""
    ends: np.ndarray
    """End of each row's pieces, int64 [rows]."""
    order: np.ndarray
    """The rows in the order in which they are used, int64 [rows]."""

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.ends)

    def row(self, index: int) -> list[Piece]:
        """Return the pieces of a row."""
        row = self.order[index]
        begin = self.ends[row - 1] if row else 0
        return [Piece(*piece) for piece in self.pieces[begin : self.ends[row]].tolist()]


class RowPlan(WindowedRows):
    """The sequence of rows over documents of given lengths; endless with a seed, one epoch without."""

    def __init__(
        self,
        lengths: np.ndarray,
        sequence_length: int,
        *,
        seed: int | None,
        window: int = DEFAULT_WINDOW,
        start: WindowStart = FIRST_WINDOW,
    ):
        """Plan the rows.

        Args:
          lengths: tokens of each document, integers [documents], each at least 1; may be memory-mapped.
          sequence_length: tokens in a row; longer documents are split into pieces of this length and a remainder.
          seed: seed of the shuffles, not negative; None keeps the order of documents and windows, for one pass.
          window: documents packed together; more fill rows better and cost memory.
          start: a window start that such a plan returned before; earlier rows are not available.
        """
        if len(lengths) == 0:
            raise ValueError("cannot pack 0 documents")
        super().__init__(sequence_length, seed=seed, window=window, start=start)
        self._lengths = lengths
        # Windows of equal size: a small last one would end every epoch with rows that are nearly empty.
        self.windows_per_epoch = max(1, round(len(lengths) / window))

    def rows_in_epoch(self, epoch: int = 0) -> int:
        """Return the number of rows of an epoch; packs all its lengths, some 8 ms for 4,096 documents."""
        windows = range(epoch * self.windows_per_epoch, (epoch + 1) * self.windows_per_epoch)
        return sum(self._pack(window).rows for window in windows)

    def _ends_before(self, window: int) -> bool:
        return self._seed is None and window == self.windows_per_epoch

    def _documents_of(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, window_in_epoch = divmod(window, self.windows_per_epoch)
        total = len(self._lengths)
        first, end = (k * total // self.windows_per_epoch for k in (window_in_epoch, window_in_epoch + 1))
        documents = _shuffled(np.arange(first, end), total, self._seed, epoch)
        return documents, self._lengths[documents].astype(np.int64)

    def _row_key(self, window: int) -> tuple[int, ...]:
        return divmod(window, self.windows_per_epoch)


def _shuffled(positions: np.ndarray, total: int, seed: int | None, *key: int) -> np.ndarray:
    """Return the elements of range(total) at `positions` of the permutation drawn from (seed, *key)."""
    return positions if seed is None else permuted(positions, total, shuffle_word(seed, *key))


def shuffle_word(*key: int) -> int:
    """Derive the seed of a permutation from non-negative numbers; stable across NumPy versions."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def fill_row(
    pieces: Sequence[Piece], sequence_length: int, read: Callable[[int], tuple[np.ndarray, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Fill a row with its pieces.

    A later piece of a long document begins with the token before it. Segments are numbered 1, 2, ... along the row; the
    rest of it is padding.

    Args:
      pieces: the pieces of the row.
      sequence_length: tokens in the row.
      read: returns a document's inputs, start token t1 ... tn, and its targets of the same length: t1 ... tn EOS where
        every token is predicted.

    Returns:
      "inputs", "targets" and "segment_ids", each int32 [sequence_length], 0 in padding.
    """
    row = {name: np.zeros(sequence_length, np.int32) for name in ("inputs", "targets", "segment_ids")}
    begin = 0
    for segment, (document, start, stop) in enumerate(pieces, 1):
        inputs, targets = read(document)
        end = begin + stop - start
        row["inputs"][begin:end] = inputs[start:stop]
        row["targets"][begin:end] = targets[start:stop]
        row["segment_ids"][begin:end] = segment
        begin = end
    return row
