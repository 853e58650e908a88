"""First pass over the input: one file in, its documents' texts and an index of all its records out.

A spool is a group of files: STEM.text (the UTF-8 texts of candidate documents, one after another), STEM.npy (one
`INDEX` row for every record and deletion, in the file's order), STEM.bands.npy where near duplicates are looked for,
and STEM.json, written last: a spool without it is unfinished. Everything that must look across files works on the
indexes, 35 bytes a record, and never on texts; files can so be spooled in any order and by any number of processes,
and a finished spool is used again by a run that was started anew.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from biomamba_jax.data.decontamination import Evaluation, Overlap, load_evaluation
from biomamba_jax.data.filters import CODE, KEPT, Filters
from biomamba_jax.data.input_files import Checksums, check_md5, checksums
from biomamba_jax.data.near_duplicates import Bands, band_values
from biomamba_jax.data.readers import Candidate, read_candidates
from biomamba_jax.data.text import normalized_digest, split_position
from biomamba_jax.files import naming_errors

_SPOOL_VERSION = 2  # raised whenever a spool of the same file would have other bytes
_BLOCK_ROWS = 4096
INDEX = np.dtype(
    [
        ("pmid", "<u4"),  # 0: has none
        ("version", "<u2"),
        ("status", "u1"),  # KEPT, DELETION, or the CODE of a reason
        ("split", "<u4"),  # split_position
        ("date", "<u4"),  # YYYYMMDD, 0: not known
        ("size", "<u4"),  # bytes of text in STEM.text; 0 unless kept
        ("digest", "<u8", (2,)),  # normalized_digest
    ]
)


@dataclass(frozen=True)
class SpoolTask:
    """Spool the file `path` into the folder `folder`.

    evaluation: a file of `Evaluation.save`, or None; overlap: the share from which on a document is left out.
    evaluation_digest is the content of that file. bands: of MinHash, or None.
    """

    path: str
    folder: str
    filters: Filters
    evaluation: str | None = None
    evaluation_digest: str = ""
    overlap: float = 1.0
    bands: Bands | None = None

    @property
    def stem(self) -> str:
        """Where the spool lies: the same for the same file and settings, another for any other."""
        with naming_errors(self.path):
            found = os.stat(self.path)
        file = (os.path.abspath(self.path), found.st_size, found.st_mtime_ns)
        overlap = self.overlap if self.evaluation_digest else None
        what = (_SPOOL_VERSION, *file, asdict(self.filters), self.evaluation_digest, overlap, self.bands)
        name = hashlib.blake2b(json.dumps(what).encode(), digest_size=12).hexdigest()
        return str(Path(self.folder) / name)


@dataclass(frozen=True)
class Spool:
    """A finished spool: where it lies, the input's checksums, and what was found in it.

    html_entities: how many were left in its texts and have been unescaped. overlaps: (row, item, share) of each record
    that is left out as evaluation text.
    """

    stem: str
    sums: Checksums
    html_entities: int
    overlaps: list[tuple[int, str, float]]

    def load_index(self) -> np.ndarray:
        """INDEX [records], memory-mapped."""
        return _load(f"{self.stem}.npy")

    def load_bands(self) -> np.ndarray:
        """uint64 [rows whose status is KEPT, bands], memory-mapped."""
        return _load(f"{self.stem}.bands.npy")


def _load(path: str) -> np.ndarray:
    with naming_errors(path):
        return np.load(path, mmap_mode="r")


def finished_spool(task: SpoolTask) -> Spool | None:
    """The spool of the task, if it is there whole; UserError if the file's MD5 sidecar now says another sum."""
    try:
        saved = json.loads(Path(f"{task.stem}.json").read_text("utf-8"))
        size = np.load(f"{task.stem}.npy", mmap_mode="r")["size"].sum(dtype=np.int64)
        if os.stat(f"{task.stem}.text").st_size != size:  # cut short, by a machine that lost its power, say
            return None
    except (OSError, ValueError):
        return None
    overlaps = [(row, item, share) for row, item, share in saved["overlaps"]]
    sums = Checksums(**saved["sums"])
    check_md5(task.path, sums.md5)
    return Spool(task.stem, sums, saved["html_entities"], overlaps)


