"""Shards: tokenized documents on disk, one ArrayRecord record a document, and the manifest that vouches for them.

    output/manifest.json
    output/train/shard-00000-of-00004.array_record ...    records in global order: shard by shard
    output/train/lengths.npy                              uint32 [documents]: tokens of each document, EOS included
    output/removed.jsonl                                  near duplicates and evaluation text left out, if asked for

A record is msgpack {"ids": little-endian uint16 or uint32 bytes, "pmid": int | None, "version": int | None,
"source": index into the manifest's sources, "bytes": UTF-8 length of the text}. Packing reads `lengths.npy` only.
"""

import dataclasses
import json
import os
import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgpack
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from biomamba_jax.errors import UserError

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
LENGTHS_NAME = "lengths.npy"
_SHARD_NAME = re.compile(r"shard-(\d{5})-of-(\d{5})\.array_record")
_PREPARE_AGAIN = "run `python -m biomamba_jax.prepare` again into a new folder"


class Document(NamedTuple):
    """One stored document: int32 ids [tokens] that end with EOS, and what is needed to find its text again."""

    ids: np.ndarray
    pmid: int | None
    version: int | None
    source: int  # index into Manifest.sources
    num_bytes: int  # UTF-8 length of the text that the ids spell

    @property
    def targets(self) -> np.ndarray:
        """What is predicted of the document: every token."""
        return self.ids


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the ids; `sha256` is that of `file`, a path relative to the manifest's folder."""

    name: str
    sha256: str
    file: str
    vocab_size: int
    eos_id: int


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """Totals of one split; `bytes` is the UTF-8 length of its text, `tokens` includes one EOS a document."""

    documents: int
    tokens: int
    bytes: int
    shards: int


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The one description of a folder of shards; written last, so a folder without it is unfinished.

    filters counts what was left out, by reason. sources lists the inputs, each at least {"name", "sha256"}.
    settings repeats the options of the command that made the folder.
    """

    tokenizer: TokenizerInfo
    splits: dict[str, SplitInfo]
    filters: dict[str, int]
    sources: list[dict[str, Any]]
    settings: dict[str, Any]
    format_version: int = FORMAT_VERSION

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `folder`/manifest.json, whole or not at all."""
        path = Path(folder) / MANIFEST_NAME
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n", "utf-8")
        os.replace(temporary, path)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Reads `folder`/manifest.json; UserError for a missing, broken or unknown one."""
        path = Path(folder) / MANIFEST_NAME
        try:
            raw = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file; give the folder that `python -m biomamba_jax.prepare --output` wrote"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as JSON ({error}); {_PREPARE_AGAIN}") from None
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: format_version is {version!r}, this program reads {FORMAT_VERSION}; {_PREPARE_AGAIN}"
            )
        fields = _checked(path, "", raw, cls)
        fields["tokenizer"] = TokenizerInfo(**_checked(path, "tokenizer.", raw["tokenizer"], TokenizerInfo))
        fields["splits"] = {
            name: SplitInfo(**_checked(path, f"splits.{name}.", split, SplitInfo))
            for name, split in raw["splits"].items()
        }
        return cls(**fields)

    def check_tokenizer(self, sha256: str) -> None:
        """UserError unless the shards were made with the tokenizer file whose sha256 this is."""
        if sha256 != self.tokenizer.sha256:
            raise UserError(
                f"the shards were made with tokenizer {self.tokenizer.name!r} (sha256 {self.tokenizer.sha256}), "
                f"not with one of sha256 {sha256}; use {self.tokenizer.file!r} of the shard folder, "
                "or run `prepare` again with your tokenizer"
            )


def _checked(path: Path, prefix: str, raw: Any, schema: type) -> dict[str, Any]:
    """The mapping `raw`, if it has exactly the fields of dataclass `schema`, each of the right outer type."""
    if not isinstance(raw, dict):
        raise UserError(f"{path}: {prefix.rstrip('.')} is no mapping; {_PREPARE_AGAIN}")
    fields = {field.name: field.type for field in dataclasses.fields(schema)}
    missing = [prefix + name for name in fields if name not in raw]
    unknown = [prefix + name for name in raw if name not in fields]
    if missing or unknown:
        what = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
        raise UserError(f"{path}: {' and '.join(what)}; {_PREPARE_AGAIN}")
    for name, declared in fields.items():
        outer = getattr(declared, "__origin__", declared)
        expected = outer if outer in (int, str, list) else dict  # nested dataclasses are mappings in JSON
        if not isinstance(raw[name], expected) or isinstance(raw[name], bool):
            raise UserError(
                f"{path}: {prefix}{name} is {raw[name]!r}, not of type {expected.__name__}; {_PREPARE_AGAIN}"
            )
    return dict(raw)


class ShardWriter:
    """Writes one split, in the order of the calls; use it as a context manager.

        with ShardWriter(folder / "train", documents_per_shard=65_536, token_dtype="uint16") as writer:
            writer.write(ids, pmid=1, version=1, source=0, num_bytes=1200)
        splits["train"] = writer.info

    Shards get their final names, and lengths.npy is written, when the block ends; if it ends with an exception,
    every file of the writer is removed again. `token_dtype` is "uint16" (vocabularies up to 65,536) or "uint32".
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, documents_per_shard: int = 65_536, token_dtype: str = "uint16"
    ):
        if documents_per_shard < 1:
            raise UserError(f"documents_per_shard must be at least 1, not {documents_per_shard}")
        if token_dtype not in ("uint16", "uint32"):
            raise UserError(f"token_dtype must be 'uint16' or 'uint32', not {token_dtype!r}")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        taken = [p.name for p in self.folder.iterdir() if p.suffix in (".array_record", ".partial", ".npy")]
        if taken:
            raise UserError(f"{self.folder}: already holds {taken[0]}; remove the folder or choose another --output")
        self._documents_per_shard = documents_per_shard
        self._dtype = np.dtype(token_dtype).newbyteorder("<")
        self._lengths = array("I")
        self._num_bytes = 0
        self._shards: list[Path] = []
        self._writer: ArrayRecordWriter | None = None

    def write(self, ids: Any, *, pmid: int | None, version: int | None, source: int, num_bytes: int) -> None:
        """Appends one document: `ids` a sequence of ints that ends with EOS, `num_bytes` its text's UTF-8 length."""
        ids = np.asarray(ids)
        if ids.ndim != 1 or ids.size == 0 or ids.min() < 0 or ids.max() > np.iinfo(self._dtype).max:
            raise ValueError(f"ids of PMID {pmid} must be a non-empty list of ids that fit {self._dtype.name}")
        if self._writer is None or len(self._lengths) % self._documents_per_shard == 0:
            self._next_shard()
        assert self._writer is not None
        record = {
            "ids": ids.astype(self._dtype).tobytes(),
            "pmid": pmid,
            "version": version,
            "source": source,
            "bytes": num_bytes,
        }
        with _as_os_errors():
            self._writer.write(msgpack.packb(record))
        self._lengths.append(ids.size)
        self._num_bytes += num_bytes

    @property
    def info(self) -> SplitInfo:
        """Totals so far, for the manifest."""
        return SplitInfo(len(self._lengths), sum(self._lengths), self._num_bytes, len(self._shards))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            try:
                self._close()
            finally:
                for path in self.folder.glob("*.partial"):  # none is left after _finish
                    path.unlink()

    def _close(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with _as_os_errors():
                writer.close()

    def _next_shard(self) -> None:
        self._close()
        path = self.folder / f"shard-{len(self._shards):05d}.partial"
        # Group size 1: every document is compressed by itself, so that one can be read without its neighbours.
        self._writer = ArrayRecordWriter(str(path), "group_size:1")
        self._shards.append(path)

    def _finish(self) -> None:
        if not self._shards:  # an empty split still is a valid one
            self._next_shard()
        self._close()
        with open(self.folder / f"{LENGTHS_NAME}.partial", "wb") as file:
            np.save(file, np.frombuffer(self._lengths, np.uint32) if self._lengths else np.zeros(0, np.uint32))
        for i, path in enumerate(self._shards):
            os.replace(path, self.folder / f"shard-{i:05d}-of-{len(self._shards):05d}.array_record")
        os.replace(self.folder / f"{LENGTHS_NAME}.partial", self.folder / LENGTHS_NAME)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """ArrayRecord's errors, of a full disk for one, as the OSErrors that other files give."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from None


class ShardReader:
    """Random access to the documents of one split folder: `len(reader)`, `reader[i]`, `reader.lengths`.

    Safe to share between threads and to pickle: files are opened at first use, in each process anew. UserError when
    a shard or lengths.npy is missing, damaged, or does not belong to the others.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        self.paths = _shard_paths(self.folder)
        try:
            self._records = ArrayRecordDataSource([str(path) for path in self.paths])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.folder}: a shard is damaged ({error}); {_PREPARE_AGAIN}") from None
        self._lengths = _load_lengths(self.folder)
        if len(self._lengths) != len(self._records):
            raise UserError(
                f"{self.folder / LENGTHS_NAME}: has {len(self._lengths)} documents, the shards beside it hold "
                f"{len(self._records)}; {_PREPARE_AGAIN}"
            )

    @property
    def lengths(self) -> np.ndarray:
        """uint32 [documents], memory-mapped: tokens of each document, EOS included."""
        return self._lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> Document:
        index = range(len(self))[index]
        try:
            record = msgpack.unpackb(self._records[index])
            raw, length = record["ids"], int(self._lengths[index])
            ids = np.frombuffer(raw, {2 * length: "<u2", 4 * length: "<u4"}[len(raw)])
            return Document(ids.astype(np.int32), record["pmid"], record["version"], record["source"], record["bytes"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.folder}: document {index} cannot be read, or is not as long as {LENGTHS_NAME} says "
                f"({error}); {_PREPARE_AGAIN}"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lengths"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lengths = _load_lengths(self.folder)  # mapped again: a pickled map would be a copy


def open_split(
    folder: str | os.PathLike[str], split: str, *, tokenizer_sha256: str | None = None
) -> tuple[Manifest, ShardReader]:
    """The manifest of `folder` and a reader of its split, once the two (and the tokenizer, if given) agree."""
    manifest = Manifest.load(folder)
    if tokenizer_sha256 is not None:
        manifest.check_tokenizer(tokenizer_sha256)
    if split not in manifest.splits:
        raise UserError(
            f"{Path(folder) / MANIFEST_NAME}: has no split {split!r}; choose from {', '.join(manifest.splits)}"
        )
    reader, info = ShardReader(Path(folder) / split), manifest.splits[split]
    found = {"shards": len(reader.paths), "documents": len(reader), "tokens": int(reader.lengths.sum(dtype=np.int64))}
    for name, value in found.items():
        if value != getattr(info, name):
            raise UserError(
                f"{reader.folder}: holds {value} {name}, {MANIFEST_NAME} says {getattr(info, name)}; {_PREPARE_AGAIN}"
            )
    return manifest, reader


def _shard_paths(folder: Path) -> list[Path]:
    """The shards of a split in order; UserError unless their names are 0 ... n-1 of n."""
    paths = sorted(folder.glob("shard-*.array_record"))
    if not paths:
        raise UserError(f"{folder}: holds no shard-*.array_record; give a folder that `prepare` finished")
    matches = [_SHARD_NAME.fullmatch(path.name) for path in paths]
    numbers = [(int(match[1]), int(match[2])) if match else None for match in matches]
    if numbers != [(i, len(paths)) for i in range(len(paths))]:
        raise UserError(
            f"{folder}: the shards {paths[0].name} ... {paths[-1].name} are not 0 to n-1 of n: "
            f"one is missing or foreign; {_PREPARE_AGAIN}"
        )
    return paths


def _load_lengths(folder: Path) -> np.ndarray:
    try:
        lengths = np.load(folder / LENGTHS_NAME, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{folder / LENGTHS_NAME}: cannot be read ({error}); {_PREPARE_AGAIN}") from None
    if lengths.dtype != np.uint32 or lengths.ndim != 1:
        raise UserError(
            f"{folder / LENGTHS_NAME}: is {lengths.dtype} {lengths.shape}, not uint32 [documents]; {_PREPARE_AGAIN}"
        )
    return lengths
