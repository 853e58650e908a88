"""The input after the first pass: every file spooled, and of every record whether it becomes a document or why not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from biomamba_jax.data.decontamination import read_evaluation
from biomamba_jax.data.filters import CODE, DELETION, KEPT, REASONS, Filters
from biomamba_jax.data.near_duplicates import NearDuplicate, choose_bands, near_duplicates
from biomamba_jax.data.resolve import resolve
from biomamba_jax.data.spool import Spool, SpoolTask, read_texts, spool
from biomamba_jax.data.workers import Workers
from biomamba_jax.errors import UserError

Progress = Callable[[str, int, int], None]
"""Called with a step's name and how many of how many parts of it are done."""


@dataclass(frozen=True)
class Selection:
    """What becomes a document.

    near_duplicates: least Jaccard similarity, of runs of 5 words, at which a later document is left out; None keeps
    all. evaluation: files of evaluation text to keep out, see `decontamination`; evaluation_overlap: the share of runs
    of 8 words from which on a document is left out.
    """

    filters: Filters = field(default_factory=Filters)
    near_duplicates: float | None = None
    evaluation: tuple[str, ...] = ()
    evaluation_overlap: float = 0.25


@dataclass(frozen=True)
class Source:
    """An input file, its spool, and the final status of its records: uint8 [records], see `filters`."""

    path: Path
    spool: Spool
    status: np.ndarray

    @property
    def rows(self) -> np.ndarray:
        """INDEX [records]; read anew each time, so that files of no use at the moment take no memory."""
        return self.spool.load_index()

    @property
    def kept(self) -> np.ndarray:
        """Rows that become documents, ascending."""
        return np.flatnonzero(self.status == KEPT)

    def texts(self, rows: np.ndarray) -> list[str]:
        """The texts of some of the kept rows, ascending."""
        return read_texts(self.spool.stem, rows)

    def describe(self) -> dict[str, object]:
        """Its entry in the manifest: which file it was and what it gave."""
        deletions = int((self.status == DELETION).sum())
        return {
            "name": self.path.name,
            **asdict(self.spool.sums),
            "records": len(self.status) - deletions,
            "deletions": deletions,
            "documents": len(self.kept),
            "html_entities": self.spool.html_entities,
        }


def read_sources(
    paths: Sequence[Path], folder: Path, selection: Selection, pool: Workers, progress: Progress
) -> tuple[list[Source], list[dict[str, Any]]]:
    """Spools every file into `folder`, then settles the status of every record.

    Returns:
      The sources in the order of `paths`, and one entry for each document that was left out as evaluation text or as a
      near duplicate: what it was and what it repeats.
    """
    evaluation = read_evaluation(selection.evaluation) if selection.evaluation else None
    path = None
    if evaluation is not None:
        path = folder / f"evaluation-{evaluation.digest}.npz"
        evaluation.save(path)
    tasks = [
        SpoolTask(
            str(source),
            str(folder),
            selection.filters,
            evaluation=None if path is None else str(path),
            evaluation_digest="" if evaluation is None else evaluation.digest,
            overlap=selection.evaluation_overlap,
            bands=None if selection.near_duplicates is None else choose_bands(selection.near_duplicates),
        )
        for source in paths
    ]
    spools: list[Spool] = []
    progress("read", 0, len(tasks))
    for _, finished in pool.map(spool, tasks):
        spools.append(finished)
        progress("read", len(spools), len(tasks))
    statuses = resolve([each.load_index for each in spools])
    sources = [Source(*each) for each in zip(paths, spools, statuses, strict=True)]
    repeated = _drop_near_duplicates(sources, selection.near_duplicates)
    return sources, [*_evaluation_entries(sources), *repeated]


def _evaluation_entries(sources: Sequence[Source]) -> Iterator[dict[str, Any]]:
    """What was left out to keep evaluation text out, file by file."""
    reasons = {CODE[name]: name for name in ("evaluation_article", "evaluation_text")}
    for source in sources:
        overlaps = {row: (item, share) for row, item, share in source.spool.overlaps}
        rows = source.rows
        for row in np.flatnonzero(np.isin(source.status, list(reasons))).tolist():
            item, share = overlaps.get(row, (None, None))
            yield _entry(source, rows[row], reasons[int(source.status[row])]) | {"repeats": item, "share": share}


def _drop_near_duplicates(sources: Sequence[Source], threshold: float | None) -> list[dict[str, Any]]:
    """Marks near duplicates in the sources' status, and lists them."""
    if threshold is None:
        return []
    ends = np.cumsum([len(source.kept) for source in sources])
    candidates = [source.rows["status"] == KEPT for source in sources]
    kept = [np.flatnonzero(source.status[c] == KEPT) for source, c in zip(sources, candidates, strict=True)]
    where = [source.kept for source in sources]

    def find(place: int) -> tuple[Source, int]:
        number = int(np.searchsorted(ends, place, side="right"))
        return sources[number], int(where[number][place - ends[number]])  # a place from the end of the source's rows

    @lru_cache(4096)
    def read(place: int) -> str:
        source, row = find(place)
        return source.texts(np.array([row]))[0]

    def columns() -> Iterator[np.ndarray]:
        for band in range(choose_bands(threshold).number):
            each = [source.spool.load_bands()[rows, band] for source, rows in zip(sources, kept, strict=True)]
            yield np.concatenate(each)

    found = list(near_duplicates(columns(), read, threshold))
    entries = [_repeated(*find(duplicate.place), *find(duplicate.earlier), duplicate) for duplicate in found]
    for duplicate in found:
        source, row = find(duplicate.place)
        source.status[row] = CODE["near_duplicate"]
    return entries


def _repeated(source: Source, row: int, earlier: Source, earlier_row: int, duplicate: NearDuplicate) -> dict[str, Any]:
    pmid = int(earlier.rows[earlier_row]["pmid"])
    repeats = f"PMID {pmid}" if pmid else f"{earlier.path.name}: record {earlier_row + 1}"
    entry = _entry(source, source.rows[row], "near_duplicate")
    return entry | {"repeats": repeats, "share": duplicate.similarity}


def _entry(source: Source, row: np.ndarray, reason: str) -> dict[str, Any]:
    return {
        "reason": reason,
        "pmid": int(row["pmid"]) or None,
        "version": int(row["version"]) or None,
        "source": source.path.name,
    }


def count_reasons(sources: Sequence[Source]) -> dict[str, int]:
    """How many records were left out, by reason."""
    counts = sum((np.bincount(source.status, minlength=256) for source in sources), np.zeros(256, np.int64))
    return {reason: int(counts[CODE[reason]]) for reason in REASONS}


def require_documents(sources: Sequence[Source]) -> None:
    """UserError if nothing is left."""
    if not any(len(source.kept) for source in sources):
        raise UserError("no document is left after the filters; give more --input or relax the filters")
