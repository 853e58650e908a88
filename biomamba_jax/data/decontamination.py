"""Decontamination: keeps evaluation text out of the training text.

A document is left out by the PMID of a source article, or for its text: if it shares at least a given fraction of the
runs of `WORDS` words of the shorter of the two, itself and an evaluation item. Light editing breaks only the runs that
it touches: with one word in 20 replaced, two thirds of the runs of 8 words stay, while stock phrases of abstracts
rarely share more than one or two.
"""

import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biomamba_jax.data.readers import is_rows, read_rows
from biomamba_jax.data.records import CODE, KEPT, Candidate, Overlap, batched
from biomamba_jax.data.shingles import shingles
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_any_json, read_lines, uncompressed_name

WORDS = 8
LEAST_SHARED = 4
"""Least number of shared runs (a phrase of eleven words), unless the document has fewer."""
_BLOCK_ROWS = 4096
_PMID_URL = re.compile(r"(?:/pubmed|pubmed\.ncbi\.nlm\.nih\.gov)/(\d{1,8})/?$")
# A value of these keys is text, or the file is damaged.
_TEXT_KEYS = ("question", "contexts", "context", "long_answer", "ideal_answer", "body", "text", "abstract", "sentence")


class Item(NamedTuple):
    """A piece of evaluation text."""

    name: str
    """FILE: KEY."""
    text: str
    """The text."""
    pmids: tuple[int, ...] = ()
    """PMIDs of its source articles."""


class EvaluationText(NamedTuple):
    """Evaluation text, indexed by its runs of words."""

    pmids: np.ndarray
    """PMIDs of source articles, uint32 [articles], ascending."""
    runs: np.ndarray
    """Hashes of the runs of words, uint64 [runs], ascending."""
    items: np.ndarray
    """Item of each run, int32 [runs]."""
    sizes: np.ndarray
    """Number of distinct runs of each item, int64 [items]."""
    names: np.ndarray
    """Name of each item, str [items]."""

    @property
    def digest(self) -> str:
        """Hash of the content."""
        state = hashlib.blake2b(digest_size=8)
        for part in self:
            state.update(np.ascontiguousarray(part).tobytes())
        return state.hexdigest()

    def save(self, path: Path) -> None:
        """Write the file `path`, which several processes may do at once."""
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            np.savez(file, **self._asdict())
        os.replace(file.name, path)

    def holds_pmid(self, pmid: int) -> bool:
        """Return True if this is a source article."""
        place = np.searchsorted(self.pmids, pmid)
        return bool(place < len(self.pmids) and self.pmids[place] == pmid)

    def overlaps(self, texts: Sequence[str], least: float) -> dict[int, Overlap]:
        """Return the best overlap of each text whose share is `least` or more, by the text's index."""
        found: dict[int, Overlap] = {}
        if not len(self.runs) or not texts:
            return found
        runs, offsets = shingles(texts, WORDS)
        hit = self.runs[np.minimum(np.searchsorted(self.runs, runs), len(self.runs) - 1)] == runs
        hits = np.add.reduceat(hit, offsets[:-1], dtype=np.int64)
        for place in np.flatnonzero(hits >= np.minimum(LEAST_SHARED, np.diff(offsets))).tolist():
            own = np.unique(runs[offsets[place] : offsets[place + 1]])
            first, last = np.searchsorted(self.runs, own, "left"), np.searchsorted(self.runs, own, "right")
            shared = np.bincount(np.concatenate([self.items[a:b] for a, b in zip(first, last, strict=True)]))
            touched = np.flatnonzero(shared)
            shorter = np.minimum(self.sizes[touched], len(own))
            counts = shared[touched]
            shares = np.where((counts >= LEAST_SHARED) | (counts == len(own)), counts / shorter, 0.0)
            best = int(shares.argmax())
            if shares[best] >= least:
                found[place] = Overlap(str(self.names[touched[best]]), round(float(shares[best]), 4))
        return found


@lru_cache(1)
def load_evaluation(path: str) -> EvaluationText:
    """Load what `EvaluationText.save` wrote; cached in each process."""
    with np.load(path) as saved:
        return EvaluationText(**saved)


def decontaminate(candidates: Iterable[Candidate], evaluation: EvaluationText, least: float) -> Iterator[Candidate]:
    """Yield the candidates with source articles of `evaluation`, and texts that overlap it, marked as left out.

    Args:
      candidates: the records.
      evaluation: the evaluation text.
      least: share of runs of words at which a document counts as evaluation text.
    """
    for block in batched(candidates, _BLOCK_ROWS):
        for place, record in enumerate(block):
            if record.status == KEPT and record.pmid and evaluation.holds_pmid(record.pmid):
                block[place] = replace(record, status=CODE["evaluation_article"])
        left = [place for place, record in enumerate(block) if record.status == KEPT]
        for index, overlap in evaluation.overlaps([block[place].text for place in left], least).items():
            place = left[index]
            block[place] = replace(block[place], status=CODE["evaluation_text"], overlap=overlap)
        yield from block


