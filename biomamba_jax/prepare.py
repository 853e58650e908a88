"""python -m biomamba_jax.prepare --input FILES... --output DIR (--tokenizer FILE | --train-tokenizer VOCAB_SIZE)

Text to tokenized shards: NLM PubmedArticleSet XML (.xml, .xml.gz), JSON lines (.jsonl, .jsonl.gz) or plain text.
`--input nlm-sample` is two whole NLM files, `--tokenizer gpt-neox` the released Mamba models' tokenizer; both are
downloaded once. Ends with a table of what was kept and why the rest was not.
"""

import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from itertools import takewhile

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from biomamba_jax.command_line import parse, run_command
from biomamba_jax.config import PrepareConfig
from biomamba_jax.data.build import Settings, build_shards
from biomamba_jax.data.filters import REASONS, Filters
from biomamba_jax.data.readers import files_in
from biomamba_jax.data.sample import gpt_neox_tokenizer, nlm_sample, wiki_sample
from biomamba_jax.data.shards import Manifest
from biomamba_jax.data.sources import Selection
from biomamba_jax.data.tokenizer import TokenizerTraining
from biomamba_jax.errors import UserError

GPT_NEOX = "gpt-neox"
SAMPLES = {"nlm-sample": nlm_sample, "wiki-sample": wiki_sample}


def prepare(config: PrepareConfig) -> Manifest:
    """Does what `config` says, with a progress bar on stderr, and returns the manifest of the new folder.

    Raises:
      UserError: a broken input, tokenizer or setting. The same command goes on from what was finished.
    """
    if not config.output:
        raise UserError("--output is missing; name the folder to write")
    inputs = [str(path) for name in config.input for path in (SAMPLES[name]() if name in SAMPLES else files_in(name))]
    tokenizer = str(gpt_neox_tokenizer()) if config.tokenizer == GPT_NEOX else config.tokenizer
    columns = TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step)
            bars.update(tasks[step], completed=done, total=total)

        settings = settings_of(config)
        return build_shards(inputs, config.output, tokenizer, settings, workers=config.workers, progress=show)


def settings_of(config: PrepareConfig) -> Settings:
    """The part of `config` that decides what the shards hold, files and tokenizer aside."""
    selection = Selection(
        Filters(
            config.min_abstract_characters,
            config.keep_retracted,
            tuple(config.languages),
            tuple(config.article_types),
            tuple(config.exclude_article_types),
            config.first_year,
            config.last_year,
            config.require_pmcid,
        ),
        near_duplicates=config.near_duplicates,
        evaluation=tuple(config.decontaminate),
        evaluation_overlap=config.decontaminate_overlap,
    )
    training = None
    if config.train_tokenizer is not None:
        training = TokenizerTraining(
            config.train_tokenizer,
            config.tokenizer_kind,
            config.tokenizer_sample_bytes,
            config.tokenizer_byte_fallback,
            config.tokenizer_split_digits,
        )
    return Settings(
        selection,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        recent_from=None if config.recent_from is None else int(config.recent_from.replace("-", "")),
        train_tokenizer=training,
        seed=config.seed,
    )


def tables(manifest: Manifest) -> list[Table]:
    """What became of every record, and what each split holds."""
    records = sum(source["records"] for source in manifest.sources)
    fate = Table("records", "number", "meaning", title=f"{len(manifest.sources)} files")
    fate.add_row("read", f"{records:,}", "")
    for reason, number in manifest.filters.items():
        if number:
            fate.add_row(reason, f"{-number:,}", REASONS[reason])
    fate.add_row("kept", f"{sum(split.documents for split in manifest.splits.values()):,}", "")
    name = f"{manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} ids"
    content = Table("split", "documents", "tokens", "bytes", "bytes/token", "shards", title=name)
    for name, split in manifest.splits.items():
        ratio = f"{split.bytes / split.tokens:.2f}" if split.tokens else "-"
        numbers = [f"{number:,}" for number in (split.documents, split.tokens, split.bytes)]
        content.add_row(name, *numbers, ratio, str(split.shards))
    for table in (fate, content):
        for column in table.columns[1:]:
            column.justify = "right" if column.header != "meaning" else "left"
    return [fate, content]


_TYPES = {f"--{field.name}": str(field.type) for field in dataclasses.fields(PrepareConfig)}
_LISTS = {name for name, kind in _TYPES.items() if kind.startswith("list")}
_FLAGS = {name for name, kind in _TYPES.items() if "bool" in kind}


def _as_settings(argv: Sequence[str]) -> list[str]:
    """`--input A B` as the one list that the schema has, `--train-tokenizer` by its name there, a lone flag as true."""
    settings, rest = [], list(argv)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        name = name.replace("-", "_").replace("__", "--", 1) if name.startswith("--") else name
        if name in _LISTS:
            words = [value] if equals else list(takewhile(lambda word: not word.startswith("--"), rest))
            rest = rest if equals else rest[len(words) :]
            is_list = len(words) == 1 and words[0].startswith("[")
            settings.append(f"{name}={words[0] if is_list else json.dumps(words)}")
        elif name in _FLAGS and not equals and (not rest or rest[0].startswith("--")):
            settings.append(f"{name}=true")
        else:
            settings.append(name + equals + value)
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    """The command; `argv` without the program's name, None for this process's arguments."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    config = parse(
        PrepareConfig,
        _as_settings(sys.argv[1:] if argv is None else argv),
        prog="python -m biomamba_jax.prepare",
        description=(__doc__ or "").partition("\n\n")[2],
    )
    manifest = prepare(config)
    console = Console()
    for table in tables(manifest):
        console.print(table)
    console.print(f"wrote {config.output}", highlight=False)


if __name__ == "__main__":
    run_command(main)
