"""`prepare inspect`: the content of a folder of shards, in the terminal and as one HTML page."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from biomamba_jax import html
from biomamba_jax.config.prepare import InspectConfig
from biomamba_jax.data.build import REMOVED_NAME
from biomamba_jax.data.mixture import MixedRowPlan, open_mixture
from biomamba_jax.data.nlm import find_records
from biomamba_jax.data.packing import RowPlan
from biomamba_jax.data.readers import is_nlm
from biomamba_jax.data.records import REASONS
from biomamba_jax.data.shards import Manifest, ShardReader, open_split
from biomamba_jax.data.text import remaining_markup
from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json_lines
from biomamba_jax.object_store import is_url
from biomamba_jax.tables import Table, print_tables

PERCENTILES = (1, 10, 25, 50, 75, 90, 99, 100)
_PACKED_ROWS = 4096
_SHOWN_CHARACTERS = 3000


class Sample(NamedTuple):
    """A stored document and the record it was made of."""

    name: str
    """PMID or index, and source."""
    tokens: int
    """Tokens of the document."""
    before: str
    """The record's XML; "" where its file was not given."""
    after: str
    """The text that the document's tokens spell."""

    @property
    def title(self) -> str:
        """Name and length in tokens."""
        return f"{self.name}, {self.tokens:,} tokens"

    @property
    def texts(self) -> list[str]:
        """The beginnings of `before`, if there is one, and `after`."""
        return [text[:_SHOWN_CHARACTERS] for text in (self.before, self.after) if text]


class Markup(NamedTuple):
    """Numbers of documents with markup left in their text."""

    checked: int
    """Documents that were searched."""
    tags: int
    """Those with HTML tags."""
    entities: int
    """Those with HTML entities."""


class SourceShare(NamedTuple):
    """A source's share of the preview of a mixture."""

    name: str
    """Name of the source."""
    tokens: int
    """Tokens drawn from it."""
    share: float
    """Share of the preview's tokens, 0 to 1."""
    documents: int
    """Documents drawn from it."""
    epochs: float
    """Passes over the source."""


@dataclass(frozen=True)
class Inspection:
    """A split as `inspect` shows it."""

    name: str
    """Name of the folder of shards."""
    manifest: Manifest
    """The folder's manifest."""
    split: str
    """Name of the split."""
    lengths: np.ndarray
    """Tokens of each document, EOS included: uint32 [documents]."""
    sequence_length: int
    """Tokens of a row."""
    packed: float
    """Share of tokens, not padding, in packed rows of `sequence_length`, 0 to 1."""
    markup: Markup
    """Markup left in the text."""
    samples: list[Sample]
    """Some documents."""
    removed: dict[str, int]
    """Number of entries of each reason in `removed.jsonl`."""
    mixture: list[SourceShare]
    """Preview of the mixture; [] without one."""