def read_evaluation(paths: Iterable[str]) -> EvaluationText:
    """Read evaluation files: all strings of JSON of any layout, of JSON lines and of tables, or the lines of a text.

    Raises:
      UserError: a file cannot be read or holds no item.
    """
    items = [item for path in paths for item in _items(Path(path))]
    pmids = np.unique(np.array([pmid for item in items for pmid in item.pmids], np.uint32))
    runs, offsets = shingles([item.text for item in items], WORDS)
    each = [np.unique(part) for part in np.split(runs, offsets[1:-1])]
    sizes = np.array([len(part) for part in each], np.int64)
    flat, owner = np.concatenate(each), np.repeat(np.arange(len(each), dtype=np.int32), sizes)
    order = np.argsort(flat, kind="stable")
    return EvaluationText(pmids, flat[order], owner[order], sizes, np.array([item.name for item in items], np.str_))


def _items(path: Path) -> list[Item]:
    kind = Path(uncompressed_name(path).lower()).suffix
    if kind == ".json":
        found = list(_strings(path, "", read_any_json(path)))
    elif kind == ".txt":
        lines = enumerate(map(str.strip, read_lines(path)), 1)
        found = [Item(f"{path.name}: line {number}", text) for number, text in lines if text]
    elif is_rows(path):
        rows = read_rows(path, lone_surrogates=True)
        found = [item for where, row in rows for item in _strings(path, where.removeprefix(f"{path}, "), row)]
    else:
        raise UserError(f"{path}: unknown kind of evaluation text; --decontaminate takes JSON, tables and .txt")
    if not any(item.pmids or len(item.text.split()) >= WORDS for item in found):
        raise UserError(f"{path}: holds no text of {WORDS} words and no PMID; give another --decontaminate")
    return found


def _strings(path: Path, name: str, value: Any) -> Iterator[Item]:
    """Yield each text in a JSON value of any layout as an item, and the PMIDs of source articles.

    Texts are strings, bytes in UTF-8 (of Parquet), keys that are sentences, and lists of words. PMIDs are in links to
    PubMed, under keys called pmid, and the keys of PubMedQA's questions and answers. An item is named by the `id`
    around it, else by the keys that lead to it.

    Args:
      path: the file.
      name: name of the value, "" if it is the whole file.
      value: the value.

    Raises:
      UserError: a number or boolean where text belongs; names the key.
    """
    pending = [(name, bool(name), "", value)]
    while pending:
        name, named, text_key, value = pending.pop()
        if isinstance(value, bytes):
            with suppress(UnicodeDecodeError):  # others are images and the like
                value = value.decode()
        if isinstance(value, list) and len(value) >= WORDS and all(isinstance(x, str) and " " not in x for x in value):
            yield Item(f"{path.name}: {name}", " ".join(value))
        if isinstance(value, str) and value:
            yield Item(f"{path.name}: {name}", value, tuple(map(int, _PMID_URL.findall(value))))
        elif isinstance(value, dict | list):
            if isinstance(value, dict) and isinstance(value.get("id"), str | int):
                name, named = str(value["id"]), True
            entries = value.items() if isinstance(value, dict) else enumerate(value, 1)
            for key, part in reversed([(str(key), part) for key, part in entries]):
                if key == "CONTEXTS" and isinstance(part, list) and all(isinstance(each, str) for each in part):
                    part = " \n ".join(part)  # PubMedQA's sections of one abstract
                if isinstance(value, dict) and len(key.split()) >= WORDS:
                    yield Item(f"{path.name}: {name}", key)
                inner = name if named or (name and isinstance(part, str)) else f"{name}.{key}".lstrip(".")
                if (pmid := _stated_pmid(key, part)) is not None:
                    yield Item(f"{path.name}: {inner}", "", (pmid,))
                pending.append((inner, named, key if key.lower() in _TEXT_KEYS else text_key, part))
        elif text_key and value is not None and not isinstance(value, str):
            raise UserError(f"{path}: {text_key!r} of {name} is {value!r}, not text; correct it or leave the file out")


def _stated_pmid(key: str, value: Any) -> int | None:
    """Return the PMID that an entry of a JSON object states: under "pmid", or as the key of PubMedQA's questions."""
    of_pubmedqa = "QUESTION" in value if isinstance(value, dict) else value in ("yes", "no", "maybe")
    pmid = key if of_pubmedqa else str(value) if key.lower() == "pmid" else ""
    return int(pmid) if pmid.isdecimal() and len(pmid) <= 10 and int(pmid) < 2**32 else None
