"""Input files of every kind, as one stream of candidates for documents.

    .xml                NLM's PubmedArticleSet                       text: title, line end, abstract
    .jsonl .json        JSON lines, so also C4 as published          text: the "text" of each object
    .txt                plain text                                   text: each paragraph
    .parquet            as Wikipedia and others are on the hub       text: the "text" column
    *pages-articles*    Wikipedia's own dump (MediaWiki's XML)       text: title, line end, prose

All but Parquet may be compressed: .gz, .bz2 or .zst.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biomamba_jax.data import nlm
from biomamba_jax.data.filters import CODE, DELETION, KEPT, Filters
from biomamba_jax.data.text import clean_document
from biomamba_jax.data.wikipedia import read_pages
from biomamba_jax.errors import UserError
from biomamba_jax.files import naming_errors, read_lines, uncompressed_name

KINDS = ".xml, .jsonl, .json, .txt (each also .gz, .bz2 or .zst), .parquet or Wikipedia's pages-articles"
_DUMP = re.compile(r"-pages-articles(-multistream)?\d*\.xml(-p\d+p\d+)?$")
_PARQUET_ROWS = 256


@dataclass(frozen=True, slots=True)
class Candidate:
    """A record that can be a document, or the reason why not. Without a PMID nothing can replace or delete it.

    status: KEPT, DELETION or the CODE of a reason. text: "" unless kept. date: YYYYMMDD, 0 where it is not known.
    html_entities: as in `nlm.Article`.
    """

    status: int
    text: str = ""
    pmid: int = 0
    version: int = 0
    date: int = 0
    html_entities: int = 0


def read_candidates(path: Path, filters: Filters) -> Iterator[Candidate]:
    """Streams the records of a file; UserError where it is broken or of an unknown kind."""
    reader = _reader(path)
    if reader is None:
        raise UserError(f"{path}: unknown kind of file; --input takes {KINDS}")
    return reader(path, filters)


def _reader(path: Path) -> Callable[[Path, Filters], Iterator[Candidate]] | None:
    name = uncompressed_name(path).lower()
    if _DUMP.search(name):
        return _wikipedia
    readers = {".xml": _articles, ".jsonl": _json_lines, ".json": _json_lines, ".txt": _paragraphs}
    return {**readers, ".parquet": _parquet}.get(Path(name).suffix)


def files_in(path: str) -> list[Path]:
    """The file itself, or the files of a folder that can be read, by name; UserError where a folder has none."""
    if not Path(path).is_dir():
        return [Path(path)]
    known = (each for each in sorted(Path(path).iterdir()) if _reader(each) is not None and each.is_file())
    found = [each for each in known if not each.name.lower().startswith("readme")]  # NLM's README.txt is no text
    if not found:
        raise UserError(f"{path}: holds no file of a known kind; --input takes {KINDS}")
    return found


def _articles(path: Path, filters: Filters) -> Iterator[Candidate]:
    for record in nlm.read_articles(path):
        if isinstance(record, nlm.NotAnArticle):
            yield Candidate(CODE[record.reason])
        elif isinstance(record, nlm.Deletion):
            yield Candidate(DELETION, pmid=record.pmid)
        else:
            status = filters.of_article(record)
            text = record.text if status == KEPT else ""
            yield Candidate(status, text, record.pmid, record.version, record.date or 0, record.html_entities)


def _wikipedia(path: Path, filters: Filters) -> Iterator[Candidate]:
    for title, text in read_pages(path):
        yield _free_text(f"{title}\n{text}" if text else "", filters)


def _json_lines(path: Path, filters: Filters) -> Iterator[Candidate]:
    """One document a line, {"text": ..., "pmid": optional}; other keys are left aside."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            text, pmid = _fields(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise UserError(
                f'{path}: line {number} is not a JSON object with a string "text" and, if any, a whole number "pmid"'
            ) from None
        yield _free_text(text, filters, pmid)


def _parquet(path: Path, filters: Filters) -> Iterator[Candidate]:
    """One document a row, with the columns that JSON lines have as keys."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'biomamba-jax[parquet]'") from None
    try:
        with naming_errors(path), parquet.ParquetFile(path) as file:
            columns = [name for name in ("text", "pmid") if name in file.schema_arrow.names]
            for batch in file.iter_batches(_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    text, pmid = _fields({**row, "text": row["text"] or ""})
                    yield _free_text(text, filters, pmid)
    except (ArrowException, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f'{path}: not Parquet with a "text" column of strings ({reason}); convert it') from None


def _fields(record: dict[str, Any]) -> tuple[str, int]:
    text, pmid = record["text"], record.get("pmid") or 0
    if isinstance(pmid, float) and pmid.is_integer():  # a column with gaps, as tables keep it
        pmid = int(pmid)
    whole = isinstance(pmid, str) or type(pmid) is int
    if not isinstance(text, str) or not whole or not 0 <= int(pmid) < 2**32:
        raise ValueError("text is no string, or pmid no PMID")
    return text, int(pmid)


def _paragraphs(path: Path, filters: Filters) -> Iterator[Candidate]:
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
    status = filters.of_text(text)
    return Candidate(status, text if status == KEPT else "", pmid, 1 if pmid else 0)