def inspect(config: InspectConfig) -> Inspection:
    """Inspect one split of a folder of shards.

    Raises:
      UserError: it is not a folder of shards, or the split is empty.
    """
    manifest, reader = open_split(config.path, config.split)
    folder = reader.folder.parent
    if not len(reader):
        raise UserError(f"{reader.folder}: holds no document; choose another --split")
    tokenizer = load_tokenizer(folder / manifest.tokenizer.file)
    manifest.check_tokenizer(tokenizer.sha256)
    return Inspection(
        name=config.path if is_url(config.path) else folder.resolve().name,
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
    """Return each source's share of the mixture's first tokens; [] without a mixture."""
    if not config.mixture.sources:
        return []
    documents = open_mixture(config.mixture, tokenizer_sha256=Manifest.load(config.path).tokenizer.sha256)
    plan = MixedRowPlan(documents, config.sequence_length, seed=config.seed)
    tokens, window = np.zeros(len(documents.names), np.int64), 0
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
    chosen = _chosen(len(reader), most, 0)
    counts = [remaining_markup(tokenizer.decode(reader[index].ids[:-1].tolist())) for index in chosen]
    tags, entities = np.sum(counts, axis=0).tolist()
    return Markup(len(chosen), tags, entities)


def _samples(reader: ShardReader, manifest: Manifest, tokenizer: Tokenizer, config: InspectConfig) -> list[Sample]:
    documents = [(index, reader[index]) for index in _chosen(len(reader), config.samples, config.seed)]
    before: dict[int, str] = {}
    for path in config.input:
        before |= find_records(path, {document.pmid for _, document in documents if document.pmid})
    samples = []
    for index, document in documents:
        name = f"PMID {document.pmid}" if document.pmid else document.id or f"document {index}"
        source = manifest.sources[document.source]["name"] if document.source < len(manifest.sources) else "?"
        text = tokenizer.decode(document.ids[:-1].tolist())
        samples.append(Sample(f"{name}, {source}", len(document.ids), before.get(document.pmid or 0, ""), text))
    return samples


def _removed(folder: Path) -> dict[str, int]:
    path = folder / REMOVED_NAME
    return dict(Counter(entry["reason"] for _, entry in read_json_lines(path))) if path.exists() else {}


# --- As tables ---


def manifest_tables(manifest: Manifest) -> tuple[Table, Table]:
    """Return what became of every record, and what each split holds."""
    fate = [("read", sum(source.get("records", 0) for source in manifest.sources), "")]
    fate += [(reason, -number, REASONS.get(reason, "")) for reason, number in manifest.filters.items() if number]
    fate.append(("kept", sum(split.documents for split in manifest.splits.values()), ""))
    if unspelled := sum(split.unspelled for split in manifest.splits.values()):
        fate.append(("unspelled", unspelled, "of these: their ids spell another text"))
    splits = [
        (name, s.documents, s.tokens, s.bytes, f"{s.bytes / s.tokens:.2f}" if s.tokens else None, s.shards)
        for name, s in manifest.splits.items()
    ]
    tokenizer = f"{manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} ids"
    return (
        Table(("records", "number", "meaning"), fate, f"files read: {len(manifest.sources):,}", left=(0, 2)),
        Table(("split", "documents", "tokens", "bytes", "bytes/token", "shards"), splits, tokenizer),
    )


def _mixture_table(found: Inspection) -> Table:
    rows = [(s.name, s.tokens, f"{100 * s.share:.2f} %", s.documents, f"{s.epochs:.3f}") for s in found.mixture]
    return Table(("source", "tokens", "share", "documents", "epochs"), rows, "the mixture's first tokens")


def _notes(found: Inspection) -> list[str]:
    markup, longer = found.markup, float((found.lengths > found.sequence_length).mean())
    notes = [
        f"rows of {found.sequence_length:,}: {100 * found.packed:.2f} % full when packed; {100 * longer:.2f} % of the "
        "documents are longer",
        f"of {markup.checked:,} documents {markup.tags:,} ({100 * markup.tags / markup.checked:.3f} %) have tags left "
        f"and {markup.entities:,} ({100 * markup.entities / markup.checked:.3f} %) entities",
    ]
    if any(is_nlm(source["name"]) for source in found.manifest.sources):
        notes[-1] += "; in the MedRAG corpus of PubMed's 2021 files 27 % and 18 %"
    if found.removed:
        listed = ", ".join(f"{number:,} as {reason}" for reason, number in found.removed.items())
        notes.append(f"{REMOVED_NAME} lists {listed}")
    return notes


# --- Output ---


def show(found: Inspection) -> None:
    """Print the inspection."""
    quantiles = np.percentile(found.lengths, PERCENTILES, method="lower").astype(int)
    columns = ("tokens per document", *(f"{p} %" for p in PERCENTILES))
    lengths = Table(columns, [("at most", *quantiles.tolist())], f"{found.split}, with EOS")
    print_tables([*manifest_tables(found.manifest), lengths])
    print(*_notes(found), sep="\n")
    if found.mixture:
        print_tables([_mixture_table(found)])
    for sample in found.samples:
        print(f"\n--- {sample.title} ---", *sample.texts, sep="\n\n")


def write_html(found: Inspection, path: Path) -> None:
    """Write the inspection as one HTML page with plots."""
    records, splits = manifest_tables(found.manifest)
    html.write(
        path,
        "inspection",
        title=found.name,
        records=records,
        splits=splits,
        split=found.split,
        notes=_notes(found),
        drawn=_plots(found),
        mixture=_mixture_table(found),
        samples=found.samples,
        settings=json.dumps(found.manifest.settings, indent=1, ensure_ascii=False),
    )


def _plots(found: Inspection) -> list[html.Plot]:
    def lengths(axes: Any) -> None:
        largest = max(int(found.lengths.max()), 2)
        axes.hist(found.lengths, bins=np.geomspace(1, largest + 1, 60))
        axes.axvline(found.sequence_length, color="C1", linewidth=1.2)
        axes.set_xscale("log")
        axes.set_xlabel(f"tokens (line: a row of {found.sequence_length:,})")
        axes.set_ylabel("documents")

    def reasons(axes: Any) -> None:
        bars = axes.barh(list(left_out), list(left_out.values()), color="C2")
        axes.bar_label(bars, fmt="{:,.0f}", padding=3)
        axes.margins(x=0.15)  # for the longest bar's label
        axes.invert_yaxis()  # the first above, as in the table
        axes.set_xlabel("records")

    def shares(axes: Any) -> None:
        bars = axes.bar([s.name for s in found.mixture], [100 * s.share for s in found.mixture], color="C3")
        axes.bar_label(bars, fmt="{:.1f} %", padding=2)
        axes.set_ylabel("% of the tokens")

    left_out = {reason: number for reason, number in found.manifest.filters.items() if number}
    plots = {"Documents by length": lengths}
    if left_out:
        plots["Left out, by reason"] = reasons
    if found.mixture:
        plots["Mixture"] = shares
    return [html.plot(title, draw) for title, draw in plots.items()]
