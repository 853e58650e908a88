"""Several corpora as one: whole documents drawn from each so that their shares, in tokens, are those asked for.

Each source is an endless stream of its documents, shuffled anew in each of its epochs. The next document always comes
from the source that lies furthest behind its share, so after any number of documents every source is within about one
document of it, however long its documents are. About `window` documents that follow one another are packed together,
as without a mixture (see `packing`).

Which document comes next depends on how much has been drawn, so a window's start names that too: documents and tokens
drawn from every source. With it, a run is resumed without replay.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    """One source of a mixture: its name, its folder of shards, and its weight among the others' weights."""

    name: str
    folder: str
    weight: float


@dataclass(frozen=True)
class Mixture:
    """Sources and what their weights count: tokens, or documents as BioMamba was published."""

    shares: tuple[Share, ...]
    unit: Unit = "tokens"

    def open(self, split: str = "train", *, tokenizer_sha256: str) -> "MixedDocuments":
        """The documents of one split of all sources.

        Raises:
          UserError: a source that is missing, damaged, empty, or made with another tokenizer.
        """
        readers = [open_split(share.folder, split, tokenizer_sha256=tokenizer_sha256)[1] for share in self.shares]
        return MixedDocuments(self, readers)

    def tokens_an_epoch(self, split: str = "train") -> int:
        """Tokens that are drawn in all until the source of the greatest weight has been gone through once."""
        infos = [Manifest.load(share.folder).splits[split] for share in self.shares]
        mean = [info.tokens / max(info.documents, 1) if self.unit == "documents" else 1.0 for info in infos]
        drawn = [share.weight * tokens for share, tokens in zip(self.shares, mean, strict=True)]
        main = max(range(len(infos)), key=lambda i: self.shares[i].weight)
        return round(infos[main].tokens * sum(drawn) / drawn[main])


class MixedDocuments:
    """The documents of all sources, one source after another: document i is one of `readers`."""

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
        """Which source a document is of."""
        return int(np.searchsorted(self._ends, index, side="right"))

    def first_of(self, source: int) -> int:
        """The index of a source's first document."""
        return int(self._ends[source - 1]) if source else 0

    def identity(self) -> dict[str, Any]:
        """What a checkpoint's data must agree with: the sources in their order, sizes, weights and unit."""
        found: dict[str, Any] = {"mixture_unit": self.mixture.unit, "mixture_sources": self.names}
        for share, reader in zip(self.mixture.shares, self.readers, strict=True):
            found[f"{share.name}.weight"] = share.weight
            found[f"{share.name}.documents"] = len(reader)
            found[f"{share.name}.tokens"] = int(reader.lengths.sum(dtype=np.int64))
        return found


class MixedRowPlan(WindowedRows):
    """The endless sequence of rows of a mixture; arguments as those of `packing.RowPlan`."""

    def __init__(
        self,
        documents: MixedDocuments,
        sequence_length: int,
        *,
        seed: int,
        window: int = DEFAULT_WINDOW,
        start: WindowStart = FIRST_WINDOW,
    ):
        super().__init__(sequence_length, seed=seed, window=window, start=start)
        self._word_seed = seed
        self._documents = documents
        self._window_documents = window
        sources = len(documents.readers)
        self._drawn = [start.drawn or (0,) * (2 * sources)]  # before windows _first_window, _first_window + 1, ...
        self._words: dict[tuple[int, int], int] = {}

    def drawn_before(self, window: int) -> tuple[int, ...]:
        return self._drawn[window - self._first_window]

    def _documents_of(self, window: int) -> Iterator[tuple[int, int]]:
        """The window's documents and their lengths; notes what has been drawn when it ends."""
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

    def _word(self, source: int, epoch: int) -> int:
        key = (source, epoch)
        if key not in self._words:
            self._words[key] = shuffle_word(self._word_seed, 1, *key)
        return self._words[key]
