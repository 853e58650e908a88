"""Records that pass from one stage of `prepare` to the next, and the reasons why a record is left out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple, TypeVar

KEPT, DELETION = 0, 255
REASONS = {
    "book_article": "book or book chapter, not an article",
    "unknown_element": "element that PubmedArticleSet does not have",
    "no_pmid": "record or deletion without a valid PMID",
    "no_abstract": "no abstract or text",
    "too_short": "abstract or text under the minimum length",
    "retracted": "retracted publication",
    "language": "not in one of the requested languages",
    "article_type": "excluded publication type",
    "year": "outside the requested years, or without a year",
    "no_pmcid": "without a PMCID",
    "evaluation_article": "source article of an evaluation set, by its PMID",
    "evaluation_text": "shares text with an evaluation set",
    "deleted": "deleted by a DeleteCitation",
    "superseded": "replaced by another version or a later file",
    "duplicate_text": "same text as an earlier document",
    "near_duplicate": "nearly the same text as an earlier document",
}
"""Reasons to leave a record out, and their meaning; a record has at most one, the first that applies."""
CODE = {reason: code for code, reason in enumerate(REASONS, 1)}
"""Status of a record that is left out, by reason."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Article:
    """A PubmedArticle."""

    pmid: int
    """PubMed id."""
    version: int
    """Version of the PMID's record."""
    title: str
    """Title; "" without one."""
    abstract: str
    """Paragraphs as lines; "" without an abstract."""
    languages: tuple[str, ...]
    """MEDLINE's codes, such as eng."""
    publication_types: tuple[str, ...]
    """Names such as Journal Article."""
    year: int | None
    """Year of the journal's issue."""
    date: int | None = None
    """YYYYMMDD: the earliest date on which it was public (in PubMed, online, or in an issue with a stated month), else
    January 1 of `year`."""
    pmcid: str | None = None
    """PubMed Central id; None: none."""
    html_entities: int = 0
    """Number of named HTML entities, such as `&nbsp;`, that were unescaped in its text."""

    @property
    def text(self) -> str:
        """Document text: title, newline, abstract; the abstract alone where the title is empty."""
        return f"{self.title}\n{self.abstract}" if self.title else self.abstract


@dataclass(frozen=True, slots=True)
class Deletion:
    """A PMID that a DeleteCitation deletes, with all versions read so far."""

    pmid: int
    """PubMed id."""


@dataclass(frozen=True, slots=True)
class NotAnArticle:
    """A record that cannot become a document."""

    reason: str
    """book_article, no_pmid or unknown_element."""


@dataclass(frozen=True, slots=True)
class FreeText:
    """A document of any other source."""

    text: str
    """Without the title."""
    pmid: int = 0
    """PubMed id; 0: none."""
    title: str = ""
    """Title; "" without one."""
    id: str = ""
    """Id that is not a PMID; "": none."""


Record = Article | Deletion | NotAnArticle | FreeText


class Overlap(NamedTuple):
    """The evaluation item that a document overlaps most with."""

    item: str
    """Name of the item."""
    share: float
    """Shared runs of words as a fraction of the runs of the shorter of the two."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A record that may become a document. Without a PMID no other record replaces or deletes it."""

    status: int
    """KEPT, DELETION or the CODE of a reason."""
    text: str = ""
    """"" unless kept."""
    pmid: int = 0
    """PubMed id; 0: none."""
    version: int = 0
    """As in `Article`; 0 without a PMID."""
    date: int = 0
    """YYYYMMDD; 0: unknown."""
    html_entities: int = 0
    """As in `Article`."""
    id: str = ""
    """As in `FreeText`."""
    overlap: Overlap | None = None
    """Why it counts as evaluation text."""


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield consecutive items as lists of `size`; the last one may be shorter."""
    remaining = iter(items)
    while batch := list(islice(remaining, size)):
        yield batch
