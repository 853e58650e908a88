"""Annotated texts: spans with a type at character offsets, labels, relations, scores; their words and tags.

Labels are given to words: runs of letters, runs of digits, and every other character that is not white space. Each word
is tokenized by itself, together with the white space before it, so that no token crosses a word's border and offsets
are exact through every tokenizer, whatever it normalizes; where no token crosses a border anyway, the tokens are those
of the whole text. A word's label sits on its last token, where a causal model has seen all of it.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain
from pathlib import Path
from typing import NamedTuple

from biomamba_jax.data.tokenizer import Tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_chunks

WORD = re.compile(r"[^\W\d_]+|\d+|_|[^\w\s]")
_WORD_AFTER_SPACE = re.compile(rf"\s*({WORD.pattern})")
OUTSIDE = "O"


class Span(NamedTuple):
    """A stretch of a text."""

    start: int
    """Index of its first character."""
    end: int
    """Index after its last character."""
    type: str
    """Its type, such as Disease."""
    ids: tuple[str, ...] = ()
    """Identifiers of the concepts that it names."""


class Relation(NamedTuple):
    """A relation between two concepts."""

    type: str
    """Its type, such as CID."""
    head: str
    """Identifier of the first concept."""
    tail: str
    """Identifier of the second one."""


@dataclass(frozen=True)
class AnnotatedText:
    """A text and what is known, or predicted, of it."""

    key: str
    """Name of the text in its source."""
    text: str
    """The text."""
    spans: tuple[Span, ...] = ()
    """Spans, such as entities, in the order of their file; of a question, its answers, the best first."""
    labels: tuple[str, ...] = ()
    """Classes of the text."""
    relations: tuple[Relation, ...] = ()
    """Relations between the concepts of its spans."""
    score: float | None = None
    """A number that is said of the text, such as a similarity."""
    question: str = ""
    """Question whose answers the spans are."""
    scores: dict[str, float] = field(default_factory=dict)
    """Probability of each label, in a prediction."""
    left_out: int = 0
    """Number of its annotations that are in several parts or have no place, and so are not among the spans."""


class EncodedWords(NamedTuple):
    """A tokenized text."""

    ids: list[int]
    """Token ids."""
    words: list[tuple[int, int]]
    """Character offsets of each word that has a token."""
    last: list[int]
    """Index of the last token of each of these words."""


def encode_words(texts: Sequence[str], tokenizer: Tokenizer) -> list[EncodedWords]:
    """Tokenize texts word by word; a word that the tokenizer drops, such as a control character, is left out."""
    found = [list(_WORD_AFTER_SPACE.finditer(text)) for text in texts]
    distinct = list(dict.fromkeys(word[0] for words in found for word in words))
    ids = dict(zip(distinct, tokenizer.encode_batch(distinct), strict=True))
    encoded = []
    for words in found:
        kept = [word for word in words if ids[word[0]]]
        tokens = [ids[word[0]] for word in kept]
        last = [end - 1 for end in accumulate(map(len, tokens))]
        encoded.append(EncodedWords(list(chain.from_iterable(tokens)), [word.span(1) for word in kept], last))
    return encoded


# --- Tags ------------------------------------------------------------------------------------------------------------


def tag_names(types: Sequence[str]) -> list[str]:
    """Return the tags of entity types in IOB2: O, then B- and I- of each type."""
    return [OUTSIDE, *(f"{prefix}-{each}" for each in types for prefix in "BI")]


def outermost(spans: Sequence[Span]) -> list[Span]:
    """Return spans in order without those that overlap an earlier one or lie in a longer one."""
    kept: list[Span] = []
    for span in sorted(spans, key=lambda each: (each.start, -each.end)):
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept


def pieces(text: str, spans: Sequence[Span]) -> Iterator[tuple[str, Span | None]]:
    """Yield the parts of a text in and between spans, each with its span or None; `spans` are as of `outermost`."""
    place = 0
    for span in spans:
        yield text[place : span.start], None
        yield text[span.start : span.end], span
        place = span.end
    yield text[place:], None


def to_tags(words: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[str]:
    """Return the tag of each word for the outermost spans that begin and end with one."""
    starts, ends = ({word[side]: index for index, word in enumerate(words)} for side in (0, 1))
    tags = [OUTSIDE] * len(words)
    for span in outermost(spans):
        if span.start in starts and span.end in ends:
            first, last = starts[span.start], ends[span.end]
            tags[first : last + 1] = [f"B-{span.type}"] + [f"I-{span.type}"] * (last - first)
    return tags


def from_tags(words: Sequence[tuple[int, int]], tags: Sequence[str]) -> list[Span]:
    """Return the entities of tags in IOB1, IOB2 or IOBES as conlleval and seqeval count them.

    An entity begins at B or S, after O, E or S, and where the type changes; so an I without a B before it begins one.

    Args:
      words: character offsets of each word.
      tags: PREFIX-TYPE or O.
    """
    spans: list[Span] = []
    before, kind = OUTSIDE, ""
    for (start, end), tag in zip(words, tags, strict=True):
        prefix, _, name = tag.partition("-")
        if prefix != OUTSIDE:
            if prefix in "BS" or before in (OUTSIDE, "E", "S") or name != kind:
                spans.append(Span(start, end, name))
            else:
                spans[-1] = spans[-1]._replace(end=end)
        before, kind = prefix, name
    return spans


# --- Checks ----------------------------------------------------------------------------------------------------------


def describe(texts: Sequence[AnnotatedText], source: str) -> list[str]:
    """Return a line for each kind of span that is not learnt as it is, with its count."""
    overlapping = misplaced = 0
    for text in texts:
        kept = outermost(text.spans)
        overlapping += len(text.spans) - len(kept)
        words = [match.span() for match in WORD.finditer(text.text)]
        starts, ends = {word[0] for word in words}, {word[1] for word in words}
        misplaced += sum(span.start not in starts or span.end not in ends for span in kept)
    lines = {
        "overlap or lie in a longer one: only the outermost is learnt, all are counted": overlapping,
        "begin or end inside a word: they are not learnt, and count as missed": misplaced,
        "are in several parts or have no place: neither learnt nor counted": sum(text.left_out for text in texts),
    }
    return [f"{source}: {count:,} spans {what}" for what, count in lines.items() if count]


def check_splits(files: Mapping[str, Sequence[str]], texts: Mapping[str, Sequence[AnnotatedText]]) -> list[str]:
    """Return lines about what the splits share and about labels that only some of them have.

    Args:
      files: paths of each split, by name.
      texts: texts of each split, by the same names; the first split is trained on.

    Raises:
      UserError: a file is in two splits, by its bytes.
    """
    seen: dict[bytes, tuple[str, str]] = {}
    for split, paths in files.items():
        for path in paths:
            content = b"".join(read_chunks(path, 1 << 20))
            other, other_path = seen.setdefault(content, (split, path))
            if (other, other_path) != (split, path):
                raise UserError(
                    f"{path} ({split}): is byte for byte {Path(other_path)} ({other}): what is chosen or measured on "
                    f"it says nothing about new text; leave data.{split} out, or give another file"
                )
    lines, [first, *rest] = [], list(texts)
    read = {split: {text.text + text.question for text in own} for split, own in texts.items()}
    learnt = {name for text in texts[first] for name in names(text)}
    for split in rest:
        if shared := read[first] & read[split]:
            lines.append(f"{len(shared):,} texts of the {split} split are also in the {first} split")
        missing = Counter(each for text in texts[split] for each in names(text) if each not in learnt)
        lines += [f"{name!r} is not in the {first} split: {n:,} in the {split} split" for name, n in missing.items()]
    return lines


def names(text: AnnotatedText) -> list[str]:
    """Return the labels and the types of spans of a text."""
    return [*text.labels, *(span.type for span in text.spans)]
