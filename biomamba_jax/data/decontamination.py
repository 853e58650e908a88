"""Keeping evaluation text out of the training text: by the PMIDs of its source articles, and by shared runs of words.

A document is left out for its text if it shares `overlap` or more of the runs of `WORDS` words that it, or one item of
an evaluation set (the shorter of the two), has. Light editing breaks only the runs that it touches: with one word in
20 replaced two thirds of the runs of 8 words stay, while set phrases of abstracts rarely share more than one or two.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biomamba_jax.data.shingles import shingles
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_lines, uncompressed_name

WORDS = 8
LEAST_SHARED = 4
"""Runs that must be shared at least (a phrase of eleven words), unless that is the whole document."""
_PMID_URL = re.compile(r"/pubmed/(\d{1,8})/?$|pubmed\.ncbi\.nlm\.nih\.gov/(\d{1,8})/?$")
_SAVED = ("pmids", "runs", "items", "sizes", "names")


class Item(NamedTuple):
    """One piece of evaluation text: its name ("FILE: KEY"), the text, and the PMIDs of its source articles."""

    name: str
    text: str
    pmids: tuple[int, ...]


class Overlap(NamedTuple):
    """The item that a document overlaps most with, and the share of runs, of the shorter one's, that they share."""

    item: str
    share: float


@dataclass(frozen=True)
class Evaluation:
    """Evaluation text in the form that documents are compared with.

    pmids  uint32 [source articles], ascending
    runs   uint64 [runs of words], ascending; items [same], which item each belongs to
    sizes  int64 [items], how many different runs each has; names [items]
    """

    pmids: np.ndarray
    runs: np.ndarray
    items: np.ndarray
    sizes: np.ndarray
    names: np.ndarray

    @property
    def digest(self) -> str:
        """Equal for equal evaluation text."""
        state = hashlib.blake2b(digest_size=8)
        for name in _SAVED:
            state.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return state.hexdigest()

    def save(self, path: Path) -> None:
        """Writes the file `path`, which ends in .npz."""
        np.savez(path, **{name: getattr(self, name) for name in _SAVED})

    def holds_pmid(self, pmid: int) -> bool:
        """Whether this is a source article."""
        place = np.searchsorted(self.pmids, pmid)
        return bool(place < len(self.pmids) and self.pmids[place] == pmid)

    def overlaps(self, texts: Sequence[str], least: float) -> dict[int, Overlap]:
        """For each of `texts` whose share is `least` or more: its place, and what it overlaps with."""
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
def load_evaluation(path: str) -> Evaluation:
    """What `Evaluation.save` wrote; kept in the process that asked last."""
    with np.load(path) as saved:
        return Evaluation(*(saved[name] for name in _SAVED))


def read_evaluation(paths: Iterable[str]) -> Evaluation:
    """Reads evaluation files: PubMedQA's or BioASQ's JSON, or any text, one item a line (.jsonl: its strings).

    Raises:
      UserError: a file that cannot be read, or holds no item.
    """
    items = [item for path in paths for item in _items(Path(path))]
    pmids = np.unique(np.array([pmid for item in items for pmid in item.pmids], np.uint32))
    names = np.array([item.name for item in items], np.str_)
    if not items:
        return Evaluation(pmids, np.zeros(0, np.uint64), np.zeros(0, np.int32), np.zeros(0, np.int64), names)
    runs, offsets = shingles([item.text for item in items], WORDS)
    each = [np.unique(part) for part in np.split(runs, offsets[1:-1])]
    sizes = np.array([len(part) for part in each], np.int64)
    flat, owner = np.concatenate(each), np.repeat(np.arange(len(each), dtype=np.int32), sizes)
    order = np.argsort(flat, kind="stable")
    return Evaluation(pmids, flat[order], owner[order], sizes, names)


def _items(path: Path) -> list[Item]:
    kind = Path(uncompressed_name(path).lower()).suffix
    if kind not in (".json", ".jsonl", ".txt"):
        raise UserError(f"{path}: unknown kind of evaluation text; --decontaminate takes .json, .jsonl and .txt")
    if kind == ".json":
        content = "\n".join(read_lines(path))
        try:
            found = list(_json_items(path, json.loads(content)))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{path}: neither PubMedQA's nor BioASQ's JSON ({error}); see --decontaminate") from None
    else:
        lines = _json_lines(path) if kind == ".jsonl" else map(str.strip, read_lines(path))
        found = [Item(f"{path.name}: line {number}", text, ()) for number, text in enumerate(lines, 1) if text]
    if not found:
        raise UserError(f"{path}: holds no evaluation text; give another --decontaminate")
    return found


def _json_lines(path: Path) -> Iterator[str]:
    """The strings of each line as one text; "" of an empty line."""
    for number, line in enumerate(read_lines(path), 1):
        try:
            yield " \n ".join(_strings(json.loads(line))) if line.strip() else ""
        except (ValueError, RecursionError):
            raise UserError(f"{path}: line {number} is not JSON; repair it or give another --decontaminate") from None


def _json_items(path: Path, content: Any) -> Iterator[Item]:
    if "questions" in content:  # BioASQ
        for question in content["questions"]:
            name = f"{path.name}: {question.get('id')}"
            snippets = question.get("snippets") or []
            documents = question.get("documents") or []
            links = [*documents, *(snippet.get("document") or "" for snippet in snippets)]
            pmids = tuple(int(match[1] or match[2]) for link in links if (match := _PMID_URL.search(link)))
            yield Item(name, question.get("body") or "", pmids)
            for snippet in snippets:
                yield Item(name, snippet.get("text") or "", ())
        return
    for pmid, question in content.items():  # PubMedQA
        pmids = (int(pmid),) if pmid.isdecimal() and int(pmid) < 2**32 else ()
        if isinstance(question, str):  # its list of test articles, {PMID: answer}
            yield Item(f"{path.name}: {pmid}", "", pmids)
            continue
        name = f"{path.name}: {pmid}"
        yield Item(name, " \n ".join(question.get("CONTEXTS") or []), pmids)
        for part in ("QUESTION", "LONG_ANSWER"):
            yield Item(name, question.get(part) or "", ())


def _strings(value: Any) -> Iterator[str]:
    """All strings inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
