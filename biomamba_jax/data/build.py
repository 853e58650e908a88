"""Text to shards: files -> spools -> the status of every record -> tokenizer -> token ids -> shards.

The shards are the same bytes whatever the number of processes, the order in which NLM's files are named, and however
often the run was killed on its way: files are spooled and shards are written one by one under names that say what is
in them (see `work`), and everything in between is a function of their content.

Memory stays below 4 GB for all of PubMed on 12 cores (1,334 baseline files and a year of updates: 46 million records,
27 million abstracts, 10 billion tokens), since no step holds a text for longer than it takes to write it:

    a worker     one record's XML, a block of 4,096 records while it is judged, 1 MB of text while it is tokenized, the
                 tokenizer: 0.1-0.25 GB each
    this process while records are resolved: 2.5 GB, the most (see `resolve`); while near duplicates are sought 1.3 GB
                 (see `near_duplicates`); besides 1 byte a record for its status (46 MB), 4 a document for its shard
                 (110 MB), 40 for the choice of the tokenizer's sample (1.1 GB), and 20 bytes a byte of that sample
                 while a tokenizer is trained (0.2 GB)

Workers rest, at 0.1 GB each, while records are resolved. So 12 of them take 2.5 + 12 * 0.1 = 3.7 GB then and at most
12 * 0.25 + 0.3 = 3.3 GB before and after; with more cores and little memory give fewer --workers. On disk the spools
take 1.6 kB a document, 43 GB for all of PubMed, until the shards are written.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from biomamba_jax.data.encode import write_splits
from biomamba_jax.data.filters import KEPT
from biomamba_jax.data.input_files import in_order
from biomamba_jax.data.shards import Manifest, TokenizerInfo
from biomamba_jax.data.sources import Progress, Selection, Source, count_reasons, read_sources, require_documents
from biomamba_jax.data.tokenizer import Tokenizer, TokenizerTraining, load_tokenizer, train_sentencepiece
from biomamba_jax.data.work import Work, work_folder
from biomamba_jax.data.workers import start_workers
from biomamba_jax.errors import UserError
from biomamba_jax.files import naming_errors

SPLITS = ("train", "validation", "test")
RECENT = "recent"
"""The split of records from a date on; only where one is asked for."""
REMOVED_NAME = "removed.jsonl"


@dataclass(frozen=True)
class Settings:
    """How text becomes shards, files aside.

    Shares of documents are cut by a hash of the PMID (of the normalised text where there is none): a document is on
    the same side in every run, whatever else is in the input. recent_from is a date, YYYYMMDD: records that were public
    on that day or later, and not before, are the `recent` split; those without a date never are.
    """

    selection: Selection = field(default_factory=Selection)
    validation_fraction: float = 0.01
    test_fraction: float = 0.01
    recent_from: int | None = None
    train_tokenizer: TokenizerTraining | None = None
    seed: int = 0


def build_shards(
    inputs: Sequence[str],
    output: str | os.PathLike[str],
    tokenizer: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
    *,
    workers: int = 0,
    spools: str | os.PathLike[str] | None = None,
    progress: Progress = lambda step, done, total: None,
) -> Manifest:
    """Writes the folder `output` of shards of all documents in `inputs` and returns its manifest.

    Args:
      inputs: files of the kinds that `readers` knows. NLM's are put into their order: a later one wins.
      output: a folder that does not exist yet or is empty.
      tokenizer: a tokenizer file; None trains one as `settings.train_tokenizer` says on the training split.
      settings: selection, splits and the seed of the tokenizer's sample.
      workers: processes; 0 is one per core.
      spools: a folder that keeps what was read of each file; a later run with more files reads those alone.
      progress: told how far it is.

    Raises:
      UserError: a broken input, tokenizer or setting. What was finished stays beside `output`, see `work`.
    """
    settings = settings or Settings()
    paths = in_order(inputs)
    if not paths:
        raise UserError("--input names no file; give NLM XML, JSON lines or text files, or nlm-sample")
    for path in paths:  # a missing one ends here, not hours later
        with naming_errors(path):
            path.stat()
    if (tokenizer is None) == (settings.train_tokenizer is None):
        raise UserError("give either --tokenizer FILE or --train-tokenizer VOCAB_SIZE")
    given = None if tokenizer is None else load_tokenizer(tokenizer)  # a wrong one ends here, not after the first pass
    kept = None if spools is None else Path(spools)
    with work_folder(Path(output), kept) as work, start_workers(workers) as pool:
        sources, removed = read_sources(paths, work.spools, settings.selection, pool, progress)
        work.keeps = False  # these spools lead nowhere
        require_documents(sources)
        work.keeps = True
        used = given or _train_tokenizer(sources, work, settings)
        names = SPLITS if settings.recent_from is None else (*SPLITS, RECENT)
        splits = write_splits(
            sources,
            [_splits(source.rows[source.kept], settings) for source in sources],
            names,
            used,
            shards=work.shards,
            output=work.output,
            pool=pool,
            progress=progress,
        )
        file = used.save_to(work.output).name
        if settings.selection.evaluation or settings.selection.near_duplicates is not None:
            _write_lines(work.output / REMOVED_NAME, removed)
        manifest = Manifest(
            tokenizer=TokenizerInfo(used.name, used.sha256, file, used.vocab_size, used.eos_id),
            splits=splits,
            filters=count_reasons(sources),
            sources=[source.describe() for source in sources],
            settings=asdict(settings),
        )
        manifest.save(work.output)
    return manifest


def _splits(rows: np.ndarray, settings: Settings) -> np.ndarray:
    """Index into the splits of each row: the lowest positions are the test split, the next the validation split."""
    cuts = np.cumsum([settings.test_fraction, settings.validation_fraction]) * 2.0**32
    splits = 2 - np.searchsorted(cuts, rows["split"], side="right")
    if settings.recent_from is not None:
        splits[rows["date"] >= settings.recent_from] = len(SPLITS)
    return splits


def _train_tokenizer(sources: Sequence[Source], work: Work, settings: Settings) -> Tokenizer:
    """Trains on documents of the training split: those of the smallest seeded hash, up to the sample's size."""
    training = settings.train_tokenizer
    assert training is not None
    seed = np.uint64(int.from_bytes(hashlib.blake2b(str(settings.seed).encode(), digest_size=8).digest(), "little"))
    train, keys, sizes = [], [], []
    for source in sources:
        rows = source.rows
        of_split = np.flatnonzero(source.status == KEPT)
        of_split = of_split[_splits(rows[of_split], settings) == 0]
        train.append(of_split.astype(np.uint32))
        keys.append(rows["digest"][of_split, 0] ^ seed)
        sizes.append(rows["size"][of_split])
    order = np.argsort(np.concatenate(keys), kind="stable")
    total = np.cumsum(np.concatenate(sizes)[order], dtype=np.int64)
    number = int(np.searchsorted(total, training.sample_bytes)) + 1
    chosen = np.zeros(len(order), bool)
    chosen[order[:number]] = True
    if not chosen.any():
        raise UserError("the training split is empty, so no tokenizer can be trained; give more --input")

    def texts() -> Iterator[str]:
        parts = np.split(chosen, np.cumsum([len(rows) for rows in train])[:-1])
        for source, rows, part in zip(sources, train, parts, strict=True):
            yield from source.texts(rows[part])

    return train_sentencepiece(texts(), training, work.root / f"sentencepiece-{training.vocab_size}.model")


def _write_lines(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries), "utf-8")
