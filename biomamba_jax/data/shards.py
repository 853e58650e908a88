"""Shards: tokenized documents on disk, one ArrayRecord record a document, and the manifest that describes them.

    output/manifest.json
    output/train/shard-00000-of-00004.array_record ...    records in global order: shard by shard
    output/train/lengths.npy                              uint32 [documents]: tokens of each document, EOS included
    output/removed.jsonl                                  near duplicates and evaluation text that was left out

A record is msgpack {"ids": little-endian uint16 or uint32 bytes, "pmid": int | None, "version": int | None,
"source": index into the manifest's sources, "bytes": UTF-8 length of the text}, and "id": str if the document has one
that is not a PMID. Packing reads `lengths.npy` only.
"""

import dataclasses
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgpack
import numpy as np
import pydantic
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from biomamba_jax.errors import UserError
from biomamba_jax.files import link_or_move, read_array, read_json, replacing, write_json
from biomamba_jax.object_store import local_copy

FORMAT_VERSION = 2
_READ_VERSIONS = (1, 2)  # 1 has no start_id
_MAX_VOCABULARY = 1 << 31
MANIFEST_NAME = "manifest.json"
LENGTHS_NAME = "lengths.npy"
_PREPARE_AGAIN = "run `python -m biomamba_jax.prepare` again into a new folder"


class Document(NamedTuple):
    """A stored document."""

    ids: np.ndarray
    """int32 [tokens], the last one EOS."""
    pmid: int | None
    """PubMed id; None: none."""
    version: int | None
    """Version of the PMID's record; None without a PMID."""
    source: int
    """Index into Manifest.sources."""
    num_bytes: int
    """UTF-8 length of the text that the ids spell."""
    id: str | None = None
    """Id that is not a PMID, None: none."""
    start_id: int | None = None
    """Id that precedes the document, None: EOS."""

    @property
    def inputs(self) -> np.ndarray:
        """Tokens that the targets are predicted from, int32 [tokens]: the start token and all but the last one."""
        return shifted(self.ids, self.start_id)

    @property
    def targets(self) -> np.ndarray:
        """Tokens to predict, int32 [tokens]: all of them."""
        return self.ids


