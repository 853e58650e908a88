"""`benchmark prepare`: how fast and in how much memory NLM's XML is read, in turns with pubmed_parser where asked."""

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.paired_timing import Candidate, alternate
from biomamba_jax.config import PrepareConfig
from biomamba_jax.data.build import FileTask, spool_file
from biomamba_jax.data.nlm import Deletion, read_articles
from biomamba_jax.data.sample import nlm_sample
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_chunks

NLM_SAMPLE = "nlm-sample"
_LIMIT_SECONDS = 600.0


@dataclass(frozen=True)
class PrepareBenchmark:
    """Reading NLM's XML on one core."""

    input: list[str] = field(default_factory=lambda: [NLM_SAMPLE])
    """NLM files, or nlm-sample."""
    peer: str | None = None
    """Folder that holds pubmed_parser and what it imports, to run it in turns."""
    rounds: int = 3
    """How often each reads the files, after once that does not count."""


def _read(paths: list[str]) -> Callable[[], None]:
    """Records as `prepare` has them before anything is written."""

    def read() -> None:
        for path in paths:
            for _ in read_articles(path):
                pass

    return read


def _spool(paths: list[str]) -> Callable[[], None]:
    """The whole first pass: checksums, records, digests, texts and index on disk."""

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
    """Runs the candidates in turns and prints their records/s, MB/s of XML and peak memory.

    Raises:
      UserError: a file cannot be read, or the peer cannot be run.
    """
    paths = [str(path) for name in settings.input for path in (nlm_sample() if name == NLM_SAMPLE else [Path(name)])]
    if not paths:
        raise UserError("--input names no file; give NLM files, or nlm-sample")
    records = sum(not isinstance(record, Deletion) for path in paths for record in read_articles(path))
    megabytes = sum(len(chunk) for path in paths for chunk in read_chunks(path, 1 << 20)) / 1e6
    candidates = [
        Candidate("this project: records", "default", partial(_read, paths)),
        Candidate("this project: whole first pass", "default", partial(_spool, paths)),
    ]
    if settings.peer is not None:
        candidates.append(Candidate("pubmed_parser", "default", partial(_pubmed_parser, settings.peer, paths)))
    timings = alternate(candidates, settings.rounds, _LIMIT_SECONDS)
    table = Table("on one core", "seconds", "records/s", "MB/s of XML", "peak memory", "times the peer")
    table.title = f"{len(paths)} files, {records:,} records, {megabytes:,.0f} MB of XML, {settings.rounds} rounds"
    peer = timings[-1].seconds.median if settings.peer is not None else None
    for candidate, timing in zip(candidates, timings, strict=True):
        seconds = timing.seconds.median
        spread = f"{seconds:.2f} ({timing.seconds.least:.2f}-{timing.seconds.most:.2f})"
        memory = f"{timing.peak_memory / 1e6:,.0f} MB"
        ratio = f"{peer / seconds:.1f}" if peer else "–"
        table.add_row(candidate.name, spread, f"{records / seconds:,.0f}", f"{megabytes / seconds:.1f}", memory, ratio)
    for column in table.columns[1:]:
        column.justify = "right"
    Console().print(table)
