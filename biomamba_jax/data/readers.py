"""Input files of every kind as one stream of records.

    .xml                NLM's PubmedArticleSet                       text: title, newline, abstract
    .jsonl .json        JSON lines, so also C4 as published          text: --text of each object
    .csv .tsv           tables whose first line names the columns    text: --text of each row
    .parquet            as Wikipedia and others are on the hub       text: --text of each row
    .txt                plain text                                   text: each paragraph
    *pages-articles*    Wikipedia's own dump (MediaWiki's XML)       text: title, newline, prose
    hf:OWNER/NAME       a dataset of the Hugging Face hub            text: --text of each row

All but Parquet may be compressed: .gz, .bz2 or .zst.
"""

import csv
import re
from collections.abc import Callable, Collection, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from biomamba_jax.config.prepare import TextFields
from biomamba_jax.data import hub_dataset
from biomamba_jax.data.nlm import read_articles
from biomamba_jax.data.records import FreeText, Record
from biomamba_jax.data.text import clean_document, clean_line
from biomamba_jax.data.wikipedia import read_pages
from biomamba_jax.errors import UserError
from biomamba_jax.extras import extra
from biomamba_jax.files import naming_errors, read_json_lines, read_lines, uncompressed_name

KINDS = ".xml, .jsonl, .json, .csv, .tsv, .txt (each also .gz, .bz2 or .zst), .parquet or Wikipedia's pages-articles"
_DUMP = re.compile(r"-pages-articles(-multistream)?\d*\.xml(-p\d+p\d+)?$")
_PARQUET_ROWS = 256
_MAX_CELL = 1 << 24  # characters of a table's cell; a longer one begins with a quote that nothing closes
_DEFAULT = TextFields()
Row = tuple[str, dict[str, Any]]
"""A row's place, for messages, and its values by key."""


def read_records(path: str | Path, fields: TextFields = _DEFAULT) -> Iterator[Record]:
    """Yield the records of a file.

    Args:
      path: the file.
      fields: keys of text, title and id in rows.

    Raises:
      UserError: the file is broken or of an unknown kind.
    """
    kind = _kind(Path(path))
    if kind in _ROWS:
        return _documents(Path(path), fields)
    if kind in _RECORDS:
        return _RECORDS[kind](Path(path))
    raise UserError(f"{path}: unknown kind of file; --input takes {KINDS}")


def read_rows(path: Path, keys: Collection[str] | None = None, *, lone_surrogates: bool = False) -> Iterator[Row]:
    """Yield the rows of JSON lines or of a table.

    Args:
      path: a file of rows.
      keys: the only keys that are needed; None: all.
      lone_surrogates: accept halves of characters in JSON lines; see `files.read_json_lines`.

    Raises:
      UserError: the file is broken.
    """
    return _ROWS[_kind(path)](path, keys, lone_surrogates)


def is_rows(path: Path) -> bool:
    """Return True if `read_rows` reads a file of this name."""
    return _kind(path) in _ROWS


def files_in(path: str) -> list[Path]:
    """Return the file itself, the files of known kinds in a folder, sorted by name, or the parts of a hub's dataset.

    Raises:
      UserError: the folder has no such file, or the dataset cannot be read.
    """
    if path.startswith(hub_dataset.PREFIX):
        return [Path(part) for part in hub_dataset.parts(path)]
    if not Path(path).is_dir():
        return [Path(path)]
    known = (each for each in sorted(Path(path).iterdir()) if _kind(each) in (*_ROWS, *_RECORDS) and each.is_file())
    found = [each for each in known if not each.name.lower().startswith("readme")]  # such as NLM's README.txt
    if not found:
        raise UserError(f"{path}: holds no file of a known kind; --input takes {KINDS}")
    return found


def is_nlm(path: str) -> bool:
    """Return True if a file's name is that of NLM's XML."""
    return _kind(Path(path)) == ".xml"


def _kind(path: Path) -> str:
    if str(path).startswith(hub_dataset.PREFIX):
        return hub_dataset.PREFIX
    name = uncompressed_name(path).lower()
    return "pages-articles" if _DUMP.search(name) else Path(name).suffix


def _wikipedia(path: Path) -> Iterator[FreeText]:
    for title, text in read_pages(path):
        yield FreeText(clean_document(f"{title}\n{text}") if text else "")


def _paragraphs(path: Path) -> Iterator[FreeText]:
    """Yield a document for each paragraph: the lines up to an empty one."""
    for filled, lines in groupby(read_lines(path), lambda line: bool(line.strip())):
        if filled:
            yield FreeText(clean_document("\n".join(lines)))


# --- Rows ---