def spool(task: SpoolTask) -> Spool:
    """Does the task, unless it was done before; UserError if the file is not whole and well-formed."""
    if (finished := finished_spool(task)) is not None:
        return finished
    stem, sums = task.stem, checksums(task.path)
    evaluation = None if task.evaluation is None else load_evaluation(task.evaluation)
    index, bands, overlaps, html_entities, first = [np.zeros(0, INDEX)], [], [], 0, 0
    with open(f"{stem}.text", "wb") as texts:
        for block in _blocks(read_candidates(Path(task.path), task.filters)):
            status, found = _judge(block, evaluation, task.overlap)
            overlaps += [(first + place, overlap.item, overlap.share) for place, overlap in found.items()]
            kept = [record.text for record, code in zip(block, status, strict=True) if code == KEPT]
            rows = np.array([_row(record, code) for record, code in zip(block, status, strict=True)], INDEX)
            texts.write("".join(kept).encode())
            index.append(rows)
            if task.bands is not None:
                bands.append(band_values(kept, task.bands))
            html_entities += sum(record.html_entities for record in block)
            first += len(block)
    np.save(f"{stem}.npy", np.concatenate(index))
    if task.bands is not None:
        np.save(f"{stem}.bands.npy", np.concatenate([np.zeros((0, task.bands.number), np.uint64), *bands]))
    partial = Path(f"{stem}.json.partial")
    saved = {"sums": asdict(sums), "html_entities": html_entities, "overlaps": overlaps}
    partial.write_text(json.dumps(saved), "utf-8")
    os.replace(partial, f"{stem}.json")
    return Spool(stem, sums, html_entities, overlaps)


def read_texts(stem: str, rows: np.ndarray) -> list[str]:
    """The texts of some of the kept rows of a spool, ascending."""
    borders, texts = _borders(stem), []
    with open(f"{stem}.text", "rb") as file:
        for first, end in zip(borders[rows].tolist(), borders[rows + 1].tolist(), strict=True):
            file.seek(first)
            texts.append(file.read(end - first).decode())
    return texts


@lru_cache(4)
def _borders(stem: str) -> np.ndarray:
    """Where each row's text begins in STEM.text, and the end of the last."""
    return np.concatenate([[0], np.cumsum(_load(f"{stem}.npy")["size"], dtype=np.int64)])


def _blocks(records: Iterable[Candidate]) -> Iterator[list[Candidate]]:
    iterator = iter(records)
    while block := list(islice(iterator, _BLOCK_ROWS)):
        yield block


def _judge(
    block: list[Candidate], evaluation: Evaluation | None, overlap: float
) -> tuple[list[int], dict[int, Overlap]]:
    """The status of each record, evaluation text told apart, and what those that are such overlap with."""
    status = [record.status for record in block]
    if evaluation is None:
        return status, {}
    for place, record in enumerate(block):
        if record.status == KEPT and record.pmid and evaluation.holds_pmid(record.pmid):
            status[place] = CODE["evaluation_article"]
    left = [place for place, code in enumerate(status) if code == KEPT]
    found = evaluation.overlaps([block[place].text for place in left], overlap)
    overlaps = {left[place]: what for place, what in found.items()}
    for place in overlaps:
        status[place] = CODE["evaluation_text"]
    return status, overlaps


def _row(record: Candidate, status: int) -> tuple[int, int, int, int, int, int, tuple[int, int]]:
    """The record as a row of INDEX."""
    if status != KEPT:
        return record.pmid, record.version, status, 0, record.date, 0, (0, 0)
    raw = normalized_digest(record.text)
    digest = (int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little"))
    position = split_position(str(record.pmid).encode() if record.pmid else raw)
    return record.pmid, record.version, status, position, record.date, len(record.text.encode()), digest
