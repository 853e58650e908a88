"""Resolution across files: the version of a record that counts, deletions, duplicates and near duplicates.

Works on columns of the spools' indexes, in the files' order. All of PubMed, some 46 million records with its updates,
takes 46e6 * 7 bytes for pmid, version and status, and 6 * 8 bytes more per record to sort versions: 2.5 GB (2.53 GB
measured on as many synthetic records); finding duplicate texts takes 27e6 kept documents * 5 * 8 bytes: 1.1 GB.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from biomamba_jax.data.near_duplicates import choose_bands, near_duplicates
from biomamba_jax.data.records import CODE, DELETION, KEPT
from biomamba_jax.data.source import Source


def resolve(load_indexes: Sequence[Callable[[], np.ndarray]]) -> list[np.ndarray]:
    """Return the status of every row of every index once versions, deletions and duplicate texts are resolved.

    Records of one PMID: a deletion removes those before it, in this or an earlier file; of those after the last
    deletion the highest version wins, and among equal versions the latest. The winner keeps its own status, even if
    that is a reason to leave it out. Of documents with the same text the first is kept.

    Args:
      load_indexes: returns the INDEX of each file; called anew for each column, so that none stays in memory.

    Returns:
      For each file uint8 [records]: KEPT, DELETION or the CODE of a reason.
    """
    if not load_indexes:
        return []
    status, pmid, version = (
        np.concatenate([load()[name] for load in load_indexes]) for name in ("status", "pmid", "version")
    )
    ends = np.cumsum([len(load()) for load in load_indexes])
    _resolve_versions(status, pmid, version)
    del pmid, version
    parts = np.split(status, ends[:-1])  # views of `status`
    halves = [
        np.concatenate([load()["digest"][part == KEPT, half] for load, part in zip(load_indexes, parts, strict=True)])
        for half in (0, 1)
    ]
    _drop_repeated(status, halves)
    return parts


def _resolve_versions(status: np.ndarray, pmid: np.ndarray, version: np.ndarray) -> None:
    """Mark deleted and superseded records in `status`."""
    order = np.argsort(pmid, kind="stable")  # by PMID, and within one PMID in the files' order
    order = order[np.searchsorted(pmid, 0, side="right", sorter=order) :]  # rows without a PMID stand alone
    if not len(order):
        return
    sorted_pmid = pmid[order]
    starts = np.flatnonzero(np.r_[True, sorted_pmid[1:] != sorted_pmid[:-1]])
    lengths = np.diff(np.r_[starts, len(order)])
    place = np.arange(len(order))
    deletion = status[order] == DELETION
    last_deletion = np.repeat(np.maximum.reduceat(np.where(deletion, place, -1), starts), lengths)
    alive = place > last_deletion
    del last_deletion
    # Highest version first, then the latest place: the largest rank wins.
    rank = np.where(alive, (version[order].astype(np.int64) << 40) + place, -1)
    del place
    winner = rank == np.repeat(np.maximum.reduceat(rank, starts), lengths)
    status[order[~alive & ~deletion]] = CODE["deleted"]
    status[order[alive & ~winner]] = CODE["superseded"]


def _drop_repeated(status: np.ndarray, halves: Sequence[np.ndarray]) -> None:
    """Mark all but the first of kept documents with equal digests; `halves` are the digests of the kept rows."""
    kept = np.flatnonzero(status == KEPT)
    order = np.lexsort(halves)  # stable: equal digests stay in the files' order
    same = np.ones(max(len(order) - 1, 0), bool)
    for half in halves:
        same &= half[order[1:]] == half[order[:-1]]
    status[kept[order[1:][same]]] = CODE["duplicate_text"]


def drop_near_duplicates(sources: Sequence[Source], threshold: float) -> list[dict[str, Any]]:
    """Mark near duplicates of earlier documents in the sources' status.

    Returns:
      The entries of removed.jsonl for them.
    """
    rows = [source.kept for source in sources]
    ends = np.cumsum([len(own) for own in rows])

    def find(place: int) -> tuple[Source, int]:
        number = int(np.searchsorted(ends, place, side="right"))
        return sources[number], int(rows[number][place - ends[number]])  # counted from the end of the source's rows

    @lru_cache(4096)
    def read(place: int) -> str:
        source, row = find(place)
        return source.texts(np.array([row]))[0]

    def columns() -> Iterator[np.ndarray]:
        # Bands were computed for the candidates of each file, of which some are no longer kept.
        kept = [np.flatnonzero(source.status[source.rows["status"] == KEPT] == KEPT) for source in sources]
        for band in range(choose_bands(threshold).number):
            yield np.concatenate([each.spool.load_bands()[own, band] for each, own in zip(sources, kept, strict=True)])

    removed = []
    for duplicate in near_duplicates(columns(), read, threshold):
        source, row = find(duplicate.place)
        earlier, earlier_row = find(duplicate.earlier)
        pmid = int(earlier.rows[earlier_row]["pmid"])
        repeats = f"PMID {pmid}" if pmid else f"{earlier.spool.path.name}: record {earlier_row + 1}"
        removed.append(source.removal(row, "near_duplicate", repeats, duplicate.similarity))
        source.status[row] = CODE["near_duplicate"]
    return removed
