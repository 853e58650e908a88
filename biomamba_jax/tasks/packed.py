"""Documents of any length through a model, in batches of rows of one width over the devices of this host.

Documents that fit into a row are packed, each as a segment; longer ones continue from row to row with the recurrent
state, so that memory does not depend on their length.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import zip_longest

import numpy as np
from jax.sharding import Mesh

from biomamba_jax.data.packing import Piece, best_fit_decreasing, fill_row
from biomamba_jax.data.records import batched
from biomamba_jax.model.decode import InferenceModel, LayerStates
from biomamba_jax.model.state import empty_state
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.tasks.devices import rows_of
from biomamba_jax.tasks.padding import bucket_length, bucket_rows

Pieces = Sequence[Sequence[Piece]]
"""Pieces of documents in each row of a batch."""
Compute = Callable[[dict[str, np.ndarray], LayerStates], tuple[Array, LayerStates]]
"""Rows as of `fill_row`, [B L] each, and the states before them -> results [B ...], and the states after them."""


def run_packed(
    model: InferenceModel,
    inputs: Sequence[np.ndarray],
    compute: Compute,
    window: int,
    rows: int,
    mesh: Mesh,
    *,
    targets: Sequence[np.ndarray] | None = None,
    shrink: bool = True,
) -> Iterator[tuple[Pieces, np.ndarray]]:
    """Yield the pieces of each batch and what `compute` returns for its rows; documents without tokens are in none.

    Args:
      model: the model, whose states are carried.
      inputs: token ids of each document, int32 [tokens].
      compute: runs a batch.
      window: tokens of a row; fewer if all documents fit into less.
      rows: rows of a batch, a multiple of the devices.
      mesh: the devices.
      targets: what belongs to each token, such as the next one, int32 [tokens]; None where `compute` reads none.
      shrink: compute few rows as a smaller batch, at the price of another compiled shape, instead of padding them.
    """
    lengths = np.array([ids.size for ids in inputs], np.int64)
    width = min(window, bucket_length(int(lengths.sum())))
    arrays = list(zip(inputs, targets or inputs, strict=True))
    for batches in _batches(lengths, width, rows):
        count = min(rows, rows_of(bucket_rows(len(batches[0])), mesh)) if shrink else rows
        states: LayerStates = (empty_state(model.config, count, model.dtype),) * model.config.n_layers
        for batch in batches:
            filled = [fill_row(pieces, width, arrays.__getitem__) for pieces in [*batch, *[[]] * (count - len(batch))]]
            results, states = compute({name: np.stack([row[name] for row in filled]) for name in filled[0]}, states)
            yield batch, np.asarray(results)


def by_document(
    results: Iterable[tuple[Pieces, np.ndarray]], inputs: Sequence[np.ndarray]
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the index and the results [tokens ...] of each document, of results [B L ...] that `run_packed` yields."""
    parts: dict[int, list[np.ndarray]] = defaultdict(list)
    for batch, of_rows in results:
        for pieces, of_row in zip(batch, of_rows, strict=False):
            ends = np.cumsum([piece.stop - piece.start for piece in pieces]).tolist()
            for (document, start, stop), end in zip(pieces, ends, strict=True):
                parts[document].append(of_row[end - stop + start : end])
                if stop == len(inputs[document]):
                    yield document, np.concatenate(parts.pop(document))


def _batches(lengths: np.ndarray, width: int, rows: int) -> Iterator[list[list[list[Piece]]]]:
    """Yield lists of batches of rows of pieces; the recurrent states carry from batch to batch of a list.

    First the documents that fit into a row, packed, one batch a list; then the longer ones, each in a row of its own
    over as many batches as it needs. The last batch of either kind has fewer rows.

    Args:
      lengths: tokens of each document, integers [documents].
      width: tokens of a row.
      rows: rows of a batch.
    """
    short = np.flatnonzero((lengths > 0) & (lengths <= width))
    packed: dict[int, list[Piece]] = defaultdict(list)
    for document, row in zip(short.tolist(), best_fit_decreasing(lengths[short], width).tolist(), strict=True):
        packed[row].append(Piece(document, 0, int(lengths[document])))
    yield from ([batch] for batch in batched(packed.values(), rows))
    long = np.flatnonzero(lengths > width)
    ascending = long[np.argsort(lengths[long], kind="stable")]  # documents of a batch end at about the same time
    for batch in batched(ascending.tolist(), rows):
        own = zip(batch, lengths[batch].tolist(), strict=True)
        pieces = [[Piece(document, at, min(at + width, end)) for at in range(0, end, width)] for document, end in own]
        yield [[[piece] if piece else [] for piece in row] for row in zip_longest(*pieces)]