def shifted(ids: np.ndarray, start_id: int | None = None) -> np.ndarray:
    """Return [start_id, *ids[:-1]]; the last of the ids, EOS, takes the place of a start_id of None."""
    rolled = np.roll(ids, 1)
    if start_id is not None:
        rolled[0] = start_id
    return rolled


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the ids."""

    name: str
    """A name for people."""
    sha256: str
    """Digest of `file`; identifies the tokenizer."""
    file: str
    """Its name in the manifest's folder."""
    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """Id that ends every document."""
    start_id: int | None = None
    """Id that precedes every document, None: eos_id, as always in format version 1. It is not among the stored ids."""


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """Totals of a split."""

    documents: int
    """Number of documents."""
    tokens: int
    """Includes one EOS a document."""
    bytes: int
    """UTF-8 length of its text."""
    shards: int
    """Number of shards."""
    unspelled: int = 0
    """Documents whose ids do not spell the text that they were made from, but another."""
    largest_id: int | None = None
    """Largest token id; None in shards of version 0.1, whose ids are checked as they are read."""

    @classmethod
    def total(cls, parts: Sequence[Self]) -> Self:
        """Return the totals of a split that is made of several."""
        *totals, largest = zip(*map(dataclasses.astuple, parts), strict=True)
        documents, tokens, num_bytes, shards, unspelled = map(sum, totals)
        return cls(documents, tokens, num_bytes, shards, unspelled, None if None in largest else max(largest))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a folder of shards; written last, so a folder without it is unfinished."""

    tokenizer: TokenizerInfo
    """The tokenizer that made the ids."""
    splits: dict[str, SplitInfo]
    """Totals of each split, by name."""
    filters: dict[str, int]
    """Number of records that were left out, by reason."""
    sources: list[dict[str, Any]]
    """The input files, each at least {"name", "sha256"}."""
    settings: dict[str, Any]
    """The settings that decided what the shards hold."""
    format_version: int = FORMAT_VERSION
    """Version of the format of shards and manifest."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder`/manifest.json."""
        write_json(Path(folder) / MANIFEST_NAME, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read manifest.json of a folder or URL.

        Raises:
          UserError: it is missing, broken or of an unknown format.
        """
        path = local_copy(folder, "") / MANIFEST_NAME
        if not path.exists():
            written = "the folder that `python -m biomamba_jax.prepare --output` wrote"
            raise UserError(f"{path}: no such file; give {written}")
        try:
            raw = read_json(path)
        except UserError as error:
            raise UserError(f"{error}; {_PREPARE_AGAIN}") from None
        version = raw.get("format_version")
        if version not in _READ_VERSIONS:
            known = " and ".join(map(str, _READ_VERSIONS))
            raise UserError(f"{path}: format_version is {version!r}, this program reads {known}; {_PREPARE_AGAIN}")
        try:
            found = pydantic.TypeAdapter(cls).validate_json(json.dumps(raw), strict=True, extra="forbid")
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: {key}: {first['msg']}; {_PREPARE_AGAIN}") from None
        info = found.tokenizer
        if Path(info.file).name != info.file or len(info.file.encode()) > 255:  # more, and looking for it is an OSError
            raise UserError(f"{path}: tokenizer.file: {info.file!r} is not a file of this folder; {_PREPARE_AGAIN}")
        if not 0 < info.vocab_size < _MAX_VOCABULARY:
            raise UserError(
                f"{path}: tokenizer.vocab_size: {info.vocab_size} is that of no tokenizer; {_PREPARE_AGAIN}"
            )
        for key, value in (("eos_id", info.eos_id), ("start_id", info.start_id)):
            if value is not None and not 0 <= value < info.vocab_size:
                reason = f"{value} is none of the {info.vocab_size} ids of its vocabulary"
                raise UserError(f"{path}: tokenizer.{key}: {reason}; {_PREPARE_AGAIN}")
        return found

    def check_tokenizer(self, sha256: str) -> None:
        """Raise UserError unless the shards were made with the tokenizer file of this sha256."""
        if sha256 != self.tokenizer.sha256:
            raise UserError(
                f"the shards were made with tokenizer {self.tokenizer.name!r} (sha256 {self.tokenizer.sha256}), "
                f"not with one of sha256 {sha256}; use {self.tokenizer.file!r} of the shard folder, "
                "or run `prepare` again with your tokenizer"
            )


def write_documents(
    folder: str | os.PathLike[str], documents: Iterable[Document], *, token_dtype: str = "uint16"
) -> SplitInfo:
    """Write documents as a split of one shard; if it raises, neither the shard nor lengths.npy is left.

    Args:
      folder: folder of the split, without shards.
      documents: in the order of the split; `ids` may be any sequence of ints that ends with EOS.
      token_dtype: "uint16" (vocabularies up to 65,536) or "uint32".

    Returns:
      Totals, for the manifest.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    dtype, lengths, num_bytes, largest = np.dtype(token_dtype).newbyteorder("<"), array("I"), 0, 0
    with replacing(folder / _shard_name(0, 1)) as temporary, _closing_writer(temporary) as writer:
        for document in documents:
            ids = np.asarray(document.ids)
            if ids.ndim != 1 or ids.size == 0 or ids.min() < 0 or ids.max() > np.iinfo(dtype).max:
                raise ValueError(f"ids of PMID {document.pmid} must be a non-empty list of ids that fit {dtype.name}")
            record: dict[str, Any] = {
                "ids": ids.astype(dtype).tobytes(),
                "pmid": document.pmid,
                "version": document.version,
            }
            record |= {"source": document.source, "bytes": document.num_bytes}
            if document.id is not None:
                record["id"] = document.id
            with _as_os_errors():
                writer.write(msgpack.packb(record))
            lengths.append(ids.size)
            largest = max(largest, int(ids.max()))
            num_bytes += document.num_bytes
    _save_lengths(folder, np.array(lengths, np.uint32))
    return SplitInfo(len(lengths), sum(lengths), num_bytes, 1, largest_id=largest)


@contextmanager
def _closing_writer(path: Path) -> Iterator[ArrayRecordWriter]:
    # Group size 1: every document is compressed by itself, so that one can be read without its neighbours.
    writer = ArrayRecordWriter(str(path), "group_size:1")
    try:
        yield writer
    finally:
        with _as_os_errors():
            writer.close()


def join_shards(parts: Sequence[str | os.PathLike[str]], folder: Path) -> None:
    """Make a split of the shards of several writers' folders, by hard links where the file system has them."""
    folder.mkdir()
    _save_lengths(folder, np.concatenate([_load_lengths(Path(part)) for part in parts]))
    for number, part in enumerate(parts):
        # By a link it also stays where it was, in case a later step fails.
        link_or_move(Path(part) / _shard_name(0, 1), folder / _shard_name(number, len(parts)))


def _shard_name(number: int, count: int) -> str:
    return f"shard-{number:05d}-of-{count:05d}.array_record"


def _save_lengths(folder: Path, lengths: np.ndarray) -> None:
    with replacing(folder / LENGTHS_NAME) as temporary, open(temporary, "wb") as file:
        np.save(file, lengths)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Turn ArrayRecord's errors, such as a full disk, into the OSErrors of other files."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from None


class ShardReader:
    """Random access to the documents of a split folder: `len(reader)`, `reader[i]`, `reader.lengths`.

    Safe to share between threads and to pickle: each process opens the files at first use.
    """

    def __init__(self, folder: str | os.PathLike[str], vocab_size: int | None = None, start_id: int | None = None):
        """Open the split.

        Args:
          folder: folder of the split.
          vocab_size: number of ids; a document with one beyond them is refused when it is read.
          start_id: id that precedes each document; None: EOS.

        Raises:
          UserError: a shard or lengths.npy is missing, damaged, or does not belong to the others.
        """
        self.folder, self._vocab_size, self._start_id = Path(folder), vocab_size, start_id
        self.paths = _shard_paths(self.folder)
        try:
            self._records = ArrayRecordDataSource([str(path) for path in self.paths])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{self.folder}: a shard is damaged ({error}); {_PREPARE_AGAIN}") from None
        self.lengths = _load_lengths(self.folder)
        """Number of tokens of each document, EOS included, uint32 [documents], memory-mapped."""
        if not self.lengths.all():
            raise UserError(f"{self.folder / LENGTHS_NAME}: has documents of 0 tokens; {_PREPARE_AGAIN}")
        if len(self.lengths) != len(self._records):
            raise UserError(
                f"{self.folder / LENGTHS_NAME}: has {len(self.lengths)} documents, the shards next to it hold "
                f"{len(self._records)}; {_PREPARE_AGAIN}"
            )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Document:
        index = range(len(self))[index]
        try:
            record = msgpack.unpackb(self._records[index])
            raw, length = record["ids"], int(self.lengths[index])
            ids = np.frombuffer(raw, {2 * length: "<u2", 4 * length: "<u4"}[len(raw)])
            if self._vocab_size is not None and ids.max() >= self._vocab_size:
                raise ValueError(f"it has id {ids.max()}, beyond the tokenizer's vocabulary of {self._vocab_size}")
            pmid, version, source, num_bytes = (record[key] for key in ("pmid", "version", "source", "bytes"))
            name = record.get("id")
            return Document(ids.astype(np.int32), pmid, version, source, num_bytes, name, self._start_id)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.folder}: document {index} cannot be read, or is not as long as {LENGTHS_NAME} says "
                f"({error}); {_PREPARE_AGAIN}"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lengths"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lengths = _load_lengths(self.folder)  # a pickled map would be a copy


