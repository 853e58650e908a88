"""`prepare inspect`: what a folder of shards holds, on the terminal and as one HTML page."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from biomamba_jax import html
from biomamba_jax.config.prepare import InspectConfig
from biomamba_jax.data.build import REMOVED_NAME
from biomamba_jax.data.mixture import MixedRowPlan, Mixture, Share
from biomamba_jax.data.nlm import find_records
from biomamba_jax.data.packing import RowPlan
from biomamba_jax.data.records import REASONS
from biomamba_jax.data.shards import Manifest, ShardReader, open_split
from biomamba_jax.data.text import remaining_markup
from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer
from biomamba_jax.errors import UserError

PERCENTILES = (1, 10, 25, 50, 75, 90, 99, 100)
_PACKED_ROWS = 4096
_SHOWN_CHARACTERS = 3000


class Sample(NamedTuple):
    """A document as it is stored, its text, and what it was made of ("" where that is not at hand)."""

    name: str
    tokens: int
    before: str
    after: str


class Markup(NamedTuple):
    """How many of `checked` documents have tags or entities left."""

    checked: int
    tags: int
    entities: int


class SourceShare(NamedTuple):
    """What a source gives in the preview of a mixture; epochs: passes over it."""

    name: str
    tokens: int
    share: float
    documents: int
    epochs: float


@dataclass(frozen=True)
class Inspection:
    """All that is told of a split.

    lengths: uint32 [documents], tokens. packed: share of tokens, not padding, in packed rows of `sequence_length`.
    removed: how many entries of each reason the list of what was removed has.
    """

    manifest: Manifest
    split: str
    lengths: np.ndarray
    sequence_length: int
    packed: float
    markup: Markup
    samples: list[Sample]
    removed: dict[str, int]
    mixture: list[SourceShare]


def inspect(config: InspectConfig) -> Inspection:
    """Looks into the folder.

    Raises:
      UserError: it is no folder of shards, or the split is empty.
    """
    folder = Path(config.path)
    manifest, reader = open_split(folder, config.split)
    if not len(reader):
        raise UserError(f"{reader.folder}: holds no document; choose another --split")
    tokenizer = load_tokenizer(folder / manifest.tokenizer.file)
    manifest.check_tokenizer(tokenizer.sha256)
    return Inspection(
        manifest=manifest,
        split=config.split,
        lengths=np.array(reader.lengths),
        sequence_length=config.sequence_length,
        packed=_packed_share(reader, config),
        markup=_markup(reader, tokenizer, config.checked),
        samples=_samples(reader, manifest, tokenizer, config),
        removed=_removed(folder),
        mixture=preview(config),
    )


def preview(config: InspectConfig) -> list[SourceShare]:
    """The shares of the sources in the first tokens of the mixture; [] without one."""
    sources = config.mixture.sources
    if not sources:
        return []
    weights = config.mixture.weights
    shares = tuple(Share(name, source.path, weights[name]) for name, source in sources.items())
    sha256 = Manifest.load(config.path).tokenizer.sha256
    documents = Mixture(shares, config.mixture.counts).open(tokenizer_sha256=sha256)
    plan = MixedRowPlan(documents, config.sequence_length, seed=config.seed)
    tokens, window = np.zeros(len(shares), np.int64), 0
    while tokens.sum() < config.preview_tokens:
        window = plan.window_start(plan.next_window_row).window + 1
        drawn = np.array(plan.drawn_before(window), np.int64).reshape(2, -1)
        tokens = drawn[1]
    return [
        SourceShare(name, int(own), float(own / tokens.sum()), int(count), float(count / len(part)))
        for name, own, count, part in zip(documents.names, tokens, drawn[0], documents.readers, strict=True)
    ]


def _packed_share(reader: ShardReader, config: InspectConfig) -> float:
    plan = RowPlan(reader.lengths, config.sequence_length, seed=config.seed)
    rows = min(plan.rows_in_epoch(), _PACKED_ROWS) if len(reader) < 2 * _PACKED_ROWS else _PACKED_ROWS
    used = sum(piece.stop - piece.start for row in range(rows) for piece in plan[row])
    return used / (rows * config.sequence_length)


def _chosen(documents: int, number: int, seed: int) -> list[int]:
    return sorted(np.random.default_rng(seed).choice(documents, min(number, documents), replace=False).tolist())


def _markup(reader: ShardReader, tokenizer: Tokenizer, most: int) -> Markup:
    tags = entities = 0
    chosen = range(len(reader)) if len(reader) <= most else _chosen(len(reader), most, 0)
    for index in chosen:
        found = remaining_markup(tokenizer.decode(reader[index].ids[:-1].tolist()))
        tags, entities = tags + found[0], entities + found[1]
    return Markup(len(chosen), tags, entities)


def _samples(reader: ShardReader, manifest: Manifest, tokenizer: Tokenizer, config: InspectConfig) -> list[Sample]:
    documents = [(index, reader[index]) for index in _chosen(len(reader), config.samples, config.seed)]
    before: dict[int, str] = {}
    for path in config.input:
        before |= find_records(path, {document.pmid for _, document in documents if document.pmid})
    samples = []
    for index, document in documents:
        name = f"PMID {document.pmid}" if document.pmid else f"document {index}"
        source = manifest.sources[document.source]["name"] if document.source < len(manifest.sources) else "?"
        text = tokenizer.decode(document.ids[:-1].tolist())
        samples.append(Sample(f"{name}, {source}", len(document.ids), before.get(document.pmid or 0, ""), text))
    return samples


def _removed(folder: Path) -> dict[str, int]:
    path = folder / REMOVED_NAME
    if not path.exists():
        return {}
    with open(path, encoding="utf-8") as file:
        return dict(Counter(json.loads(line)["reason"] for line in file))


# --- On the terminal ---


def show(found: Inspection, tables: Sequence[Table]) -> None:
    """Prints the inspection below the tables of its manifest."""
    console = Console()
    lengths = Table("tokens a document", *(f"{p} %" for p in PERCENTILES), title=f"{found.split}, with EOS")
    values = np.percentile(found.lengths, PERCENTILES, method="lower").astype(int)
    lengths.add_row("at most", *(f"{value:,}" for value in values))
    for each in (*tables, lengths):
        console.print(each)
    for line in _lines(found):
        console.print(line, highlight=False)
    if found.mixture:
        mixture = Table("source", "tokens", "share", "documents", "epochs", title="the mixture's first tokens")
        for name, tokens, share, documents, epochs in found.mixture:
            mixture.add_row(name, f"{tokens:,}", f"{100 * share:.2f} %", f"{documents:,}", f"{epochs:.3f}")
        console.print(mixture)
    for sample in found.samples:
        console.rule(f"{sample.name}, {sample.tokens:,} tokens")
        for text in filter(None, (sample.before, sample.after)):
            console.print(text[:_SHOWN_CHARACTERS], markup=False, highlight=False)
            console.print()


def _lines(found: Inspection) -> list[str]:
    markup, longer = found.markup, float((found.lengths > found.sequence_length).mean())
    lines = [
        f"rows of {found.sequence_length:,}: {100 * found.packed:.2f} % full when packed; {100 * longer:.2f} % of the "
        "documents are longer",
        f"of {markup.checked:,} documents {markup.tags:,} ({100 * markup.tags / markup.checked:.3f} %) have tags left "
        f"and {markup.entities:,} ({100 * markup.entities / markup.checked:.3f} %) entities; in the MedRAG corpus of "
        "the 2021 file 27 % and 18 %",
    ]
    if found.removed:
        listed = ", ".join(f"{number:,} as {reason}" for reason, number in found.removed.items())
        lines.append(f"{REMOVED_NAME} lists {listed}")
    return lines


# --- As a page ---


def write_html(found: Inspection, path: Path) -> None:
    """Writes the inspection as one HTML page with plots."""
    manifest = found.manifest
    kept = sum(split.documents for split in manifest.splits.values())
    fate = [("read", f"{sum(source.get('records', 0) for source in manifest.sources):,}", "")]
    fate += [(reason, f"{-n:,}", REASONS.get(reason, "")) for reason, n in manifest.filters.items() if n]
    splits = [
        (name, f"{s.documents:,}", f"{s.tokens:,}", f"{s.bytes:,}", f"{s.bytes / max(s.tokens, 1):.2f}")
        for name, s in manifest.splits.items()
    ]
    shares = [
        (s.name, f"{s.tokens:,}", f"{100 * s.share:.2f} %", f"{s.documents:,}", f"{s.epochs:.3f}")
        for s in found.mixture
    ]
    body = [
        f"<header><h1>{html.text(path.stem)}</h1><p>{html.text(manifest.tokenizer.name)}, "
        f"{manifest.tokenizer.vocab_size:,} ids</p></header>",
        html.section("Records", _table(("records", "number", "meaning"), [*fate, ("kept", f"{kept:,}", "")])),
        html.section("Splits", _table(("split", "documents", "tokens", "bytes", "bytes/token"), splits)),
        html.section(f"The {found.split} split", _list(_lines(found)) + html.figures(_plots(found))),
        html.section("Mixture", _table(("source", "tokens", "share", "documents", "epochs"), shares) if shares else ""),
        html.section("Samples", "".join(map(_sample_html, found.samples))),
        html.section(
            "Settings", f"<pre>{html.text(json.dumps(manifest.settings, indent=1, ensure_ascii=False))}</pre>"
        ),
    ]
    html.write(path, f"{path.stem}: text", body)


def _plots(found: Inspection) -> list[str]:
    def lengths(axes: Any) -> None:
        largest = max(int(found.lengths.max()), 2)
        axes.hist(found.lengths, bins=np.geomspace(1, largest + 1, 60), color=html.COLOURS[0])
        axes.axvline(found.sequence_length, color=html.COLOURS[1], linewidth=1.2)
        axes.set_xscale("log")
        axes.set_xlabel(f"tokens (line: a row of {found.sequence_length:,})")

    def reasons(axes: Any) -> None:
        left_out = {reason: number for reason, number in found.manifest.filters.items() if number}
        bars = axes.barh(list(left_out), list(left_out.values()), color=html.COLOURS[2])
        axes.bar_label(bars, fmt="{:,.0f}", padding=3)
        axes.margins(x=0.15)  # for the longest bar's label
        axes.invert_yaxis()  # the first above, as in the table
        axes.set_xlabel("records")

    def shares(axes: Any) -> None:
        bars = axes.bar([s.name for s in found.mixture], [100 * s.share for s in found.mixture], color=html.COLOURS[3])
        axes.bar_label(bars, fmt="{:.1f} %", padding=2)
        axes.set_ylabel("% of the tokens")

    plots = [html.svg("Documents by length", lengths)]
    if any(found.manifest.filters.values()):
        plots.append(html.svg("Left out, by reason", reasons))
    return [*plots, html.svg("Mixture", shares)] if found.mixture else plots


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of figures stand to the right."""
    figures = [all(row[column].lstrip("-")[:1].isdigit() for row in rows) for column in range(len(head))]
    css = [' class="number"' if figure else "" for figure in figures]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(f"<{tag}{kind}>{html.text(cell)}</{tag}>" for kind, cell in zip(css, cells, strict=True))

    lines = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{line('th', head)}</tr></thead><tbody>{lines}</tbody></table>"


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.text(line)}</li>' for line in lines)}</ul>"


def _sample_html(sample: Sample) -> str:
    texts = "".join(
        f"<pre>{html.text(text[:_SHOWN_CHARACTERS])}</pre>" for text in (sample.before, sample.after) if text
    )
    return f"<h3>{html.text(sample.name)}, {sample.tokens:,} tokens</h3>{texts}"
