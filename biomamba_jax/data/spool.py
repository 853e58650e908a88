"""First pass over the input: one file in, its documents' texts and an index of all its records out.

A spool is a pair STEM.text (the UTF-8 texts of candidate documents, one after another) and STEM.npy (one `INDEX` row
for every record and deletion, in the file's order). Everything that must look across files works on the indexes, some
50 bytes a record, and never on texts; files can so be spooled in any order and by any number of processes.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from biomamba_jax.data import nlm
from biomamba_jax.data.files import Checksums, checksums, naming_errors, read_lines
from biomamba_jax.data.text import clean_document, normalized_digest, split_position
from biomamba_jax.errors import UserError

KEPT, DELETION = 0, 255
REASONS = {
    "book_article": "book or book chapter, not an article",
    "unknown_element": "element that PubmedArticleSet does not have",
    "no_pmid": "record or deletion without a valid PMID",
    "no_abstract": "no abstract or text",
    "too_short": "abstract or text under the minimum length",
    "retracted": "retracted publication",
    "deleted": "taken back by DeleteCitation",
    "superseded": "another version or a later file replaces it",
    "duplicate_text": "same text as an earlier document",
}
"""Why a record may be left out, with what that means; a record has one reason at most."""
CODE = {reason: code for code, reason in enumerate(REASONS, 1)}

_BLOCK_ROWS = 1 << 16
INDEX = np.dtype(
    [
        ("pmid", "<u4"),  # 0: has none
        ("version", "<u2"),
        ("status", "u1"),  # KEPT, DELETION, or the CODE of a reason
        ("split", "<u4"),  # split_position
        ("size", "<u4"),  # bytes of text in STEM.text; 0 unless kept
        ("digest", "<u8", (2,)),  # normalized_digest
    ]
)


@dataclass(frozen=True)
class Filters:
    """Which records can become documents, judged one by one."""

    min_abstract_characters: int = 50
    keep_retracted: bool = False


@dataclass(frozen=True)
class SpoolTask:
    """Spool the file `path` into `stem`.text and `stem`.npy."""

    path: str
    stem: str
    filters: Filters


@dataclass(frozen=True)
class Candidate:
    """A record that can be a document, or the reason why not. Without a PMID nothing can replace or delete it."""

    status: int
    text: str = ""
    pmid: int = 0
    version: int = 0


def spool(task: SpoolTask) -> Checksums:
    """Does the task and returns the file's checksums; UserError if the file is not whole and well-formed."""
    sums = checksums(task.path)
    rows: list[tuple[int, int, int, int, int, tuple[int, int]]] = []
    blocks = []
    with open(f"{task.stem}.text", "wb") as texts:
        for record in _candidates(Path(task.path), task.filters):
            data = record.text.encode()
            position, digest = 0, (0, 0)
            if record.status == KEPT:
                raw = normalized_digest(record.text)
                digest = (int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:], "little"))
                position = split_position(str(record.pmid).encode() if record.pmid else raw)
                texts.write(data)
            rows.append((record.pmid, record.version, record.status, position, len(data), digest))
            if len(rows) == _BLOCK_ROWS:  # tuples take six times the memory of INDEX rows
                blocks.append(np.array(rows, INDEX))
                rows = []
    np.save(f"{task.stem}.npy", np.concatenate([*blocks, np.array(rows, INDEX)]))
    return sums


def read_texts(stem: str, offsets: np.ndarray, sizes: np.ndarray) -> list[str]:
    """The texts of STEM.text at byte `offsets` (ascending) of the given sizes."""
    texts = []
    with open(f"{stem}.text", "rb") as file:
        for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
            file.seek(offset)
            texts.append(file.read(size).decode())
    return texts


def _candidates(path: Path, filters: Filters) -> Iterator[Candidate]:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    readers = {".xml": _nlm_candidates, ".jsonl": _json_candidates, ".txt": _text_candidates}
    if suffix not in readers:
        raise UserError(f"{path}: unknown kind of file; --input takes .xml, .jsonl and .txt, each also with .gz")
    return readers[suffix](path, filters)


def _nlm_candidates(path: Path, filters: Filters) -> Iterator[Candidate]:
    for record in nlm.read_articles(path):
        if isinstance(record, nlm.NotAnArticle):
            yield Candidate(CODE[record.reason])
        elif isinstance(record, nlm.Deletion):
            yield Candidate(DELETION, pmid=record.pmid)
        else:
            status = _status(record.abstract, filters)
            if status == KEPT and record.retracted and not filters.keep_retracted:
                status = CODE["retracted"]
            yield Candidate(status, record.text if status == KEPT else "", record.pmid, record.version)


def _json_candidates(path: Path, filters: Filters) -> Iterator[Candidate]:
    """One document a line, {"text": ..., "pmid": optional}; other keys are left aside."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text, pmid = record["text"], int(record.get("pmid") or 0)
            if not isinstance(text, str) or not 0 <= pmid < 2**32:
                raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(
                f'{path}: line {number} is not a JSON object with a string "text" and, if any, a whole number "pmid"'
            ) from None
        yield _free_text(text, filters, pmid)


def _text_candidates(path: Path, filters: Filters) -> Iterator[Candidate]:
    """One document a paragraph: lines up to an empty one."""
    paragraph: list[str] = []
    for line in read_lines(path):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield _free_text("\n".join(paragraph), filters)
            paragraph = []
    if paragraph:
        yield _free_text("\n".join(paragraph), filters)


def _free_text(text: str, filters: Filters, pmid: int = 0) -> Candidate:
    text = clean_document(text)
    status = _status(text, filters)
    return Candidate(status, text if status == KEPT else "", pmid, 1 if pmid else 0)


def _status(text: str, filters: Filters) -> int:
    if not text:
        return CODE["no_abstract"]
    return CODE["too_short"] if len(text) < filters.min_abstract_characters else KEPT


def load_index(stem: str) -> np.ndarray:
    """The rows of STEM.npy, memory-mapped."""
    with naming_errors(f"{stem}.npy"):
        return np.load(f"{stem}.npy", mmap_mode="r")
