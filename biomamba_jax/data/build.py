"""Text to shards: files -> spools -> the status of every record -> tokenizer -> token ids -> shards.

No step holds more than the indexes of all records and the texts of a few tasks, and the shards are the same bytes
whatever the number of processes and the order in which NLM's files are named. The output folder appears at the very
end by a rename; until then everything lies in `OUTPUT.partial-PID`, which is removed if anything goes wrong.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from biomamba_jax.data.files import Checksums, in_order
from biomamba_jax.data.resolve import resolve
from biomamba_jax.data.shards import Manifest, ShardWriter, SplitInfo, TokenizerInfo
from biomamba_jax.data.spool import CODE, DELETION, KEPT, Filters, SpoolTask, load_index, read_texts, spool
from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from biomamba_jax.data.workers import Workers, start_workers
from biomamba_jax.errors import UserError

SPLITS = ("train", "validation", "test")
Progress = Callable[[str, int, int], None]
"""Called with a step's name and how many of how many parts of it are done."""
_TASK_BYTES = 1 << 20  # text that a worker tokenizes at a time
_TOKENIZER_SAMPLE_BYTES = 10_000_000  # more text does not lower the bytes per token by a percent, and takes longer


@dataclass(frozen=True)
class Settings:
    """How text becomes shards, files aside.

    Shares of documents are cut by a hash of the PMID (of the normalised text where there is none): a document is on
    the same side in every run, whatever else is in the input.
    """

    filters: Filters = field(default_factory=Filters)
    validation_fraction: float = 0.01
    test_fraction: float = 0.01
    train_tokenizer: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Source:
    """An input file after the first pass."""

    path: Path
    stem: str
    sums: Checksums
    rows: np.ndarray
    status: np.ndarray

    @property
    def kept(self) -> np.ndarray:
        """Rows that become documents, ascending."""
        return np.flatnonzero(self.status == KEPT)

    @property
    def offsets(self) -> np.ndarray:
        """Byte offset of every row's text in the spool."""
        sizes = self.rows["size"].astype(np.int64)
        return np.cumsum(sizes) - sizes


@dataclass(frozen=True)
class _TokenizeTask:
    tokenizer: str
    stem: str
    source: int
    rows: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray


def build_shards(
    inputs: Sequence[str],
    output: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
    *,
    workers: int = 0,
    progress: Progress = lambda step, done, total: None,
) -> Manifest:
    """Writes the folder `output` of shards of all documents in `inputs` and returns its manifest.

    Args:
      inputs: NLM XML, JSON lines or text files. NLM's are put into their order; a later file wins over an earlier.
      output: a folder that does not exist yet or is empty.
      tokenizer: a tokenizer file; None trains one of `settings.train_tokenizer` pieces on the training split.
      settings: filters, splits and the seed of the tokenizer's sample.
      workers: processes; 0 is one per core.
      progress: told how far it is.

    Raises:
      UserError: a broken input, tokenizer or setting; nothing is left behind.
    """
    settings = settings or Settings()
    paths = in_order(inputs)
    if not paths:
        raise UserError("--input names no file; give NLM XML, JSON lines or text files, or nlm-sample")
    if (tokenizer is None) == (settings.train_tokenizer is None):
        raise UserError("give either --tokenizer FILE or --train-tokenizer VOCAB_SIZE")
    given = None if tokenizer is None else load_tokenizer(tokenizer)  # a wrong one ends here, not after the first pass
    with _written_at_once(Path(output)) as folder, start_workers(workers) as pool:
        scratch = folder / "scratch"
        scratch.mkdir()
        sources = _read_sources(paths, scratch, settings.filters, pool, progress)
        used = given or _train_tokenizer(sources, scratch, settings)
        splits = _write_splits(sources, folder, used, settings, pool, progress)
        shutil.rmtree(scratch / "spools")
        manifest = Manifest(
            tokenizer=TokenizerInfo(used.name, used.sha256, used.save_to(folder).name, used.vocab_size, used.eos_id),
            splits=splits,
            filters={reason: sum(int((s.status == code).sum()) for s in sources) for reason, code in CODE.items()},
            sources=[_describe(source) for source in sources],
            settings=asdict(settings),
        )
        shutil.rmtree(scratch)
        manifest.save(folder)
    return manifest


