"""Find entities in texts with a model fine-tuned with `finetune --head token_classifier`.

python -m biomamba_jax.tag --model DIR [--file notes.txt|lines.jsonl|pubmed.xml] [--to pubtator|html] > spans.jsonl

The model is the run directory, what `convert` exported from it, or an encoder's Hugging Face folder. A text is a line
of standard input or of a file, a line of JSON lines or of a table, or title and abstract of a record of NLM's XML.
Offsets count characters. A text may have any length: it is read in windows with the recurrent state carried from one to
the next.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from biomamba_jax.command_line import parse, run_command
from biomamba_jax.config.checks import Settings, check
from biomamba_jax.config.model import InferenceDType
from biomamba_jax.errors import UserError

if TYPE_CHECKING:
    from biomamba_jax.data.annotations import Span

_AT_ONCE = 64
"""Texts read, tagged and written at a time."""


@dataclass(frozen=True)
class TagConfig(Settings):
    """The texts to tag, and the model."""

    model: str
    """Folder of the model, also gs://bucket/folder, or its name on the Hugging Face hub, owner/name or
    owner/name@revision."""
    file: str | None = None
    """Text, JSON lines (.jsonl), tables (.csv, .tsv) or NLM's XML (.xml), each also .gz, .bz2 or .zst; default:
    standard input, as text."""
    text: str = "{text}"
    """JSON lines and tables: template of the text; {name} stands for that key or column."""
    to: Literal["jsonl", "pubtator", "html"] = "jsonl"
    """Written: JSON lines with the spans, PubTator, or a page with highlighted spans, which needs `output`."""
    output: str | None = None
    """File to write; default: standard output."""
    dtype: InferenceDType | None = None
    """Compute dtype, or int8 matrices; default: bfloat16 on TPU and GPU, float32 on CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.to != "html" or self.output, "output", self.output, "give the HTML file to write")


def tag(config: TagConfig, source: Iterable[str], out: TextIO) -> None:
    """Tag the texts of a file or of `source`.

    Args:
      config: the texts and the model.
      source: lines to read if the config names no file.
      out: where results are written if the config names no file for them.

    Raises:
      UserError: the model has no head for words, or a text cannot be read.
    """
    from biomamba_jax import files, html
    from biomamba_jax.data.annotations import pieces
    from biomamba_jax.data.records import batched
    from biomamba_jax.tasks.model import load_head

    model = load_head(config.model, config.dtype)

    def tagged() -> Iterator[tuple[dict[str, Any], tuple["Span", ...]]]:
        for batch in batched(_read(config, source), _AT_ONCE):
            yield from zip(batch, model.tag([record["text"] for record in batch]), strict=True)

    if config.to == "html":
        found = list(tagged())
        types = sorted({span.type for _, spans in found for span in spans})
        shown = [(record["key"], list(pieces(record["text"], spans))) for record, spans in found]
        html.write(Path(config.output or ""), "tagged", title="Entities", texts=shown, types=types, model=config.model)
        return
    written = _as_pubtator if config.to == "pubtator" else _as_json
    lines = (written(record, spans) + "\n" for record, spans in tagged())
    if config.output is None:
        for line in lines:
            out.write(line)
            out.flush()
        return
    with files.naming_write_errors(config.output, "give --output another file"):
        files.write_text(config.output, "".join(lines))


def _read(config: TagConfig, source: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield records with "key" and "text"; those of JSON lines keep their other keys."""
    from biomamba_jax.data.examples import fill_template
    from biomamba_jax.data.nlm import read_articles
    from biomamba_jax.data.readers import read_rows
    from biomamba_jax.data.records import Article
    from biomamba_jax.files import naming_errors, read_json_lines, read_lines, uncompressed_name

    name = config.file or "standard input"
    kind = Path(uncompressed_name(config.file)).suffix.lower() if config.file else ""
    if kind == ".xml":
        articles = (each for each in read_articles(name) if isinstance(each, Article))
        yield from ({"key": str(each.pmid), "text": each.text} for each in articles)
    elif kind in (".jsonl", ".json", ".csv", ".tsv"):
        rows = ((number, f"{name}, line {number}", line) for number, line in read_json_lines(name))
        if kind in (".csv", ".tsv"):
            rows = ((number, where, line) for number, (where, line) in enumerate(read_rows(Path(name)), 1))
        for number, where, line in rows:
            if "spans" in line:
                raise UserError(f"{where}: has its own spans, which is what is written; rename the key")
            text = fill_template(config.text, line, where, "text")
            yield {"key": str(line.get("key", line.get("id", number)))} | line | {"text": text}
    else:
        with naming_errors(name):
            lines = read_lines(name) if config.file else (line.rstrip("\r\n") for line in source)
            yield from ({"key": str(number), "text": line} for number, line in enumerate(lines, 1) if line.strip())


def _as_json(record: dict[str, Any], spans: Sequence["Span"]) -> str:
    text = record["text"]
    found = [{"start": a, "end": b, "type": kind, "text": text[a:b]} for a, b, kind, _ in spans]
    return json.dumps(record | {"spans": found}, ensure_ascii=False)


def _as_pubtator(record: dict[str, Any], spans: Sequence["Span"]) -> str:
    """Return a record of PubTator, whose title is the text's first line."""
    key, (title, _, abstract) = str(record["key"]), record["text"].partition("\n")
    lines = [f"{key}|t|{title}", f"{key}|a|{abstract.replace(chr(10), ' ')}"]
    for start, end, kind, _ in spans:
        spelled = " ".join(record["text"][start:end].splitlines())
        lines.append(f"{key}\t{start}\t{end}\t{spelled}\t{kind}")
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on `argv`, by default this process's arguments."""
    tag(parse(TagConfig, argv, __doc__), sys.stdin, sys.stdout)


if __name__ == "__main__":
    run_command(main)
