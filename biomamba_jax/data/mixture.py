"""Mixtures: whole documents of several corpora, drawn so that each has its share of the tokens.

Each source is an endless stream of its documents, reshuffled in each of its epochs. The next document always comes from
the source that is furthest behind its share, so after any number of documents every source is within about one document
of it, however long its documents are. About `window` consecutive documents are packed together, as without a mixture
(see `packing`).

The next document depends on how much has been drawn, so a window's start also holds the documents and tokens drawn from
every source, and a run resumes without replay.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from grain.experimental import index_shuffle

from biomamba_jax.data.packing import (
    DEFAULT_WINDOW,
    FIRST_WINDOW,
    SHUFFLE_ROUNDS,
    WindowedRows,
    WindowStart,
    shuffle_word,
)
from biomamba_jax.data.shards import Document, Manifest, ShardReader, open_split
from biomamba_jax.errors import UserError

Unit = Literal["tokens", "documents"]


@dataclass(frozen=True)
class Share:
    """A source of a mixture."""

    name: str
    folder: str
    """Its folder of shards."""
    weight: float
    """Relative to the other sources' weights."""


@dataclass(frozen=True)
class Mixture:
    """Sources and their weights."""

    shares: tuple[Share, ...]
    unit: Unit = "tokens"
    """Unit of the weights; BioMamba was published with documents."""

    def open(self, split: str = "train", *, tokenizer_sha256: str) -> "MixedDocuments":
        """Open a split of all sources.

        Raises:
          UserError: a source is missing, damaged, empty, or made with another tokenizer.
        """
        readers = [open_split(share.folder, split, tokenizer_sha256=tokenizer_sha256)[1] for share in self.shares]
        return MixedDocuments(self, readers)

    def tokens_an_epoch(self, split: str = "train") -> int:
        """Return the tokens of all sources drawn during one epoch of the source with the greatest weight."""
        infos = [Manifest.load(share.folder).splits[split] for share in self.shares]
        mean = [info.tokens / max(info.documents, 1) if self.unit == "documents" else 1.0 for info in infos]
        drawn = [share.weight * tokens for share, tokens in zip(self.shares, mean, strict=True)]
        main = max(range(len(infos)), key=lambda i: self.shares[i].weight)
        return round(infos[main].tokens * sum(drawn) / drawn[main])


class MixedDocuments:
    """The documents of all sources, concatenated in the order of `readers`."""

    def __init__(self, mixture: Mixture, readers: Sequence[ShardReader]):
        for share, reader in zip(mixture.shares, readers, strict=True):
            if not len(reader):
                raise UserError(f"{reader.folder}: holds no document; leave {share.name!r} out of the mixture")
        self.mixture = mixture
        self.readers = readers
        self.names = [share.name for share in mixture.shares]
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
        found: dict[str, Any] = {"mixture_unit": self.mixture.unit, "mixture_sources": self.names}
        for share, reader in zip(self.mixture.shares, self.readers, strict=True):
            found[f"{share.name}.weight"] = share.weight
            found[f"{share.name}.documents"] = len(reader)
            found[f"{share.name}.tokens"] = int(reader.lengths.sum(dtype=np.int64))
        return found


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

    def _documents_of(self, window: int) -> Iterator[tuple[int, int]]:
        """Yield the window's documents and lengths; record what has been drawn when it ends."""
        mixed = self._documents
        sources = len(mixed.readers)
        drawn = self.drawn_before(window)
        documents, tokens = list(drawn[:sources]), list(drawn[sources:])
        behind = documents if mixed.mixture.unit == "documents" else tokens
        weights = [share.weight for share in mixed.mixture.shares]
        for _ in range(self._window_documents):
            source = min(range(sources), key=lambda i: behind[i] / weights[i])
            reader = mixed.readers[source]
            epoch, position = divmod(documents[source], len(reader))
            document = index_shuffle(position, len(reader) - 1, self._word(source, epoch), SHUFFLE_ROUNDS)
            length = int(reader.lengths[document])
            documents[source] += 1
            tokens[source] += length
            yield mixed.first_of(source) + document, length
        if len(self._drawn) == window - self._first_window + 1:
            self._drawn.append((*documents, *tokens))

    def _row_key(self, window: int) -> tuple[int, ...]:
        return (0, window)
