"""Mixtures: whole documents of several corpora, drawn so that each has its share of the tokens.

Each source is an endless stream of its documents, reshuffled in each of its epochs. The next document always comes from
the source that is furthest behind its share, so after any number of documents every source is within about one document
of it, however long its documents are. About `window` consecutive documents are packed together, as without a mixture
(see `packing`).

The next document depends on how much has been drawn, so a window's start also holds the documents and tokens drawn from
every source, and a run resumes without replay.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from biomamba_jax.config.data import MixtureConfig
from biomamba_jax.data.packing import DEFAULT_WINDOW, FIRST_WINDOW, WindowedRows, WindowStart, shuffle_word
from biomamba_jax.data.permutation import permuted
from biomamba_jax.data.shards import Document, Manifest, ShardReader, open_split
from biomamba_jax.errors import UserError

_AHEAD = 256  # documents of a source whose order is drawn at once


class MixedDocuments:
    """The documents of all sources, concatenated in the order of `readers`."""

    def __init__(self, mixture: MixtureConfig, readers: Sequence[ShardReader]):
        for name, reader in zip(mixture.sources, readers, strict=True):
            if not len(reader):
                raise UserError(f"{reader.folder}: holds no document; leave {name!r} out of the mixture")
        self.readers = readers
        self.names = list(mixture.sources)
        self.weights = list(mixture.weights.values())
        self.unit = mixture.counts
        self.folder = ", ".join(str(reader.folder) for reader in readers)
        self._ends = np.cumsum([len(reader) for reader in readers])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Document:
        source = self.source_of(index)
        return self.readers[source][index - self.first_of(source)]

    def source_of(self, index: int) -> int:
        """Return the index of a document's source."""
        return int(np.searchsorted(self._ends, index, side="right"))

    def first_of(self, source: int) -> int:
        """Return the index of a source's first document."""
        return int(self._ends[source - 1]) if source else 0

    def identity(self) -> dict[str, Any]:
        """Return what must be equal to resume from a checkpoint: the sources' order, sizes, weights and unit."""
        found: dict[str, Any] = {"mixture_unit": self.unit, "mixture_sources": self.names}
        for name, weight, reader in zip(self.names, self.weights, self.readers, strict=True):
            found[f"{name}.weight"] = weight
            found[f"{name}.documents"] = len(reader)
            found[f"{name}.tokens"] = int(reader.lengths.sum(dtype=np.int64))
        return found


def open_mixture(mixture: MixtureConfig, *, tokenizer_sha256: str) -> MixedDocuments:
    """Open the training split of all sources.

    Raises:
      UserError: a source is missing, damaged, empty, or made with another tokenizer.
    """
    paths = [source.path for source in mixture.sources.values()]
    return MixedDocuments(mixture, [open_split(path, "train", tokenizer_sha256=tokenizer_sha256)[1] for path in paths])


def mixture_epoch_tokens(mixture: MixtureConfig) -> int:
    """Return the tokens of all sources drawn during one epoch of the source with the greatest weight."""
    infos = {name: Manifest.load(source.path).splits["train"] for name, source in mixture.sources.items()}
    drawn = dict(mixture.weights)
    if mixture.counts == "documents":
        drawn = {name: weight * infos[name].tokens / max(infos[name].documents, 1) for name, weight in drawn.items()}
    main = max(mixture.weights, key=lambda name: mixture.weights[name])
    return round(infos[main].tokens * sum(drawn.values()) / drawn[main])


class MixedRowPlan(WindowedRows):
    """The endless sequence of rows of a mixture."""

    def __init__(
        self,
        documents: MixedDocuments,
        sequence_length: int,
        *,
        seed: int,
        window: int = DEFAULT_WINDOW,
        start: WindowStart = FIRST_WINDOW,
    ):
        """Plan the rows; arguments as those of `packing.RowPlan`."""
        super().__init__(sequence_length, seed=seed, window=window, start=start)
        self._documents = documents
        self._window_documents = window
        sources = len(documents.readers)
        self._drawn = [start.drawn or (0,) * (2 * sources)]  # before windows _first_window, _first_window + 1, ...
        self._word = cache(lambda source, epoch: shuffle_word(seed, 1, source, epoch))

    def drawn_before(self, window: int) -> tuple[int, ...]:
        """Return what was drawn before `window`."""
        return self._drawn[window - self._first_window]

    def _documents_of(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the window's documents and lengths; record what has been drawn when it ends."""
        mixed = self._documents
        sources = len(mixed.readers)
        drawn = self.drawn_before(window)
        documents, tokens = list(drawn[:sources]), list(drawn[sources:])
        behind, weights = documents if mixed.unit == "documents" else tokens, mixed.weights
        streams = [self._stream(source, documents[source]) for source in range(sources)]
        found: list[tuple[int, int]] = []
        for _ in range(self._window_documents):
            source = min(range(sources), key=lambda i: behind[i] / weights[i])
            document, length = next(streams[source])
            documents[source] += 1
            tokens[source] += length
            found.append((document, length))
        if len(self._drawn) == window - self._first_window + 1:
            self._drawn.append((*documents, *tokens))
        both = np.array(found)
        return both[:, 0], both[:, 1]

    def _stream(self, source: int, first: int) -> Iterator[tuple[int, int]]:
        """Yield a source's documents and their lengths from the `first` that it contributes on."""
        reader = self._documents.readers[source]
        while True:
            epoch, position = divmod(first, len(reader))
            positions = np.arange(position, min(position + _AHEAD, len(reader)))
            first = epoch * len(reader) + int(positions[-1]) + 1
            chosen = permuted(positions, len(reader), self._word(source, epoch))
            lengths = reader.lengths[chosen].tolist()
            yield from zip((chosen + self._documents.first_of(source)).tolist(), lengths, strict=True)

    def _row_key(self, window: int) -> tuple[int, ...]:
        return (0, window)
