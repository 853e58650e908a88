"""Find entities in texts with a model fine-tuned with `finetune --head token_classifier`.

python -m biomamba_jax.tag --model DIR [--file notes.txt|lines.jsonl|pubmed.xml] [--to pubtator|html] > spans.jsonl

The model is the run directory, what `convert` exported from it, or an encoder's Hugging Face folder. A text is a line
of standard input or of a file, a line of JSON lines or of a table, or title and abstract of a record of NLM's XML.
Offsets count characters. A text may have any length: it is read in windows with the recurrent state carried from one to
the next.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from biomamba_jax.command_line import parse, run_command
from biomamba_jax.config.tag import TagConfig
from biomamba_jax.errors import UserError

if TYPE_CHECKING:
    from biomamba_jax.data.annotations import Span

_BREAKS = re.compile(r"[\t\r\v\f\x1c-\x1e\x85\u2028\u2029]")
"""Characters other than "\\n" that end a column or line for some reader."""
_AT_ONCE = 64
"""Texts read, tagged and written at a time."""


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
    from biomamba_jax.files import naming_errors, read_json_lines, read_lines, uncompressed_name

    kind = Path(uncompressed_name(config.file)).suffix.lower() if config.file else ""
    if config.file and kind == ".xml":
        yield from _articles(config.file)
    elif config.file and kind in (".jsonl", ".json"):
        lines = read_json_lines(config.file)
        yield from _rows(config, ((number, f"{config.file}, line {number}", line) for number, line in lines))
    elif config.file and kind in (".csv", ".tsv"):
        from biomamba_jax.data.readers import read_rows

        rows = enumerate(read_rows(Path(config.file)), 1)
        yield from _rows(config, ((number, where, row) for number, (where, row) in rows))
    else:
        with naming_errors(config.file or "standard input"):
            texts = read_lines(config.file) if config.file else (line.rstrip("\r\n") for line in source)
            yield from ({"key": str(number), "text": text} for number, text in enumerate(texts, 1) if text.strip())


def _articles(path: str) -> Iterator[dict[str, Any]]:
    from biomamba_jax.data.nlm import read_articles
    from biomamba_jax.data.records import Article, NotAnArticle

    left_out = Counter[str]()
    for record in read_articles(path):
        if isinstance(record, Article):
            yield {"key": str(record.pmid), "text": record.text}
        else:
            left_out[record.reason if isinstance(record, NotAnArticle) else "deletion"] += 1
    for reason, count in sorted(left_out.items()):
        print(f"{path}: left out: {reason}, {count:,}", file=sys.stderr)


def _rows(config: TagConfig, rows: Iterable[tuple[int, str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Yield the record of each (number, place for messages, values by key)."""
    from biomamba_jax.data.examples import fill_template

    for number, where, row in rows:
        if "spans" in row:
            raise UserError(f"{where}: has its own spans, which is what is written; rename the key")
        text = fill_template(config.text, row, where, "text")
        key, known = row.pop("key", None), number if row.get("id") is None else row["id"]
        yield {"key": str(known) if key is None else key} | row | {"text": text}


def _as_json(record: dict[str, Any], spans: Sequence["Span"]) -> str:
    text = record["text"]
    found = [{"start": a, "end": b, "type": kind, "text": text[a:b]} for a, b, kind, _ in spans]
    return json.dumps(record | {"spans": found}, ensure_ascii=False)


def _as_pubtator(record: dict[str, Any], spans: Sequence["Span"]) -> str:
    """Return a record of PubTator, whose title is the text's first line; tabs and other line ends become spaces.

    Raises:
      UserError: the key would end a column or line.
    """
    key, plain = str(record["key"]), _BREAKS.sub(" ", record["text"])
    if not key or {"|", "\n"} & set(_BREAKS.sub("\n", key)):
        raise UserError(f"key {key!r}: PubTator has no place for it; give the text another key, or --to json")
    title, _, abstract = plain.partition("\n")
    lines = [f"{key}|t|{title}", f"{key}|a|{abstract.replace(chr(10), ' ')}"]
    for start, end, kind, _ in spans:
        lines.append(f"{key}\t{start}\t{end}\t{plain[start:end].replace(chr(10), ' ')}\t{kind}")
    return "\n".join([*lines, ""])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on `argv`, by default this process's arguments."""
    tag(parse(TagConfig, argv, __doc__), sys.stdin, sys.stdout)


if __name__ == "__main__":
    run_command(main)
