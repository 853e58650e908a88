"""Batches for training and evaluation: rows of `packing`, read from `shards`, delivered by grain.

grain reads ahead, in threads or in worker processes; which rows come when is decided here, by arithmetic alone:
step s of P hosts takes the next P * batch_size rows of the plan, host p the p-th run of batch_size of them. So the
state of the iterator is one row number, valid for any number of hosts, workers or rows a batch, and not grain's
own state, which belongs to one number of workers.
"""

import os
import signal
import threading
import weakref
from collections.abc import Iterator
from multiprocessing import connection, parent_process
from types import TracebackType
from typing import Any, Protocol, Self

import grain
import numpy as np
from absl import flags

from biomamba_jax.data.mixture import MixedDocuments, MixedRowPlan, Mixture
from biomamba_jax.data.packing import DEFAULT_WINDOW, FIRST_WINDOW, RowPlan, WindowedRows, WindowStart, fill_row
from biomamba_jax.data.shards import Manifest, open_split
from biomamba_jax.errors import UserError

Batch = dict[str, np.ndarray]

_ENDLESS = 2**40  # batches in a source that has no end; grain wants a length
_BATCHES_AHEAD = 2  # ready batches per worker; each holds batch_size * length * 12 bytes


class Documents(Protocol):
    """What rows are made of: stored or in memory."""

    folder: Any
    """Where they come from, for messages."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, integers [documents]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """A document with `ids` t1 ... tn, EOS and as many `targets`, int32 [tokens]; see `packing.fill_row`."""


class _Batches:
    """grain's random-access source: batch i of one host, a pure function of the arguments."""

    def __init__(
        self,
        reader: Documents | MixedDocuments,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int | None,
        process_index: int,
        process_count: int,
        window: int = DEFAULT_WINDOW,
        first_row: int = 0,
        start: WindowStart = FIRST_WINDOW,
    ):
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index {process_index} is not in 0 ... {process_count - 1}")
        if min(batch_size, sequence_length) < 1:
            raise UserError(f"batch_size {batch_size} and sequence_length {sequence_length} must be at least 1")
        if len(reader) == 0:
            raise UserError(f"{reader.folder}: holds no document; prepare more text or choose another split")
        self._reader = reader
        self._length = sequence_length
        self._batch_size = batch_size
        self._seed = seed
        self._window = window
        self._host = process_index
        self._first_row = first_row
        self._start = start
        self.rows_per_step = batch_size * process_count
        self._make_plan()

    def _make_plan(self) -> None:
        self.plan: WindowedRows
        self._num_rows = None
        how: Any = {"window": self._window, "start": self._start}
        if isinstance(self._reader, MixedDocuments):
            assert self._seed is not None
            self.plan = MixedRowPlan(self._reader, self._length, seed=self._seed, **how)
            return
        self.plan = plan = RowPlan(self._reader.lengths, self._length, seed=self._seed, **how)
        if self._seed is None:
            self._num_rows = plan.rows_in_epoch()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "plan"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_plan()

    def __len__(self) -> int:
        return _ENDLESS if self._num_rows is None else -(-self._num_rows // self.rows_per_step)

    def __getitem__(self, step: int) -> dict[str, Any]:
        """The batch, and under "window" the start of the window in which the step's first row lies.

        Of a mixture also "drawn", int64 [sources]: the tokens of each source in the step, those of all hosts.
        """
        step_row = self._first_row + step * self.rows_per_step
        first = step_row + self._host * self._batch_size
        rows = [self._row(row) for row in range(first, first + self._batch_size)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if isinstance(self._reader, MixedDocuments):
            drawn = np.zeros(len(self._reader.names), np.int64)
            for row in range(step_row, step_row + self.rows_per_step):
                for piece in self.plan[row]:
                    drawn[self._reader.source_of(piece.document)] += piece.stop - piece.start
            batch["drawn"] = drawn
        return batch | {"window": tuple(self.plan.window_start(step_row))}

    def _row(self, row: int) -> dict[str, np.ndarray]:
        past_the_end = self._num_rows is not None and row >= self._num_rows
        pieces = [] if past_the_end else self.plan[row]

        def read(index: int) -> tuple[np.ndarray, np.ndarray]:
            document = self._reader[index]
            return document.ids, document.targets

        return fill_row(pieces, self._length, read)


class TrainIterator:
    """Endless iterator over one host's batches; made by `shuffled_batches`. Close it, or use it in a `with` block.

    A batch is {"inputs", "targets", "segment_ids"}, each int32 [batch_size, sequence_length].
    """

    def __init__(self, reader: Documents | MixedDocuments, seed: int, num_workers: int, **source: Any):
        self._reader = reader
        self._num_workers = num_workers
        self._source = {"seed": seed, **source}
        if isinstance(reader, MixedDocuments):
            sizes = reader.identity()
        else:
            sizes = {"documents": len(reader), "tokens": int(reader.lengths.sum(dtype=np.int64))}
        names = reader.names if isinstance(reader, MixedDocuments) else []
        self.tokens_by_source = dict.fromkeys(names, 0)
        """Tokens of each source of a mixture in all batches so far, those of all hosts; empty without a mixture."""
        self._data = {
            **sizes,
            "sequence_length": source["sequence_length"],
            "window": source["window"],
            "seed": seed,
        }
        self._start_at(0, FIRST_WINDOW)

    def _start_at(self, row: int, start: WindowStart) -> None:
        batches = _Batches(self._reader, first_row=row, start=start, **self._source)
        self._row, self._window_start, self._rows_per_step = row, start, batches.rows_per_step
        self._batches = [_read_ahead(batches, self._num_workers)]
        # Also runs at the program's exit, before Python takes grain's modules apart under grain's iterators.
        self._close = weakref.finalize(self, _close_all, self._batches)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if not self._batches:
            raise ValueError("the iterator is closed")
        batch = next(self._batches[0])
        window, row, drawn = batch.pop("window")
        self._window_start = WindowStart(int(window), int(row), tuple(map(int, drawn)))
        self._row += self._rows_per_step
        for name, tokens in zip(self.tokens_by_source, batch.pop("drawn", ()), strict=True):
            self.tokens_by_source[name] += int(tokens)
        # A worker's arrays lie in shared memory, which is scarce in containers and must be free before exit.
        return {name: np.array(values) for name, values in batch.items()} if self._num_workers else batch

    def get_state(self) -> dict[str, Any]:
        """Where the next batch begins, as a dict for JSON; the same on every host."""
        state: dict[str, Any] = {
            "row": self._row,
            "window_index": self._window_start.window,
            "window_row": self._window_start.row,
            **self._data,
        }
        if self.tokens_by_source:
            state |= {"window_drawn": list(self._window_start.drawn), "tokens_by_source": dict(self.tokens_by_source)}
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called; the numbers of hosts, workers and rows a batch may have changed.

        UserError when the state belongs to other documents or to another seed or sequence length.
        """
        for name, value in self._data.items():
            if state.get(name) != value:
                raise UserError(
                    f"{self._reader.folder}: cannot resume: {name} is {value}, the checkpoint's data had "
                    f"{state.get(name)}; restore that setting or start a new run directory"
                )
        self.close()
        drawn = tuple(state.get("window_drawn", ()))
        self.tokens_by_source = dict(state.get("tokens_by_source", {}))
        self._start_at(state["row"], WindowStart(state["window_index"], state["window_row"], drawn))

    def close(self) -> None:
        """Ends the worker processes; may be called twice."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def train_iterator(
    folder: str | os.PathLike[str],
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    window: int = DEFAULT_WINDOW,
    split: str = "train",
    tokenizer_sha256: str | None = None,
    mixture: Mixture | None = None,
) -> TrainIterator:
    """Shuffled, packed batches of a split, without end; each epoch in another order.

    folder           what `prepare --output` wrote
    mixture          takes the documents of several folders instead; `folder` then says which tokenizer theirs must be
    batch_size       rows of this host in a batch; a step takes process_count * batch_size rows of the sequence
    seed             of the shuffle, not negative
    num_workers      worker processes that read ahead, through /dev/shm (up to five batches each; containers may have
                     little room); 0 reads ahead in a thread of this process: several million tokens/s from a local disk
    window           documents packed together; see `packing.RowPlan`
    tokenizer_sha256 refuses shards that another tokenizer made

    Raises UserError for shards that are missing, damaged or made with another tokenizer.
    """
    documents: Documents | MixedDocuments
    if mixture is None:
        documents = open_split(folder, split, tokenizer_sha256=tokenizer_sha256)[1]
    else:
        documents = mixture.open(split, tokenizer_sha256=tokenizer_sha256 or Manifest.load(folder).tokenizer.sha256)
    return shuffled_batches(
        documents,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        num_workers=num_workers,
        process_index=process_index,
        process_count=process_count,
        window=window,
    )


def shuffled_batches(
    documents: Documents | MixedDocuments,
    *,
    sequence_length: int,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    window: int = DEFAULT_WINDOW,
) -> TrainIterator:
    """As `train_iterator`, of any documents."""
    if num_workers < 0:
        raise UserError(f"num_workers must not be negative, is {num_workers}")
    return TrainIterator(
        documents,
        seed,
        num_workers,
        sequence_length=sequence_length,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        window=window,
    )


def evaluation_batches(
    folder: str | os.PathLike[str],
    *,
    sequence_length: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    split: str = "validation",
    tokenizer_sha256: str | None = None,
) -> Iterator[Batch]:
    """Every document of a split exactly once, packed, in the plan's fixed order; arguments as in `train_iterator`.

    All hosts get the same number of batches, and all batches the same shape: rows of padding fill up the last ones.
    """
    _, documents = open_split(folder, split, tokenizer_sha256=tokenizer_sha256)
    return every_batch(
        documents,
        sequence_length=sequence_length,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
    )


def every_batch(
    documents: Documents,
    *,
    sequence_length: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """As `evaluation_batches`, of any documents."""
    batches = _Batches(
        documents,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=None,
        process_index=process_index,
        process_count=process_count,
    )
    iterator = _read_ahead(batches, num_workers=0)
    try:
        for batch in iterator:
            del batch["window"]
            yield batch
    finally:
        iterator.close()


def _read_ahead(batches: _Batches, num_workers: int) -> grain.DatasetIterator[dict[str, Any]]:
    """grain's iterator over `batches`, in order, read ahead by one thread here or by worker processes."""
    dataset = grain.MapDataset.source(batches).to_iter_dataset(
        grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BATCHES_AHEAD)
    )
    if num_workers > 0:
        if not flags.FLAGS.is_parsed():  # grain 0.2.18 reads an absl flag here and dies in programs without absl.app
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=_BATCHES_AHEAD)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_prepare_worker)
    return iter(dataset)


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


def _prepare_worker(index: int, count: int) -> None:
    """In a worker: leave Ctrl-C and SIGTERM to the parent, and end when the parent is gone, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def follow_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow_parent, name="follow-parent", daemon=True).start()
