"""Second pass: kept documents are tokenized and written as shards, one task a shard.

The documents of every shard are known before any is written, so shards can be written in any order, by any number of
processes, and finished shards of a killed run are reused.
"""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from biomamba_jax.data.shards import Document, SplitInfo, write_documents
from biomamba_jax.data.source import Source
from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json, write_json

_BATCH_BYTES = 1 << 20  # text that is tokenized at a time
_MAX_DOCUMENTS, _MIN_DOCUMENTS = 65_536, 1_024
_SHARDS_WANTED = 16  # so that several processes can write a small corpus, too


@dataclass(frozen=True)
class ShardPart:
    """Documents of one source."""

    number: int
    """Index of the source in the manifest."""
    source: Source
    """The source."""
    rows: np.ndarray
    """uint32 [documents], ascending."""


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    folder: str
    """Folder that it is written into, named by its content."""
    tokenizer: str
    """The tokenizer's file."""
    tokenizer_sha256: str
    """Digest of the tokenizer's file."""
    token_dtype: str
    """Type of stored ids: uint16 or uint32."""
    parts: tuple[ShardPart, ...]
    """Its documents, in order."""


def plan_shards(
    sources: Sequence[Source], splits: Mapping[str, Sequence[np.ndarray]], tokenizer: Tokenizer, folder: Path
) -> dict[str, list[ShardTask]]:
    """Return the shards of each split.

    Args:
      sources: the sources, in the manifest's order.
      splits: for each split, rows uint32 [documents] of each source.
      tokenizer: encodes the documents; each ends with its EOS.
      folder: where shards are written until all are complete.
    """
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    path, sha256 = str(tokenizer.path.resolve()), tokenizer.sha256
    return {
        split: [
            ShardTask(str(folder / f"{split}-{_name(parts, sha256)}"), path, sha256, dtype, parts)
            for parts in _shards(sources, rows)
        ]
        for split, rows in splits.items()
    }


def _shards(sources: Sequence[Source], rows: Sequence[np.ndarray]) -> list[tuple[ShardPart, ...]]:
    """Return the documents of each shard of a split; an empty split still has one shard."""
    total = sum(map(len, rows))
    size = min(_MAX_DOCUMENTS, max(_MIN_DOCUMENTS, -(-total // _SHARDS_WANTED)))
    shards: list[list[ShardPart]] = [[]]
    room = size
    for number, (source, left) in enumerate(zip(sources, rows, strict=True)):
        while len(left):
            if not room:
                shards.append([])
                room = size
            part, left = left[:room], left[room:]
            shards[-1].append(ShardPart(number, source, part))
            room -= len(part)
    return [tuple(parts) for parts in shards]


def _name(parts: Sequence[ShardPart], tokenizer_sha256: str) -> str:
    state = hashlib.blake2b(tokenizer_sha256.encode(), digest_size=12)
    for part in parts:
        spool = Path(part.source.spool.stem).name
        state.update(f"{part.number} {spool} {len(part.rows)} ".encode() + part.rows.tobytes())
    return state.hexdigest()


def write_shard(task: ShardTask) -> SplitInfo:
    """Write a shard, unless it is complete already, and return its totals."""
    done = Path(f"{task.folder}.done")
    if done.exists() and any(Path(task.folder).glob("*.array_record")):
        with suppress(UserError, TypeError):  # a damaged one is written again
            return SplitInfo(**read_json(done))
    shutil.rmtree(task.folder, ignore_errors=True)
    unspelled: list[int] = []
    info = write_documents(task.folder, _documents(task, unspelled), token_dtype=task.token_dtype)
    info = replace(info, unspelled=sum(unspelled))
    write_json(done, asdict(info))
    return info


def _documents(task: ShardTask, unspelled: list[int]) -> Iterator[Document]:
    """Tokenize the documents of a shard; append to `unspelled` the number of those that their ids do not spell."""
    tokenizer = _load_tokenizer(task.tokenizer, task.tokenizer_sha256)
    for part in task.parts:
        index = part.source.rows
        for rows in _batches(part.rows, index["size"]):
            texts, names = zip(*part.source.documents(rows), strict=True)
            encoded = tokenizer.encode_batch(texts)
            spelled = tokenizer.decode_batch(encoded)
            unspelled.append(sum(text != own for text, own in zip(texts, spelled, strict=True)))
            for row, ids, text, name in zip(index[rows], encoded, spelled, names, strict=True):
                pmid, version = (int(row[key]) or None for key in ("pmid", "version"))
                size = len(text.encode())
                yield Document(np.array([*ids, tokenizer.eos_id]), pmid, version, part.number, size, name or None)


@cache
def _load_tokenizer(path: str, sha256: str) -> Tokenizer:
    """Load a tokenizer once in each process; the sha256 makes a retrained file at the same path another one."""
    return load_tokenizer(path)


def _batches(rows: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield consecutive rows of about `_BATCH_BYTES` of text."""
    run = np.cumsum(sizes[rows], dtype=np.int64) // _BATCH_BYTES
    yield from np.split(rows, np.flatnonzero(np.diff(run)) + 1) if len(rows) else []