def open_split(
    folder: str | os.PathLike[str], split: str, *, tokenizer_sha256: str | None = None
) -> tuple[Manifest, ShardReader]:
    """Open a split of a folder or URL and return the manifest and a reader.

    Raises:
      UserError: shards are missing or damaged, or manifest, shards and tokenizer (if given) disagree.
    """
    manifest, folder = Manifest.load(folder), local_copy(folder, split)
    if tokenizer_sha256 is not None:
        manifest.check_tokenizer(tokenizer_sha256)
    if split not in manifest.splits:
        raise UserError(f"{folder / MANIFEST_NAME}: has no split {split!r}; choose from {', '.join(manifest.splits)}")
    file = folder / manifest.tokenizer.file
    if file.is_file() and (found := hashlib.sha256(file.read_bytes()).hexdigest()) != manifest.tokenizer.sha256:
        raise UserError(
            f"{file}: is not the tokenizer that made the ids (sha256 {found[:12]}, {MANIFEST_NAME} says "
            f"{manifest.tokenizer.sha256[:12]}); put that one back, or {_PREPARE_AGAIN}"
        )
    info, vocab_size = manifest.splits[split], manifest.tokenizer.vocab_size
    reader = ShardReader(folder / split, vocab_size, manifest.tokenizer.start_id)
    if info.largest_id is not None and info.largest_id >= vocab_size:
        raise UserError(
            f"{reader.folder}: holds id {info.largest_id}, but the vocabulary of tokenizer {manifest.tokenizer.name!r} "
            f"has {vocab_size} ids; these shards were made with another tokenizer; {_PREPARE_AGAIN}"
        )
    totals = {"shards": len(reader.paths), "documents": len(reader), "tokens": int(reader.lengths.sum(dtype=np.int64))}
    for name, value in totals.items():
        if value != getattr(info, name):
            raise UserError(
                f"{reader.folder}: holds {value} {name}, {MANIFEST_NAME} says {getattr(info, name)}; {_PREPARE_AGAIN}"
            )
    return manifest, reader


def tokenizer_file(folder: str | os.PathLike[str]) -> Path:
    """Return the file of the tokenizer that made the shards of a folder or URL; it may be missing.

    Raises:
      UserError: the folder has no manifest, see `Manifest.load`.
    """
    return local_copy(folder, "") / Manifest.load(folder).tokenizer.file


def _shard_paths(folder: Path) -> list[Path]:
    """Return the shards of a split in order; raise UserError unless their names are 0 ... n-1 of n."""
    paths = sorted(folder.glob("shard-*.array_record"))
    if not paths:
        raise UserError(f"{folder}: holds no shard-*.array_record; give a folder that `prepare` finished")
    if [path.name for path in paths] != [_shard_name(i, len(paths)) for i in range(len(paths))]:
        raise UserError(
            f"{folder}: the shards {paths[0].name} ... {paths[-1].name} are not 0 to n-1 of n: "
            f"one is missing or foreign; {_PREPARE_AGAIN}"
        )
    return paths


def _load_lengths(folder: Path) -> np.ndarray:
    lengths = read_array(folder / LENGTHS_NAME)
    if lengths.dtype != np.uint32 or lengths.ndim != 1:
        raise UserError(
            f"{folder / LENGTHS_NAME}: is {lengths.dtype} {lengths.shape}, not uint32 [documents]; {_PREPARE_AGAIN}"
        )
    return lengths
