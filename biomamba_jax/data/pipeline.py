"""Batches for training and evaluation: rows of `packing`, read from `shards`, prefetched by grain.

grain reads ahead, in a thread or in worker processes; the order of the rows is decided here, by arithmetic alone: step
s of P hosts takes the next P * batch_size rows of the plan, host p the p-th run of batch_size of them. So the state of
the iterator is one row number, valid for any number of hosts, workers or rows a batch; grain's own state belongs to one
number of workers.
"""

import signal
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from types import TracebackType
from typing import Any, Protocol, Self

import grain
import numpy as np
from absl import flags

from biomamba_jax.data.examples import Encoded
from biomamba_jax.data.mixture import MixedDocuments, MixedRowPlan
from biomamba_jax.data.packing import DEFAULT_WINDOW, FIRST_WINDOW, Piece, RowPlan, WindowedRows, WindowStart, fill_row
from biomamba_jax.data.shards import shifted
from biomamba_jax.data.workers import blocked_signals, end_with_parent
from biomamba_jax.errors import UserError

Batch = dict[str, np.ndarray]

_ENDLESS = 2**40  # grain wants a length; batches of a source without an end
_BATCHES_AHEAD = 2  # ready batches per worker; each holds batch_size * sequence_length * 12 bytes


class Documents(Protocol):
    """Documents that rows are packed from, stored or in memory."""

    folder: Any
    """Where they come from, for messages."""

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each document, integers [documents]."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """Return a document with `inputs` and as many `targets`, int32 [tokens]; see `packing.fill_row`."""


class PaddedDocuments:
    """Documents truncated or padded with EOS to rows of their own, every token of which is a target.

    The first version of BioMamba's code trains so (LeoYML/BioMamba at e61db22, legacy/pretrain_v1); see
    `tasks.paper_v1` for what it does to perplexity.

    Args:
      documents: the documents.
      sequence_length: tokens of a row.
    """

    def __init__(self, documents: Documents, sequence_length: int):
        self.folder, self._documents = documents.folder, documents
        self.lengths = np.full(len(documents), sequence_length)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Encoded:
        document = self._documents[index]
        row = np.full(self.lengths[index], document.targets[-1], np.int32)
        row[: len(document.targets)] = document.targets[: len(row)]
        return Encoded(shifted(row, document.inputs[0]), row)


@dataclass(frozen=True, eq=False)
class _Batches:
    """grain's random-access source: batch i of one host, a pure function of the fields."""

    documents: Documents | MixedDocuments
    sequence_length: int
    batch_size: int
    seed: int | None
    process_index: int
    process_count: int
    window: int = DEFAULT_WINDOW
    first_row: int = 0
    start: WindowStart = FIRST_WINDOW

    def __post_init__(self) -> None:
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(f"process_index {self.process_index} is not in 0 ... {self.process_count - 1}")
        if len(self.documents) == 0:
            raise UserError(f"{self.documents.folder}: holds no document; prepare more text or choose another split")

    @cached_property
    def plan(self) -> WindowedRows:
        """The sequence of rows."""
        how: Any = {"seed": self.seed, "window": self.window, "start": self.start}
        if isinstance(self.documents, MixedDocuments):
            return MixedRowPlan(self.documents, self.sequence_length, **how)
        return RowPlan(self.documents.lengths, self.sequence_length, **how)

    @cached_property
    def num_rows(self) -> int | None:
        """Rows of the only epoch; None with a seed, when epochs follow one another without end."""
        return self.plan.rows_in_epoch() if self.seed is None and isinstance(self.plan, RowPlan) else None

    @property
    def rows_per_step(self) -> int:
        """Rows that all hosts together take in a step."""
        return self.batch_size * self.process_count

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # plans hold locks

    def __len__(self) -> int:
        return _ENDLESS if self.num_rows is None else -(-self.num_rows // self.rows_per_step)

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Return the batch and, as "window", the start of the window that holds the step's first row.

        The batch of a mixture has also "drawn", int64 [sources]: tokens of each source in the step, over all hosts.
        """
        step_row = self.first_row + step * self.rows_per_step
        first = step_row + self.process_index * self.batch_size
        rows = [self._row(row) for row in range(first, first + self.batch_size)]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        if isinstance(self.documents, MixedDocuments):
            drawn = np.zeros(len(self.documents.names), np.int64)
            for row in range(step_row, step_row + self.rows_per_step):
                for piece in self.plan[row]:
                    drawn[self.documents.source_of(piece.document)] += piece.stop - piece.start
            batch["drawn"] = drawn
        return batch | {"window": tuple(self.plan.window_start(step_row))}

    def _row(self, row: int) -> dict[str, np.ndarray]:
        past_the_end = self.num_rows is not None and row >= self.num_rows

        def read(index: int) -> tuple[np.ndarray, np.ndarray]:
            document = self.documents[index]
            return document.inputs, document.targets

        return fill_row([] if past_the_end else self.plan[row], self.sequence_length, read)


class TrainIterator:
    """Endless iterator over one host's shuffled, packed batches, each epoch in another order.

    A batch is {"inputs", "targets", "segment_ids"}, each int32 [batch_size, sequence_length]. Close the iterator, or
    use it in a `with` block.
    """

    def __init__(
        self,
        documents: Documents | MixedDocuments,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        window: int = DEFAULT_WINDOW,
    ):
        """Start to read ahead.

        Args:
          documents: a split of a shard folder, a mixture, or examples in memory.
          sequence_length: tokens of a row.
          batch_size: rows of this host in a batch; a step takes process_count * batch_size rows of the sequence.
          seed: seed of the shuffle, not negative.
          num_workers: worker processes that read ahead, through /dev/shm (up to five batches each; containers may have
            little room); 0 reads ahead in a thread of this process: several million tokens/s from a local disk.
          process_index: index of this host.
          process_count: number of hosts.
          window: documents packed together; see `packing.RowPlan`.

        Raises:
          UserError: there is no document.
        """
        self._documents = documents
        self._num_workers = num_workers
        self._rows: dict[str, Any] = {"sequence_length": sequence_length, "window": window, "seed": seed}
        self._host = {"batch_size": batch_size, "process_index": process_index, "process_count": process_count}
        self.tokens_by_source: dict[str, int] = {}
        """Tokens of each source of a mixture in all batches so far, over all hosts; empty without a mixture."""
        if isinstance(documents, MixedDocuments):
            sizes = documents.identity()
            self.tokens_by_source = dict.fromkeys(documents.names, 0)
        else:
            sizes = {"documents": len(documents), "tokens": int(documents.lengths.sum(dtype=np.int64))}
        self._identity = {**sizes, **self._rows}
        self._start_at(0, FIRST_WINDOW)

    def _start_at(self, row: int, start: WindowStart) -> None:
        batches = _Batches(self._documents, first_row=row, start=start, **self._rows, **self._host)
        self._row, self._window_start, self._rows_per_step = row, start, batches.rows_per_step
        with blocked_signals() if self._num_workers else nullcontext():
            self._batches = [_read_ahead(batches, self._num_workers)]
        # Also runs at the program's exit, before Python tears down grain's modules under grain's iterators.
        self._close = weakref.finalize(self, _close_all, self._batches)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if not self._batches:
            raise ValueError("the iterator is closed")
        try:
            with blocked_signals() if self._num_workers else nullcontext():  # workers start at the first batch
                batch = next(self._batches[0])
        except RuntimeError as error:  # a UserError is not one
            if "terminated unexpectedly" not in str(error):
                raise
            raise UserError(
                f"a data worker was killed, perhaps because memory ran out ({str(error).partition('. ')[0]}); give a "
                "smaller data.num_workers"
            ) from None
        window, row, drawn = batch.pop("window")
        self._window_start = WindowStart(int(window), int(row), tuple(map(int, drawn)))
        self._row += self._rows_per_step
        for name, tokens in zip(self.tokens_by_source, batch.pop("drawn", ()), strict=True):
            self.tokens_by_source[name] += int(tokens)
        # A worker's arrays are in shared memory, which is scarce in containers and must be free before exit.
        return {name: np.array(values) for name, values in batch.items()} if self._num_workers else batch

    @property
    def origin(self) -> tuple[int, WindowStart]:
        """Where the newest batch begins, for `documents_of`."""
        return self._row - self._rows_per_step, self._window_start

    def documents_of(self, origin: tuple[int, WindowStart]) -> list[dict[str, Any]]:
        """Return the documents in each row of a step, over all hosts, as JSON values: index, PMID and tokens."""
        first, start = origin
        plan = _Batches(self._documents, first_row=first, start=start, **self._rows, **self._host).plan

        def described(piece: Piece) -> dict[str, Any]:
            documents, index, source = self._documents, piece.document, {}
            pmid = getattr(documents[index], "pmid", None)
            if isinstance(documents, MixedDocuments):
                number = documents.source_of(index)
                source, index = {"source": documents.names[number]}, index - documents.first_of(number)
            return source | {"document": index, "pmid": pmid, "tokens": [piece.start, piece.stop]}

        rows = range(first, first + self._rows_per_step)
        return [{"row": row, "documents": [described(piece) for piece in plan[row]]} for row in rows]

    def get_state(self) -> dict[str, Any]:
        """Return where the next batch begins, as a dict for JSON; the same on every host."""
        state: dict[str, Any] = {
            "row": self._row,
            "window_index": self._window_start.window,
            "window_row": self._window_start.row,
            **self._identity,
        }
        if self.tokens_by_source:
            state |= {"window_drawn": list(self._window_start.drawn), "tokens_by_source": dict(self.tokens_by_source)}
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue where `get_state` was called; the numbers of hosts, workers and rows a batch may have changed.

        Raises:
          UserError: the state belongs to other documents or to another seed or sequence length.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise UserError(
                    f"{self._documents.folder}: cannot resume: {name} is {value}, the checkpoint's data had "
                    f"{state.get(name)}; restore that setting or start a new run directory"
                )
        self.close()
        drawn = tuple(state.get("window_drawn", ()))
        self.tokens_by_source = dict(state.get("tokens_by_source", {}))
        self._start_at(state["row"], WindowStart(state["window_index"], state["window_row"], drawn))

    def close(self) -> None:
        """End the worker processes; may be called twice."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def evaluation_batches(
    documents: Documents, *, sequence_length: int, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Yield every document exactly once, packed, in a fixed order; arguments as those of `TrainIterator`.

    All hosts get the same number of batches, and all batches the same shape: the last ones are padded with empty rows.
    """
    batches = _Batches(documents, sequence_length, batch_size, None, process_index, process_count)
    iterator = _read_ahead(batches, num_workers=0)
    try:
        for batch in iterator:
            del batch["window"]
            yield batch
    finally:
        iterator.close()


def _read_ahead(batches: _Batches, num_workers: int) -> grain.DatasetIterator[dict[str, Any]]:
    """Return grain's iterator over `batches`, in order, prefetched by one thread or by worker processes."""
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
    """Initialize a worker: it leaves Ctrl-C and SIGTERM to its parent and ends with it, even after a SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
