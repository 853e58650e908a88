"""Input files of every kind as one stream of records.

    .xml                NLM's PubmedArticleSet                       text: title, newline, abstract
    .jsonl .json        JSON lines, so also C4 as published          text: the "text" of each object
    .txt                plain text                                   text: each paragraph
    .parquet            as Wikipedia and others are on the hub       text: the "text" column
    *pages-articles*    Wikipedia's own dump (MediaWiki's XML)       text: title, newline, prose

All but Parquet may be compressed: .gz, .bz2 or .zst.
"""

import re
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from biomamba_jax.data.nlm import read_articles
from biomamba_jax.data.records import FreeText, Record
from biomamba_jax.data.text import clean_document
from biomamba_jax.data.wikipedia import read_pages
from biomamba_jax.errors import UserError
from biomamba_jax.files import naming_errors, read_json_lines, read_lines, uncompressed_name

KINDS = ".xml, .jsonl, .json, .txt (each also .gz, .bz2 or .zst), .parquet or Wikipedia's pages-articles"
_DUMP = re.compile(r"-pages-articles(-multistream)?\d*\.xml(-p\d+p\d+)?$")
_PARQUET_ROWS = 256


def read_records(path: str | Path) -> Iterator[Record]:
    """Yield the records of a file.

    Raises:
      UserError: the file is broken or of an unknown kind.
    """
    reader = _reader(Path(path))
    if reader is None:
        raise UserError(f"{path}: unknown kind of file; --input takes {KINDS}")
    return reader(Path(path))


def files_in(path: str) -> list[Path]:
    """Return the file itself, or the files of known kinds in a folder, sorted by name.

    Raises:
      UserError: the folder has no such file.
    """
    if not Path(path).is_dir():
        return [Path(path)]
    known = (each for each in sorted(Path(path).iterdir()) if _reader(each) is not None and each.is_file())
    found = [each for each in known if not each.name.lower().startswith("readme")]  # NLM's README.txt is no input
    if not found:
        raise UserError(f"{path}: holds no file of a known kind; --input takes {KINDS}")
    return found


def _reader(path: Path) -> Callable[[Path], Iterator[Record]] | None:
    name = uncompressed_name(path).lower()
    return _wikipedia if _DUMP.search(name) else _READERS.get(Path(name).suffix)


def _wikipedia(path: Path) -> Iterator[FreeText]:
    for title, text in read_pages(path):
        yield FreeText(clean_document(f"{title}\n{text}") if text else "")


def _json_lines(path: Path) -> Iterator[FreeText]:
    """Yield a document for each line, {"text": ..., "pmid": optional}; other keys are ignored."""
    for number, record in read_json_lines(path):
        try:
            document = _document(record)
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f'{path}, line {number}: is not a JSON object with a string "text" and, optionally, a whole number '
                '"pmid"'
            ) from None
        yield document


def _parquet(path: Path) -> Iterator[FreeText]:
    """Yield a document for each row; columns are named as the keys of JSON lines."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs pyarrow: pip install 'biomamba-jax[parquet]'") from None
    try:
        with naming_errors(path), parquet.ParquetFile(path) as file:
            columns = [name for name in ("text", "pmid") if name in file.schema_arrow.names]
            for batch in file.iter_batches(_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    yield _document({**row, "text": row["text"] or ""})
    except UserError:
        raise
    except (ArrowException, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f'{path}: is not Parquet with a "text" column of strings ({reason}); convert it') from None


def _document(record: dict[str, Any]) -> FreeText:
    text, pmid = record["text"], record.get("pmid") or 0
    if isinstance(pmid, float) and pmid.is_integer():  # a column with gaps, as tables store it
        pmid = int(pmid)
    whole = isinstance(pmid, str) or type(pmid) is int
    if not isinstance(text, str) or not whole or not 0 <= int(pmid) < 2**32:
        raise ValueError("text is not a string, or pmid not a PMID")
    return FreeText(clean_document(text), int(pmid))


def _paragraphs(path: Path) -> Iterator[FreeText]:
    """Yield a document for each paragraph: the lines up to an empty one."""
    for filled, lines in groupby(read_lines(path), lambda line: bool(line.strip())):
        if filled:
            yield FreeText(clean_document("\n".join(lines)))


_READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".xml": read_articles,
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".txt": _paragraphs,
    ".parquet": _parquet,
}
