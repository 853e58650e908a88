"""Times reading NLM's XML and measures its memory, in paired timing with pubmed_parser if requested."""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.paired_timing import Contender, alternate
from biomamba_jax.config import PrepareConfig
from biomamba_jax.config.checks import PositiveInt, Settings
from biomamba_jax.data.build import FileTask, spool_file
from biomamba_jax.data.nlm import Deletion, read_articles
from biomamba_jax.data.sample import nlm_sample
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_chunks
from biomamba_jax.tables import summary_table

NLM_SAMPLE = "nlm-sample"
_LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class PrepareBenchmark(Settings):
    """Settings of `python -m benchmarks prepare`."""

    input: list[str] = field(default_factory=lambda: [NLM_SAMPLE])
    """NLM files, or nlm-sample."""
    peer: str | None = None
    """Folder that contains pubmed_parser and its dependencies, to compare with it."""
    rounds: PositiveInt = 3
    """Timed rounds, after one warm-up round."""


def _read(paths: list[str]) -> Callable[[], None]:
    """Read records as `prepare` does, without writing anything."""

    def read() -> None:
        for path in paths:
            for _ in read_articles(path):
                pass

    return read


def _spool(paths: list[str]) -> Callable[[], None]:
    """Run the whole first pass: checksums, records, digests, texts and index on disk."""

    def first_pass() -> None:
        with tempfile.TemporaryDirectory() as folder:
            for path in paths:
                spool_file(FileTask(Path(path), Path(folder), PrepareConfig()))

    return first_pass


def _pubmed_parser(folder: str, paths: list[str]) -> Callable[[], None]:
    sys.path.insert(0, folder)
    from pubmed_parser import parse_medline_xml

    def read() -> None:
        for path in paths:
            for _ in parse_medline_xml(path):
                pass

    return read


def measure_parsing(settings: PrepareBenchmark) -> None:
    """Time the contenders in turns and print records/s, MB/s of XML and peak memory.

    Raises:
      UserError: a file cannot be read, or pubmed_parser cannot be run.
    """
    paths = [str(path) for name in settings.input for path in (nlm_sample() if name == NLM_SAMPLE else [Path(name)])]
    if not paths:
        raise UserError("--input names no file; give NLM files, or nlm-sample")
    records = sum(not isinstance(record, Deletion) for path in paths for record in read_articles(path))
    megabytes = sum(len(chunk) for path in paths for chunk in read_chunks(path, 1 << 20)) / 1e6
    contenders = [
        Contender("this project: records", "default", partial(_read, paths)),
        Contender("this project: whole first pass", "default", partial(_spool, paths)),
    ]
    if settings.peer is not None:
        contenders.append(Contender("pubmed_parser", "default", partial(_pubmed_parser, settings.peer, paths)))
    timings = alternate(contenders, settings.rounds, _LIMIT_SECONDS)
    baseline = timings[-1].seconds.median if settings.peer is not None else None
    rows = []
    for contender, timing in zip(contenders, timings, strict=True):
        seconds = timing.seconds.median
        spread = f"{seconds:.2f} ({timing.seconds.least:.2f}-{timing.seconds.most:.2f})"
        speeds = f"{records / seconds:,.0f}", f"{megabytes / seconds:.1f}"
        memory, ratio = f"{timing.peak_memory / 1e6:,.0f} MB", f"{baseline / seconds:.1f}" if baseline else None
        rows.append((contender.name, spread, *speeds, memory, ratio))
    title = f"{len(paths)} files, {records:,} records, {megabytes:,.0f} MB of XML, {settings.rounds} rounds"
    columns = ("on one core", "seconds", "records/s", "MB/s of XML", "peak memory", "speed-up over pubmed_parser")
    summary_table(title, columns, rows)