def _documents(path: Path, fields: TextFields) -> Iterator[FreeText]:
    """Yield a document for each row; a title or id that is named must be in at least one."""
    title, identity = fields.title or "", fields.id or "pmid"
    keys = [key for key in (fields.text, title, identity) if key]
    unseen = {key for key in (fields.title, fields.id) if key}
    where = ""
    for where, row in read_rows(path, keys, lone_surrogates=True):  # which `clean_document` replaces
        found = {key: value for key in keys if (value := _lookup(row, key)) is not _MISSING}
        if fields.text not in found:
            raise UserError(
                f"{where}: has no {fields.text!r} but {', '.join(row)}; name the key of its text: --text, of a domain "
                "--domains.NAME.text"
            )
        unseen -= found.keys()
        text, heading = (clean_document(_as_text(where, key, found.get(key))) for key in (fields.text, title))
        pmid, other = _identity(where, identity, found.get(identity))
        yield FreeText(text, pmid, clean_line(heading), other)
    if where and unseen:
        raise UserError(f"{path}: no record has {', '.join(map(repr, unseen))}; correct --title and --id")


_MISSING = object()


def _lookup(row: Any, key: str) -> Any:
    """Return the value of a key, or of a key in nested objects; _MISSING if there is none."""
    for part in (key,) if key in row else key.split("."):
        if not isinstance(row, dict) or part not in row:
            return _MISSING
        row = row[part]
    return row


def _as_text(where: str, key: str, value: Any) -> str:
    """Return a string, or strings as lines; "" for null."""
    lines = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(line, str) for line in lines):
        raise UserError(f"{where}: its {key!r} is not a string or a list of strings; correct it or name another key")
    return "\n".join(lines)


def _identity(where: str, key: str, value: Any) -> tuple[int, str]:
    """Return a row's (PMID, other id), of which one is set at most; a key called pmid holds PMIDs.

    Numbers may be written as tables write them: 3.0, or "3", or NaN where there is none.
    """
    value = None if value != value else value
    whole = isinstance(value, float) and value.is_integer()
    text = "" if value is None else clean_line(clean_document(str(int(value) if whole else value)))
    is_pmid = key.rpartition(".")[2].lower() == "pmid"
    valid = text.isascii() and text.isdecimal() and int(text[:11]) < 2**32 if is_pmid else len(text.encode()) < 2**16
    if text and (not valid or isinstance(value, bool | list | dict | bytes)):
        what = "a PMID" if is_pmid else "an id"
        raise UserError(f"{where}: its {key!r} is {value!r:.60}, not {what}; correct it or name another key with --id")
    return (int(text or 0), "") if is_pmid else (0, text)


def _json_lines(path: Path, keys: Collection[str] | None, lone_surrogates: bool) -> Iterator[Row]:
    for number, record in read_json_lines(path, lone_surrogates=lone_surrogates):
        yield f"{path}, line {number}", record


def _table(path: Path, keys: Collection[str] | None, lone_surrogates: bool) -> Iterator[Row]:
    """Yield the rows of a table whose first line names the columns."""
    csv.field_size_limit(_MAX_CELL)
    delimiter = "\t" if _kind(path) == ".tsv" else ","
    rows = csv.reader((f"{line}\n" for line in read_lines(path)), delimiter=delimiter, strict=True)
    try:
        columns = next(rows, [])
        if len(set(columns)) < len(columns):
            raise csv.Error("a column's name stands there twice")
        for row in filter(None, rows):
            if len(row) != len(columns):
                raise csv.Error(f"{len(row)} cells under {len(columns)} columns")
            yield f"{path}, line {rows.line_num}", dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise UserError(
            f"{path}, line {rows.line_num}: is not a table of {_kind(path)[1:].upper()} ({error}); its first line "
            "names the columns, and cells with separators or line ends stand in double quotes"
        ) from None


def _parquet(path: Path, keys: Collection[str] | None, lone_surrogates: bool) -> Iterator[Row]:
    purpose = f"{path}: reading Parquet needs pyarrow"
    pyarrow, parquet = (extra("parquet", each, purpose) for each in ("pyarrow", "pyarrow.parquet"))
    number = 0
    try:
        with naming_errors(path), parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = {part for key in keys or names for part in (key, key.partition(".")[0])}
            columns = [name for name in names if name in wanted] or names  # without any, a message lists all
            for batch in file.iter_batches(_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except UserError:
        raise
    except (pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"{path}: is not Parquet ({' '.join(str(error).split())}); convert it") from None


def _hub_dataset(path: Path, keys: Collection[str] | None, lone_surrogates: bool) -> Iterator[Row]:
    for number, row in enumerate(hub_dataset.read_part(str(path)), 1):
        yield f"{path}, row {number}", row


_ROWS: dict[str, Callable[[Path, Collection[str] | None, bool], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".json": _json_lines,
    ".csv": _table,
    ".tsv": _table,
    ".parquet": _parquet,
    hub_dataset.PREFIX: _hub_dataset,
}
_RECORDS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".xml": read_articles,
    ".txt": _paragraphs,
    "pages-articles": _wikipedia,
}
