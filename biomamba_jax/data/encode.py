"""Second pass: kept documents to token ids to shards, one task a shard.

Which documents a shard holds is settled before any is written, so shards can be written in any order, by any number of
processes, and those that a killed run had finished are used again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np

from biomamba_jax.data.shards import LENGTHS_NAME, ShardWriter, SplitInfo
from biomamba_jax.data.sources import Progress, Source
from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer
from biomamba_jax.data.workers import Workers

_BATCH_BYTES = 1 << 20  # text that is tokenized at a time
_MOST_DOCUMENTS, _FEWEST_DOCUMENTS = 65_536, 1_024
_SHARDS_WANTED = 16  # so that a small corpus, too, is written by several processes


@dataclass(frozen=True)
class ShardPart:
    """Some documents of one source: rows uint32, ascending."""

    number: int
    source: Source
    rows: np.ndarray


@dataclass(frozen=True)
class ShardTask:
    """One shard: its documents in order, and the folder that it is made in, named after them."""

    folder: str
    tokenizer: str
    tokenizer_sha256: str
    token_dtype: str
    parts: tuple[ShardPart, ...]


def write_splits(
    sources: Sequence[Source],
    splits: Sequence[np.ndarray],
    names: Sequence[str],
    tokenizer: Tokenizer,
    *,
    shards: Path,
    output: Path,
    pool: Workers,
    progress: Progress,
) -> dict[str, SplitInfo]:
    """Writes each split into `output`/NAME.

    Args:
      sources: their kept documents, in order, are what is written.
      splits: for each source, the index into `names` of each of its kept documents.
      names: of the splits.
      tokenizer: what makes the ids; each document ends with its EOS.
      shards: where finished shards lie until all are.
    """
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    tasks = [
        [
            ShardTask(
                str(shards / f"{name}-{_name(parts, tokenizer.sha256)}"),
                str(tokenizer.path.resolve()),
                tokenizer.sha256,
                dtype,
                parts,
            )
            for parts in _shards(sources, splits, split)
        ]
        for split, name in enumerate(names)
    ]
    done, documents = 0, sum(len(source.kept) for source in sources)
    progress("tokenize", done, documents)
    infos = []
    for _, info in pool.map(write_shard, [task for of_split in tasks for task in of_split]):
        infos.append(info)
        done += info.documents
        progress("tokenize", done, documents)
    found = {}
    for name, of_split in zip(names, tasks, strict=True):
        (output / name).mkdir()
        lengths = np.concatenate([np.load(Path(task.folder) / LENGTHS_NAME) for task in of_split])
        np.save(output / name / LENGTHS_NAME, lengths)
        for number, task in enumerate(of_split):
            (shard,) = Path(task.folder).glob("*.array_record")
            _put(shard, output / name / f"shard-{number:05d}-of-{len(of_split):05d}.array_record")
        own, infos = infos[: len(of_split)], infos[len(of_split) :]
        found[name] = SplitInfo(
            documents=sum(info.documents for info in own),
            tokens=sum(info.tokens for info in own),
            bytes=sum(info.bytes for info in own),
            shards=len(own),
        )
    return found


def _put(shard: Path, place: Path) -> None:
    """Gives the shard its place. It stays where it was, too, so that it is still there if what follows fails."""
    try:
        os.link(shard, place)
    except OSError:  # a file system without links
        os.replace(shard, place)


def documents_per_shard(documents: int) -> int:
    """How many documents of a split of this size go into one shard."""
    return min(_MOST_DOCUMENTS, max(_FEWEST_DOCUMENTS, -(-documents // _SHARDS_WANTED)))


def _shards(sources: Sequence[Source], splits: Sequence[np.ndarray], split: int) -> list[tuple[ShardPart, ...]]:
    """The documents of each shard of a split; an empty split still has one."""
    rows = [source.kept[own == split].astype(np.uint32) for source, own in zip(sources, splits, strict=True)]
    size = documents_per_shard(sum(map(len, rows)))
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
        state.update(
            f"{part.number} {Path(part.source.spool.stem).name} {len(part.rows)} ".encode() + part.rows.tobytes()
        )
    return state.hexdigest()


@cache
def _tokenizer_of_process(path: str, sha256: str) -> Tokenizer:
    """The tokenizer of a file, whose content may be another one in a later run of the same process."""
    return load_tokenizer(path)


def write_shard(task: ShardTask) -> SplitInfo:
    """Does the task, unless it was done before, and returns the shard's totals."""
    done = Path(f"{task.folder}.done")
    if done.exists() and any(Path(task.folder).glob("*.array_record")):
        return SplitInfo(**json.loads(done.read_text()))
    shutil.rmtree(task.folder, ignore_errors=True)
    tokenizer = _tokenizer_of_process(task.tokenizer, task.tokenizer_sha256)
    documents = sum(len(part.rows) for part in task.parts)
    with ShardWriter(task.folder, documents_per_shard=max(documents, 1), token_dtype=task.token_dtype) as writer:
        for part in task.parts:
            index = part.source.rows
            for rows in _batches(part.rows, index["size"]):
                documents_ids = tokenizer.encode_batch(part.source.texts(rows))
                for row, ids in zip(index[rows], documents_ids, strict=True):
                    pmid, version, size = (int(row[name]) for name in ("pmid", "version", "size"))
                    ids.append(tokenizer.eos_id)
                    writer.write(ids, pmid=pmid or None, version=version or None, source=part.number, num_bytes=size)
    partial = Path(f"{task.folder}.done.partial")
    partial.write_text(json.dumps(asdict(writer.info)))
    os.replace(partial, done)
    return writer.info


def _batches(rows: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """The rows in runs of about `_BATCH_BYTES` of text."""
    run = np.cumsum(sizes[rows], dtype=np.int64) // _BATCH_BYTES
    yield from np.split(rows, np.flatnonzero(np.diff(run)) + 1) if len(rows) else []