@contextmanager
def _written_at_once(output: Path) -> Iterator[Path]:
    """A folder beside `output` that becomes `output` when the block ends well, and is removed when it does not."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: already exists; remove it or give another --output")
    partial = output.parent / f"{output.name}.partial-{os.getpid()}"
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial}: cannot be made ({error.strerror}); give another --output") from None
    try:
        yield partial
        os.rename(partial, output)
    except OSError as error:
        raise UserError(
            f"{output}: cannot be written ({error.strerror}); free space or give another --output"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _read_sources(
    paths: Sequence[Path], scratch: Path, filters: Filters, pool: Workers, progress: Progress
) -> list[_Source]:
    """First pass: spools every file, then settles the status of every record."""
    spools = scratch / "spools"
    spools.mkdir()
    stems = [str(spools / f"{number:05d}") for number in range(len(paths))]
    tasks = [SpoolTask(str(path), stem, filters) for path, stem in zip(paths, stems, strict=True)]
    sums = []
    progress("read", 0, len(tasks))
    for _, one in pool.map(spool, tasks):
        sums.append(one)
        progress("read", len(sums), len(tasks))
    indexes = [load_index(stem) for stem in stems]
    sources = [_Source(*each) for each in zip(paths, stems, sums, indexes, resolve(indexes), strict=True)]
    if not any(len(source.kept) for source in sources):
        raise UserError("no document is left after the filters; give more --input or relax the filters")
    return sources


def _splits(rows: np.ndarray, settings: Settings) -> np.ndarray:
    """Index into SPLITS of each row: the lowest positions are the test split, the next the validation split."""
    cuts = np.cumsum([settings.test_fraction, settings.validation_fraction]) * 2.0**32
    return 2 - np.searchsorted(cuts, rows["split"], side="right")


def _train_tokenizer(sources: Sequence[_Source], scratch: Path, settings: Settings) -> Tokenizer:
    """Trains on documents of the training split: those of the smallest seeded hash, up to the sample's size."""
    assert settings.train_tokenizer is not None
    seed = int.from_bytes(hashlib.blake2b(str(settings.seed).encode(), digest_size=8).digest(), "little")
    train = [np.flatnonzero((s.status == KEPT) & (_splits(s.rows, settings) == 0)) for s in sources]
    keys = [source.rows["digest"][rows, 0] ^ np.uint64(seed) for source, rows in zip(sources, train, strict=True)]
    sizes = [source.rows["size"][rows] for source, rows in zip(sources, train, strict=True)]
    order = np.argsort(np.concatenate(keys), kind="stable")
    number = int(np.searchsorted(np.cumsum(np.concatenate(sizes)[order], dtype=np.int64), _TOKENIZER_SAMPLE_BYTES)) + 1
    chosen = np.zeros(len(order), bool)
    chosen[order[:number]] = True
    if not chosen.any():
        raise UserError("the training split is empty, so no tokenizer can be trained; give more --input")

    def texts() -> Iterator[str]:
        parts = np.split(chosen, np.cumsum([len(rows) for rows in train])[:-1])
        for source, rows, part in zip(sources, train, parts, strict=True):
            yield from read_texts(source.stem, source.offsets[rows[part]], source.rows["size"][rows[part]])

    name = f"sentencepiece-{settings.train_tokenizer}.model"
    return train_sentencepiece(texts(), settings.train_tokenizer, scratch / name)


def _write_splits(
    sources: Sequence[_Source],
    folder: Path,
    tokenizer: Tokenizer,
    settings: Settings,
    pool: Workers,
    progress: Progress,
) -> dict[str, SplitInfo]:
    """Second pass: tokenizes the kept documents in the sources' order and writes each to its split."""
    documents, done = sum(len(source.kept) for source in sources), 0
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    with ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(folder / name, token_dtype=dtype)) for name in SPLITS]
        progress("tokenize", done, documents)
        for task, (ids, ends) in pool.map(_tokenize, _tokenize_tasks(sources, tokenizer)):
            rows = sources[task.source].rows[task.rows]
            splits = _splits(rows, settings)
            for row, split, document in zip(rows, splits, np.split(ids, ends[:-1]), strict=True):
                pmid, version, size = (int(row[name]) for name in ("pmid", "version", "size"))
                writers[split].write(
                    document, pmid=pmid or None, version=version or None, source=task.source, num_bytes=size
                )
            done += len(rows)
            progress("tokenize", done, documents)
    return {name: writer.info for name, writer in zip(SPLITS, writers, strict=True)}


def _tokenize_tasks(sources: Sequence[_Source], tokenizer: Tokenizer) -> Iterator[_TokenizeTask]:
    """The kept documents of all sources in runs of about `_TASK_BYTES` of text."""
    path = str(tokenizer.path.resolve())
    for number, source in enumerate(sources):
        kept, offsets, sizes = source.kept, source.offsets, source.rows["size"]
        run = np.cumsum(sizes[kept], dtype=np.int64) // _TASK_BYTES
        for rows in np.split(kept, np.flatnonzero(np.diff(run)) + 1) if len(kept) else []:
            yield _TokenizeTask(path, source.stem, number, rows, offsets[rows], sizes[rows])


_tokenizer_of_process = cache(load_tokenizer)


def _tokenize(task: _TokenizeTask) -> tuple[np.ndarray, np.ndarray]:
    """All documents' ids, each ending with EOS, one after another, and where each ends."""
    tokenizer = _tokenizer_of_process(task.tokenizer)
    documents = tokenizer.encode_batch(read_texts(task.stem, task.offsets, task.sizes))
    flat = np.concatenate([np.array([*ids, tokenizer.eos_id], np.uint32) for ids in documents])
    return flat, np.cumsum([len(ids) + 1 for ids in documents])


def _describe(source: _Source) -> dict[str, object]:
    """A source's entry in the manifest: which file it was and what it gave."""
    deletions = int((source.status == DELETION).sum())
    return {
        "name": source.path.name,
        **asdict(source.sums),
        "records": len(source.rows) - deletions,
        "deletions": deletions,
        "documents": len(source.kept),
    }
