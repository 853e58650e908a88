"""Text to shards: read -> filter -> decontaminate -> spool -> resolve -> train a tokenizer -> encode.

The shards are the same bytes whatever the number of processes, the order in which NLM's files are named, and however
often the run was killed: files are spooled and shards are written one by one under names derived from their content
(see `work`), and everything in between is a function of their content.

Memory stays below 4 GB for all of PubMed on 12 cores (1,334 baseline files and a year of updates: 46 million records,
27 million abstracts, 10 billion tokens), since no step holds a text for longer than it takes to write it:

    a worker      one record's XML, blocks of 4,096 records while they are judged, 1 MB of text while it is tokenized,
                  the tokenizer: 0.1-0.25 GB each
    this process  2.5 GB at most, while records are resolved (see `resolve`); 1.3 GB while near duplicates are found
                  (see `near_duplicates`); also 1 byte a record for its status (46 MB), 4 a document for its shard
                  (110 MB), 40 to choose the tokenizer's sample (1.1 GB), and 20 bytes per byte of that sample while a
                  tokenizer is trained (0.2 GB)

Idle workers take 0.1 GB each while records are resolved. So 12 of them take 2.5 + 12 * 0.1 = 3.7 GB then and at most
12 * 0.25 + 0.3 = 3.3 GB before and after; with more cores and little memory use fewer --workers. On disk the spools
take 1.6 kB a document, 43 GB for all of PubMed, until the shards are written.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from biomamba_jax.config.prepare import FilterConfig, PrepareConfig, TextFields
from biomamba_jax.data.decontamination import decontaminate, load_evaluation, read_evaluation
from biomamba_jax.data.encode import plan_shards, write_shard
from biomamba_jax.data.filters import judge
from biomamba_jax.data.input_files import checksums, identity, in_order
from biomamba_jax.data.near_duplicates import Bands, choose_bands
from biomamba_jax.data.readers import is_nlm, read_records
from biomamba_jax.data.records import CODE, REASONS
from biomamba_jax.data.resolve import drop_near_duplicates, resolve
from biomamba_jax.data.shards import Manifest, SplitInfo, TokenizerInfo, join_shards
from biomamba_jax.data.source import Source, Spool
from biomamba_jax.data.spool import SPOOL_VERSION, finished_spool, write_spool
from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from biomamba_jax.data.work import Work, work_folder
from biomamba_jax.data.workers import start_workers
from biomamba_jax.errors import UserError
from biomamba_jax.files import write_json_lines

SPLITS = ("train", "validation", "test")
RECENT = "recent"
"""The split of records that became public on `recent_from` or later; only with that setting."""
REMOVED_NAME = "removed.jsonl"
# Settings that do not decide what the shards hold.
_NOT_CONTENT = ("input", "output", "tokenizer", "spools", "workers", "max_unspelled")
# Settings that only records of NLM's XML are compared with.
_OF_NLM = (
    "languages",
    "article_types",
    "exclude_article_types",
    "first_year",
    "last_year",
    "require_pmcid",
    "recent_from",
)
Progress = Callable[[str, int, int], None]
"""Called with the name of a step, and how many parts of it are done, of how many."""
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class FileTask:
    """An input file to spool."""

    path: Path
    """The file."""
    folder: Path
    """Folder of the spools."""
    config: PrepareConfig
    """Settings of the run."""
    evaluation: str = ""
    """Digest of the evaluation text, which is in `folder`; "": none."""

    @property
    def evaluation_path(self) -> Path:
        """File of the evaluation text."""
        return self.folder / f"evaluation-{self.evaluation}.npz"

    @property
    def stem(self) -> str:
        """Stem of the spool, derived from the file's identity and all settings that its content depends on."""
        used = [field.name for group in (FilterConfig, TextFields) for field in dataclasses.fields(group)]
        filters = {name: getattr(self.config, name) for name in used}
        overlap = self.config.decontaminate_overlap if self.evaluation else None
        what = (SPOOL_VERSION, *identity(self.path), filters, self.evaluation, overlap, _bands(self.config))
        return str(self.folder / hashlib.blake2b(json.dumps(what).encode(), digest_size=12).hexdigest())


