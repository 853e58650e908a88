"""Turn text into tokenized shards.

python -m biomamba_jax.prepare --input FILES... --output DIR (--tokenizer FILE | --train-tokenizer VOCAB_SIZE)
python -m biomamba_jax.prepare download --output DIR [--part baseline] [--numbers 1-20,1335]
python -m biomamba_jax.prepare inspect DIR [--report FILE.html]
python -m biomamba_jax.prepare tokenizers --tokenizers FILES... --input FILES...

Reads NLM's PubMed XML, JSON lines, CSV, TSV, text, Parquet, Wikipedia's dumps and datasets of the Hugging Face hub.
An interrupted run continues from what it had finished. `--input nlm-sample` is two whole NLM files, `wiki-sample` the
beginnings of 10,033 Wikipedia articles, `--tokenizer gpt-neox` the released Mamba models' tokenizer; each is downloaded
once. Ends with a table of what was kept and why the rest was not. `download` fetches NLM's files, `inspect` shows the
content of shards, `tokenizers` compares tokenizers.
"""

import dataclasses
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from biomamba_jax.command_line import parse, run_command, run_subcommand
from biomamba_jax.config import PrepareConfig
from biomamba_jax.config.prepare import DownloadConfig, InspectConfig, TokenizersConfig
from biomamba_jax.errors import UserError

if TYPE_CHECKING:
    from biomamba_jax.data.shards import Manifest


def prepare(config: PrepareConfig) -> "Manifest":
    """Write the shards of `config`, with a progress bar on stderr, and return the new folder's manifest.

    Raises:
      UserError: a broken input, tokenizer or setting. The same command continues from what was finished.
    """
    if not config.output:
        raise UserError("--output is missing; name the folder to write")
    from biomamba_jax.data.build import build_shards
    from biomamba_jax.data.sample import tokenizer_file

    tokenizer = None if config.tokenizer is None else str(tokenizer_file(config.tokenizer))
    config = dataclasses.replace(config, input=input_files(config.input), tokenizer=tokenizer)
    with _steps() as show:
        return build_shards(config, show)


@contextmanager
def _steps() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function that shows a step's progress: its name, parts done, and all parts."""
    with _progress() as bars:
        tasks: dict[str, TaskID] = {}

        def show(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step)
            bars.update(tasks[step], completed=done, total=total)

        yield show


def _progress() -> Progress:
    columns = TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True))


def input_files(names: Sequence[str]) -> list[str]:
    """Return the files of each --input: those of a sample or a folder, or the file itself."""
    from biomamba_jax.data.readers import files_in
    from biomamba_jax.data.sample import nlm_sample, wiki_sample

    samples = {"nlm-sample": nlm_sample, "wiki-sample": wiki_sample}
    return [str(path) for name in names for path in (samples[name]() if name in samples else files_in(name))]


def download(argv: Sequence[str], doc: str) -> None:
    """Download NLM's baseline and update files: in parallel, resumable, verified by MD5."""
    config = parse(DownloadConfig, argv, doc)
    from biomamba_jax.data.download import Downloader, Remote, choose, list_files

    files = list_files(config.mirror, config.part, tries=config.tries, timeout=config.timeout)
    chosen = choose(files, config.numbers)
    downloader = Downloader(Path(config.output), config.tries, config.timeout)
    counts: Counter[str] = Counter()
    with _progress() as bar:
        task = bar.add_task("download", total=len(chosen))

        def show(file: Remote, what: str) -> None:
            if what.startswith("again"):
                bar.console.print(f"{file.name}: {what}", highlight=False, markup=False)
            else:
                counts[what] += 1
                bar.advance(task)

        downloader.fetch_all(chosen, config.connections, show)
    print(f"{counts['fetched']:,} files fetched, {counts['there']:,} were there: {config.output}")


def inspect(argv: Sequence[str], doc: str) -> None:
    """Show counts, lengths, samples, remaining markup and a mixture's preview of a folder of shards."""
    config = parse(InspectConfig, argv, doc, positional="path")
    from biomamba_jax.data import inspection

    if not config.path:
        raise UserError(
            "no folder is given; name a folder of shards: python -m biomamba_jax.prepare inspect data/pubmed"
        )
    found = inspection.inspect(dataclasses.replace(config, input=input_files(config.input)))
    inspection.show(found)
    if config.report is not None:
        inspection.write_html(found, Path(config.report))
        print(f"report: {config.report}")


def tokenizers(argv: Sequence[str], doc: str) -> None:
    """Compare bytes per token, tokens per word and the share of biomedical terms that are one token."""
    config = parse(TokenizersConfig, argv, doc)
    from biomamba_jax.data.sample import tokenizer_file
    from biomamba_jax.data.tokenizer_comparison import compare_tokenizers, show

    files = [str(tokenizer_file(name)) for name in config.tokenizers]
    show(compare_tokenizers(dataclasses.replace(config, input=input_files(config.input)), files))


SUBCOMMANDS = {"download": download, "inspect": inspect, "tokenizers": tokenizers}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `argv` without the program's name, None for this process's arguments."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    words = list(sys.argv[1:] if argv is None else argv)
    if run_subcommand(SUBCOMMANDS, words, "python -m biomamba_jax.prepare"):
        return
    if words and not words[0].startswith("-"):
        raise UserError(
            f"{words[0]!r} is not one of {', '.join(SUBCOMMANDS)}; give options such as --input, or see --help"
        )
    config = parse(PrepareConfig, words, __doc__)
    from biomamba_jax.data.build import spool_files
    from biomamba_jax.data.inspection import manifest_tables
    from biomamba_jax.tables import print_tables

    if config.spools is not None and not config.output:
        with _steps() as show:
            files = spool_files(dataclasses.replace(config, input=input_files(config.input)), show)
        print(f"read {files:,} files into {config.spools}")
        return
    manifest = prepare(config)
    print_tables(manifest_tables(manifest))
    print(f"wrote {config.output}")


if __name__ == "__main__":
    run_command(main)
