"""What is settled across files: which version of a record counts, what was deleted, which texts are repeated.

Works on columns of the spools' indexes, in the files' order. All of PubMed, some 45 million records with its updates,
takes 45e6 * (4 + 2 + 1 bytes of columns + 4 * 8 bytes of sorting) = 1.8 GB.
"""

from collections.abc import Sequence

import numpy as np

from biomamba_jax.data.spool import CODE, DELETION, KEPT


def resolve(indexes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The final status (KEPT, DELETION or the CODE of a reason) of every row of every index, uint8.

    Records of one PMID: a deletion removes those before it, in this or an earlier file; of those after the last
    deletion the highest version wins, and among equal versions the latest. The winner keeps its own status, even if
    that is a reason to leave it out. Of documents with the same text the first is kept.
    """
    status = np.concatenate([index["status"] for index in indexes]) if indexes else np.zeros(0, np.uint8)
    pmid = np.concatenate([index["pmid"] for index in indexes]) if indexes else np.zeros(0, np.uint32)
    version = np.concatenate([index["version"] for index in indexes]) if indexes else np.zeros(0, np.uint16)
    _resolve_versions(status, pmid, version)
    del pmid, version
    _drop_repeated(status, [index["digest"] for index in indexes])
    return np.split(status, np.cumsum([len(index) for index in indexes])[:-1])


def _resolve_versions(status: np.ndarray, pmid: np.ndarray, version: np.ndarray) -> None:
    """Marks deleted and superseded records in `status`."""
    order = np.argsort(pmid, kind="stable")  # by PMID, and within one PMID as the files have them
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
    # Highest version first, then the latest place: one number a record, whose largest wins.
    rank = np.where(alive, (version[order].astype(np.int64) << 40) + place, -1)
    winner = rank == np.repeat(np.maximum.reduceat(rank, starts), lengths)
    status[order[~alive & ~deletion]] = CODE["deleted"]
    status[order[alive & ~winner]] = CODE["superseded"]


def _drop_repeated(status: np.ndarray, digests: Sequence[np.ndarray]) -> None:
    """Marks all but the first of kept documents with equal digests."""
    kept = np.flatnonzero(status == KEPT)
    halves = [np.concatenate([digest[:, half] for digest in digests] or [np.zeros(0)])[kept] for half in (0, 1)]
    order = np.lexsort(halves)  # stable: equal digests stay in the files' order
    same = np.ones(max(len(order) - 1, 0), bool)
    for half in halves:
        same &= half[order[1:]] == half[order[:-1]]
    status[kept[order[1:][same]]] = CODE["duplicate_text"]