def spool_file(task: FileTask) -> Spool:
    """Read, filter, decontaminate and spool a file, unless its spool is complete already.

    Raises:
      UserError: the file is not whole or not well-formed.
    """
    stem = task.stem
    if (finished := finished_spool(task.path, stem)) is not None:
        return finished
    sums = checksums(task.path)
    candidates = judge(read_records(task.path, task.config), task.config)
    if task.evaluation:
        evaluation = load_evaluation(str(task.evaluation_path))
        candidates = decontaminate(candidates, evaluation, task.config.decontaminate_overlap)
    return write_spool(task.path, stem, sums, candidates, _bands(task.config))


def spool_files(config: PrepareConfig, progress: Progress = lambda step, done, total: None) -> int:
    """Read `config.input` into `config.spools` and make no shards: one of several machines' shares of a first pass.

    Returns:
      The number of files.

    Raises:
      UserError: a broken input or setting, or another process reads one of the files.
    """
    paths = _paths(config)
    folder = Path(config.spools or "")
    with start_workers(config.workers) as pool:
        folder.mkdir(parents=True, exist_ok=True)
        _collect(pool.map(spool_file, _file_tasks(paths, folder, config)), "read", len(paths), progress)
    return len(paths)


def _paths(config: PrepareConfig) -> list[Path]:
    """Return the input files in the order in which they count."""
    paths = in_order(config.input)
    if not paths:
        raise UserError("--input names no file; give NLM XML, JSON lines or text files, or nlm-sample")
    for path in paths:  # a missing one is found now, not hours later
        identity(path)
    return paths


def build_shards(config: PrepareConfig, progress: Progress = lambda step, done, total: None) -> Manifest:
    """Write the folder `config.output` of shards of all documents in `config.input`.

    Args:
      config: its `input` and `tokenizer` are files; NLM's files are sorted, since a later one wins.
      progress: called as each step advances.

    Returns:
      The manifest of the new folder.

    Raises:
      UserError: a broken input, tokenizer or setting. Finished spools and shards are kept, see `work`.
    """
    paths = _paths(config)
    if (config.tokenizer is None) == (config.train_tokenizer is None):
        raise UserError("give either --tokenizer FILE or --train-tokenizer VOCAB_SIZE")
    if not any(is_nlm(str(path)) for path in paths) and (unread := [key for key in _OF_NLM if getattr(config, key)]):
        raise UserError(f"--{unread[0]}: counts for NLM's records alone, and no --input is NLM's XML; leave it out")
    given = None if config.tokenizer is None else load_tokenizer(config.tokenizer)  # refused now, not hours later
    kept = None if config.spools is None else Path(config.spools)
    with work_folder(Path(config.output), kept) as work, start_workers(config.workers) as pool:
        tasks = _file_tasks(paths, work.spools, config)
        spools = _collect(pool.map(spool_file, tasks), "read", len(paths), progress)
        statuses = resolve([spool.load_index for spool in spools])
        sources = [Source(*each) for each in zip(spools, statuses, strict=True)]
        removed = list(_evaluation_removals(sources))
        if config.near_duplicates is not None:
            removed += drop_near_duplicates(sources, config.near_duplicates)
        documents = sum(len(source.kept) for source in sources)
        if not documents:
            work.keeps = False  # these spools are of no use
            raise UserError("no document is left after the filters; give more --input or relax the filters")
        tokenizer = given or _train_tokenizer(sources, work, config)

        planned = plan_shards(sources, _splits(sources, config), tokenizer, work.shards)
        written = pool.map(write_shard, [task for split in planned.values() for task in split])
        spelled = _refuse_unspelled(written, int(config.max_unspelled * documents), documents, tokenizer)
        infos = iter(_collect(spelled, "tokenize", documents, progress, lambda info: info.documents))
        splits: dict[str, SplitInfo] = {}
        for name, split in planned.items():
            join_shards([task.folder for task in split], work.output / name)
            each = [next(infos) for _ in split]
            splits[name] = SplitInfo.total(each)
        if config.decontaminate or config.near_duplicates is not None:
            write_json_lines(work.output / REMOVED_NAME, removed)
        file = tokenizer.save_to(work.output).name
        manifest = Manifest(
            tokenizer=TokenizerInfo(
                tokenizer.name, tokenizer.sha256, file, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.start_id
            ),
            splits=splits,
            filters=_count_reasons(sources),
            sources=[source.describe() for source in sources],
            settings={name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_CONTENT},
        )
        manifest.save(work.output)
    return manifest


def _collect(
    results: Iterable[T], step: str, total: int, progress: Progress, size: Callable[[T], int] = lambda result: 1
) -> list[T]:
    """Return the results as they come in, and report `size` of each as progress of the step."""
    collected, done = [], 0
    progress(step, done, total)
    for result in results:
        collected.append(result)
        done += size(result)
        progress(step, done, total)
    return collected


