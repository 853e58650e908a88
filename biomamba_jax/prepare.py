"""python -m biomamba_jax.prepare --input FILES... --output DIR (--tokenizer FILE | --train-tokenizer VOCAB_SIZE)
python -m biomamba_jax.prepare download --output DIR [--part baseline] [--numbers 1-20,1335]
python -m biomamba_jax.prepare inspect DIR [--report FILE.html]
python -m biomamba_jax.prepare tokenizers --tokenizers FILES... --input FILES...

Text to tokenized shards: NLM's PubMed XML, JSON lines, plain text, Parquet, Wikipedia's dumps. An interrupted run goes
on from what it had finished. `--input nlm-sample` is two whole NLM files, `wiki-sample` the beginnings of 10,033
Wikipedia articles, `--tokenizer gpt-neox` the released Mamba models' tokenizer; each is downloaded once. Ends with a
table of what was kept and why the rest was not. `download` fetches NLM's files, `inspect` shows what shards hold,
`tokenizers` compares tokenizers.
"""

import dataclasses
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from biomamba_jax.command_line import parse, run_command
from biomamba_jax.config import PrepareConfig
from biomamba_jax.config.prepare import DownloadConfig, InspectConfig, TokenizersConfig
from biomamba_jax.data.build import build_shards
from biomamba_jax.data.inspection import manifest_tables
from biomamba_jax.data.readers import files_in
from biomamba_jax.data.sample import gpt_neox_tokenizer, nlm_sample, wiki_sample
from biomamba_jax.data.shards import Manifest
from biomamba_jax.errors import UserError
from biomamba_jax.tables import print_tables

GPT_NEOX = "gpt-neox"
SAMPLES = {"nlm-sample": nlm_sample, "wiki-sample": wiki_sample}


def prepare(config: PrepareConfig) -> Manifest:
    """Does what `config` says, with a progress bar on stderr, and returns the manifest of the new folder.

    Raises:
      UserError: a broken input, tokenizer or setting. The same command goes on from what was finished.
    """
    if not config.output:
        raise UserError("--output is missing; name the folder to write")
    inputs = [str(path) for name in config.input for path in input_files(name)]
    tokenizer = None if config.tokenizer is None else tokenizer_file(config.tokenizer)
    columns = TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step)
            bars.update(tasks[step], completed=done, total=total)

        return build_shards(dataclasses.replace(config, input=inputs, tokenizer=tokenizer), show)


def input_files(name: str) -> list[Path]:
    """The files that one word of --input means: a sample's, a folder's, or the file itself."""
    return SAMPLES[name]() if name in SAMPLES else files_in(name)


def tokenizer_file(name: str) -> str:
    """The file that --tokenizer means."""
    return str(gpt_neox_tokenizer()) if name == GPT_NEOX else name


def download(argv: Sequence[str], prog: str) -> None:
    """NLM's files onto this machine."""
    from biomamba_jax.data.download import Downloader, Remote, choose, list_files

    description = "Downloads NLM's baseline and update files: in parallel, resumed, checked by MD5."
    config = parse(DownloadConfig, argv, f"{prog}\n\n{description}")
    files = list_files(config.mirror, config.part, tries=config.tries, timeout=config.timeout)
    chosen = choose(files, config.numbers)
    downloader = Downloader(Path(config.output), config.tries, config.timeout)
    columns = TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    counts: Counter[str] = Counter()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("download", total=len(chosen))

        def show(file: Remote, what: str) -> None:
            if what.startswith("again"):
                bar.console.print(f"{file.name}: {what}", highlight=False, markup=False)
            else:
                counts[what] += 1
                bar.advance(task)

        downloader.fetch_all(chosen, config.connections, show)
    print(f"{counts['fetched']:,} files fetched, {counts['there']:,} were there: {config.output}")


def inspect(argv: Sequence[str], prog: str) -> None:
    """What a folder of shards holds."""
    from biomamba_jax.data import inspection

    description = "Counts, lengths, samples, remaining markup and a mixture's preview of a folder of shards."
    config = parse(InspectConfig, argv, f"{prog}\n\n{description}", positional="path")
    if not config.path:
        raise UserError(f"name the folder to look into: {prog} data/pubmed")
    inputs = [str(path) for name in config.input for path in input_files(name)]
    found = inspection.inspect(dataclasses.replace(config, input=inputs))
    inspection.show(found)
    if config.report is not None:
        inspection.write_html(found, Path(config.report))
        print(f"report: {config.report}")


def tokenizers(argv: Sequence[str], prog: str) -> None:
    """Tokenizers on the same text."""
    from biomamba_jax.data.tokenizer_comparison import compare_tokenizers, show

    description = "Bytes per token, tokens per word and the share of biomedical terms that are one token."
    config = parse(TokenizersConfig, argv, f"{prog}\n\n{description}")
    inputs = [str(path) for name in config.input for path in input_files(name)]
    files = [tokenizer_file(name) for name in config.tokenizers]
    show(compare_tokenizers(dataclasses.replace(config, input=inputs), files))


SUBCOMMANDS = {"download": download, "inspect": inspect, "tokenizers": tokenizers}


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` without the program's name, None for this process's arguments."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    words = list(sys.argv[1:] if argv is None else argv)
    prog = "python -m biomamba_jax.prepare"
    if words and words[0] in SUBCOMMANDS:
        SUBCOMMANDS[words[0]](words[1:], f"{prog} {words[0]}")
        return
    if words and not words[0].startswith("-"):
        raise UserError(
            f"{words[0]!r} is none of {', '.join(SUBCOMMANDS)}; give options such as --input, or see --help"
        )
    config = parse(PrepareConfig, words, __doc__)
    manifest = prepare(config)
    print_tables(manifest_tables(manifest))
    print(f"wrote {config.output}")


if __name__ == "__main__":
    run_command(main)
