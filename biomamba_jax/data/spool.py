"""First pass over the input: the candidates of one file become a spool (see `source`).

Everything that compares files works on the spools' indexes, 37 bytes a record, and never on texts. So files can be
spooled in any order and by any number of processes, and a later run reuses finished spools.
"""

import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from biomamba_jax.data.input_files import Checksums, check_md5
from biomamba_jax.data.near_duplicates import Bands, band_values
from biomamba_jax.data.records import KEPT, Candidate, Overlap, batched
from biomamba_jax.data.source import INDEX, Spool
from biomamba_jax.data.text import normalized_digest, split_position
from biomamba_jax.files import read_array, read_json, write_json
from biomamba_jax.folders import lock_file

SPOOL_VERSION = 4
"""Raised whenever the spool of an unchanged file would have other bytes."""
_BLOCK_ROWS = 4096


def finished_spool(path: Path, stem: str) -> Spool | None:
    """Return the spool of `path` at `stem` if it is complete.

    Raises:
      UserError: the file's MD5 sidecar states another sum now.
    """
    try:
        saved = read_json(f"{stem}.json")
        index = read_array(f"{stem}.npy")
        sizes = sum(index[name].sum(dtype=np.int64) for name in ("size", "id_size"))
        if index.dtype != INDEX or os.stat(f"{stem}.text").st_size != sizes:  # truncated, for example by a power cut
            return None
        overlaps = {row: Overlap(item, share) for row, item, share in saved["overlaps"]}
        spool = Spool(path, stem, Checksums(**saved["sums"]), saved["html_entities"], overlaps)
    except (OSError, ValueError, KeyError, IndexError, TypeError):  # damaged; a UserError is a ValueError
        return None
    check_md5(path, spool.sums.md5)
    return spool


def write_spool(
    path: Path, stem: str, sums: Checksums, candidates: Iterable[Candidate], bands: Bands | None = None
) -> Spool:
    """Write the candidates of a file as a spool.

    Args:
      path: the file that they were read from.
      stem: path of the spool's files without their endings.
      sums: checksums of the file.
      candidates: its records, in the file's order.
      bands: LSH bands to compute for each kept text; None computes none.
    """
    index, values, html_entities, first = [np.zeros(0, INDEX)], [], 0, 0
    overlaps: dict[int, Overlap] = {}
    with open(f"{stem}.text", "ab") as texts:
        lock_file(texts, path)
        texts.truncate(0)
        for block in batched(candidates, _BLOCK_ROWS):
            kept = [record for record in block if record.status == KEPT]
            texts.write("".join(f"{record.text}{record.id}" for record in kept).encode())
            index.append(np.array([_row(record) for record in block], INDEX))
            if bands is not None:
                values.append(band_values([record.text for record in kept], bands))
            html_entities += sum(record.html_entities for record in block)
            overlaps |= {row: r.overlap for row, r in enumerate(block, first) if r.overlap is not None}
            first += len(block)
    np.save(f"{stem}.npy", np.concatenate(index))
    if bands is not None:
        np.save(f"{stem}.bands.npy", np.concatenate([np.zeros((0, bands.number), np.uint64), *values]))
    listed = [(row, *overlap) for row, overlap in overlaps.items()]
    write_json(f"{stem}.json", {"sums": asdict(sums), "html_entities": html_entities, "overlaps": listed})
    return Spool(path, stem, sums, html_entities, overlaps)


def _row(record: Candidate) -> tuple[int, int, int, int, int, int, int, tuple[int, int]]:
    """Return the record as a row of INDEX."""
    if record.status != KEPT:
        return record.pmid, record.version, record.status, 0, record.date, 0, 0, (0, 0)
    raw = normalized_digest(record.text)
    digest = (int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little"))
    identity = str(record.pmid or record.id).encode()
    position = split_position(identity if record.pmid or record.id else raw)
    sizes = len(record.text.encode()), len(record.id.encode())
    return record.pmid, record.version, KEPT, position, record.date, *sizes, digest