def _refuse_unspelled(
    infos: Iterable[SplitInfo], most: int, documents: int, tokenizer: Tokenizer
) -> Iterator[SplitInfo]:
    """Yield the shards' totals until more than `most` documents are not spelled by their ids."""
    unspelled = 0
    for info in infos:
        unspelled += info.unspelled
        if unspelled > most:
            raise UserError(
                f"{tokenizer.path}: its ids do not spell the text of at least {unspelled:,} of {documents:,} documents "
                "(it changes or drops characters); give --tokenizer another file, or raise --max-unspelled"
            )
        yield info


def _file_tasks(paths: Iterable[Path], folder: Path, config: PrepareConfig) -> list[FileTask]:
    if not config.decontaminate:
        return [FileTask(path, folder, config) for path in paths]
    evaluation = read_evaluation(config.decontaminate)
    tasks = [FileTask(path, folder, config, evaluation.digest) for path in paths]
    evaluation.save(tasks[0].evaluation_path)
    return tasks


def _bands(config: PrepareConfig) -> Bands | None:
    return None if config.near_duplicates is None else choose_bands(config.near_duplicates)


def _evaluation_removals(sources: Sequence[Source]) -> Iterator[dict[str, Any]]:
    """Yield the entries of removed.jsonl for evaluation text, file by file."""
    reasons = {CODE[name]: name for name in ("evaluation_article", "evaluation_text")}
    for source in sources:
        for row in np.flatnonzero(np.isin(source.status, list(reasons))).tolist():
            item, share = source.spool.overlaps.get(row, (None, None))
            yield source.removal(row, reasons[int(source.status[row])], item, share)


def _count_reasons(sources: Sequence[Source]) -> dict[str, int]:
    """Return the number of records that were left out, by reason."""
    counts = sum((np.bincount(source.status, minlength=256) for source in sources), np.zeros(256, np.int64))
    return {reason: int(counts[CODE[reason]]) for reason in REASONS}


def _splits(sources: Sequence[Source], config: PrepareConfig) -> dict[str, list[np.ndarray]]:
    """Return the rows of each split in each source, uint32 [documents].

    Splits are decided by a hash of the PMID (of the normalised text without one), so a document is in the same split
    in every run, whatever else is in the input. The lowest hashes are the test split, the next the validation split.
    Records without a date are never in `recent`.
    """
    names = SPLITS if config.recent_from is None else (*SPLITS, RECENT)
    borders = np.cumsum([config.test_fraction, config.validation_fraction]) * 2.0**32
    splits: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for source in sources:
        kept = source.kept
        rows = source.rows[kept]
        split = 2 - np.searchsorted(borders, rows["split"], side="right")
        if config.recent_from is not None:
            split[rows["date"] >= int(config.recent_from.replace("-", ""))] = len(SPLITS)
        for number, name in enumerate(names):
            splits[name].append(kept[split == number].astype(np.uint32))
    return splits


def _train_tokenizer(sources: Sequence[Source], work: Work, config: PrepareConfig) -> Tokenizer:
    """Train on the documents of the training split with the smallest seeded hashes, up to the sample's size."""
    seed = np.uint64(int.from_bytes(hashlib.blake2b(str(config.seed).encode(), digest_size=8).digest(), "little"))
    train = _splits(sources, config)["train"]
    keys = [source.rows["digest"][rows, 0] ^ seed for source, rows in zip(sources, train, strict=True)]
    sizes = [source.rows["size"][rows] for source, rows in zip(sources, train, strict=True)]
    order = np.argsort(np.concatenate(keys), kind="stable")
    total = np.cumsum(np.concatenate(sizes)[order], dtype=np.int64)
    chosen = np.zeros(len(order), bool)
    chosen[order[: int(np.searchsorted(total, config.tokenizer_sample_bytes)) + 1]] = True
    if not chosen.any():
        raise UserError("the training split is empty, so no tokenizer can be trained; give more --input")
    parts = np.split(chosen, np.cumsum([len(rows) for rows in train])[:-1])
    texts = (
        text for source, rows, part in zip(sources, train, parts, strict=True) for text in source.texts(rows[part])
    )
    return train_sentencepiece(texts, config, work.root / f"sentencepiece-{config.train_tokenizer}.model")
