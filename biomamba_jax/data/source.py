"""A spooled input file and the final status of its records: what the shards are written from.

A spool is a group of files: STEM.text (the UTF-8 texts of candidate documents, each followed by its id if that is not a
PMID), STEM.npy (one `INDEX` row for every record and deletion, in the file's order), STEM.bands.npy if near duplicates
are dropped, and STEM.json, written last: a spool without it is unfinished.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from biomamba_jax.data.input_files import Checksums
from biomamba_jax.data.records import DELETION, KEPT, Overlap
from biomamba_jax.files import read_array

INDEX = np.dtype(
    [
        ("pmid", "<u4"),  # 0: none
        ("version", "<u2"),
        ("status", "u1"),  # KEPT, DELETION, or the CODE of a reason
        ("split", "<u4"),  # split_position
        ("date", "<u4"),  # YYYYMMDD, 0: unknown
        ("size", "<u4"),  # bytes of text in STEM.text; 0 unless kept
        ("id_size", "<u2"),  # bytes of the id after it
        ("digest", "<u8", (2,)),  # normalized_digest
    ]
)


@dataclass(frozen=True)
class Spool:
    """A finished spool."""

    path: Path
    """The input file."""
    stem: str
    """Path of the spool's files without their endings."""
    sums: Checksums
    """Size and digests of the input file."""
    html_entities: int
    """Number of named HTML entities that were unescaped in its texts."""
    overlaps: dict[int, Overlap]
    """Evaluation item of each row that is left out as evaluation text."""

    def load_index(self) -> np.ndarray:
        """Memory-map the index, INDEX [records]."""
        return read_array(f"{self.stem}.npy")

    def load_bands(self) -> np.ndarray:
        """Memory-map the LSH band hashes, uint64 [rows whose status in the index is KEPT, bands]."""
        return read_array(f"{self.stem}.bands.npy")


@dataclass(frozen=True)
class Source:
    """A spool and the final status of its records."""

    spool: Spool
    """The spool."""
    status: np.ndarray
    """uint8 [records]: KEPT, DELETION or the CODE of a reason."""

    @property
    def rows(self) -> np.ndarray:
        """INDEX [records]; mapped anew at each call, so that unused files take no memory."""
        return self.spool.load_index()

    @property
    def kept(self) -> np.ndarray:
        """Rows that become documents, ascending."""
        return np.flatnonzero(self.status == KEPT)

    def texts(self, rows: np.ndarray) -> list[str]:
        """Read the texts of some of the kept rows, ascending."""
        return [text for text, _ in self.documents(rows)]

    def documents(self, rows: np.ndarray) -> Iterator[tuple[str, str]]:
        """Yield (text, id) of some of the kept rows, ascending; the id is "" if there is none but a PMID."""
        starts, sizes = _starts(self.spool.stem), self.rows[rows]
        with open(f"{self.spool.stem}.text", "rb") as file:
            for start, size, id_size in zip(
                starts[rows].tolist(), sizes["size"].tolist(), sizes["id_size"].tolist(), strict=True
            ):
                file.seek(start)
                yield file.read(size).decode(), file.read(id_size).decode()

    def describe(self) -> dict[str, object]:
        """Return its entry in the manifest."""
        deletions = int((self.status == DELETION).sum())
        return {
            "name": self.spool.path.name,
            **asdict(self.spool.sums),
            "records": len(self.status) - deletions,
            "deletions": deletions,
            "documents": len(self.kept),
            "html_entities": self.spool.html_entities,
        }

    def removal(self, row: int, reason: str, repeats: str | None, share: float | None) -> dict[str, Any]:
        """Return the entry of a record in removed.jsonl: what it repeats, and to which share."""
        pmid, version = (int(self.rows[row][name]) or None for name in ("pmid", "version"))
        found = {"reason": reason, "pmid": pmid, "version": version, "source": self.spool.path.name}
        return found | {"repeats": repeats, "share": share}


@lru_cache(4)
def _starts(stem: str) -> np.ndarray:
    """Return where each row's text begins in STEM.text."""
    index = read_array(f"{stem}.npy")
    sizes = index["size"].astype(np.int64) + index["id_size"]
    return np.cumsum(sizes) - sizes
