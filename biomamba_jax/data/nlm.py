"""NLM's PubmedArticleSet XML as a stream of articles: every record comes out, or is accounted for by a named reason.

The rules are those learnt from the field's bugs: an element's text is all of its text (`itertext`, so that <i>, <sub>
and MathML survive); the abstract is MedlineCitation/Article/Abstract/AbstractText and nothing else; labels of
structured abstracts are printed; memory stays bounded because every record is cleared once it is read.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lxml import etree

from biomamba_jax.data.files import read_chunks
from biomamba_jax.data.text import clean_markup, clean_title
from biomamba_jax.errors import UserError

RETRACTED = "Retracted Publication"
_SET = "PubmedArticleSet"
_RECORDS = ("PubmedArticle", "PubmedBookArticle")
_NO_LABEL = {"", "UNLABELLED", "UNLABELED"}
_YEAR = re.compile(r"\b(1[5-9]|20)\d\d\b")
_MAX_PMID, _MAX_VERSION = 2**32 - 1, 2**16 - 1
_CHUNK_BYTES = 1 << 16
_AGAIN = "download it again, or leave it out of --input"


@dataclass(frozen=True, slots=True)
class Article:
    """One PubmedArticle. `abstract` is "" where there is none; its paragraphs are lines. Dates are years or None."""

    pmid: int
    version: int
    title: str
    abstract: str
    languages: tuple[str, ...]
    publication_types: tuple[str, ...]
    year: int | None

    @property
    def retracted(self) -> bool:
        """Whether NLM marks the article itself as retracted (not as a notice of a retraction)."""
        return RETRACTED in self.publication_types

    @property
    def text(self) -> str:
        """The document: the title, a line end, the abstract; the abstract alone where the title is empty."""
        return f"{self.title}\n{self.abstract}" if self.title else self.abstract


@dataclass(frozen=True, slots=True)
class Deletion:
    """A PMID that DeleteCitation takes back, with all versions read so far."""

    pmid: int


@dataclass(frozen=True, slots=True)
class NotAnArticle:
    """A record that cannot become a document: reason is book_article, no_pmid or unknown_element."""

    reason: str


def read_articles(path: str | Path) -> Iterator[Article | Deletion | NotAnArticle]:
    """Streams the records of a .xml or .xml.gz file in their order.

    Raises:
      UserError: naming the file and the last good record, if the file is truncated, is not well-formed, declares or
        uses XML entities, or is no PubmedArticleSet (a lone PubmedArticle or PubmedBookArticle is taken as a set).
    """
    last = "before the first record"
    parser = etree.XMLPullParser(events=("end",), tag=(*_RECORDS, "DeleteCitation"), **_SAFE)
    _check_head(path)
    try:
        for chunk in read_chunks(path, _CHUNK_BYTES):
            parser.feed(chunk)
            for _, element in parser.read_events():
                parent = element.getparent()
                if parent is not None and parent.getparent() is not None:
                    continue  # not a record but a part of one
                yield from _foreign_elements(element)
                for record in _read_record(element, f"{path}: {last}"):
                    if isinstance(record, Article):
                        last = f"after the record with PMID {record.pmid}"
                    yield record
                if parent is not None:
                    element.clear()
                    while element.getprevious() is not None:
                        del parent[0]
        root = parser.close()
    except etree.XMLSyntaxError as error:
        raise UserError(f"{path}: not well-formed XML, {last}: {error.msg}; {_AGAIN}") from None
    if root.tag == _SET and len(root):
        yield from (NotAnArticle("unknown_element") for child in root if not _is_known(child))


# Nothing is expanded, fetched or unbounded, and comments never split a text.
_SAFE = {
    "resolve_entities": False,
    "load_dtd": False,
    "no_network": True,
    "huge_tree": False,
    "remove_comments": True,
    "remove_pis": True,
}


def _check_head(path: str | Path) -> None:
    """Reads to the root's start tag: UserError for a root that is no article set, or a DOCTYPE that declares entities.

    Entity bombs thus end before the first record is parsed, at the cost of reading some hundred bytes twice.
    """
    parser = etree.XMLPullParser(events=("start",), **_SAFE)
    error: etree.XMLSyntaxError | None = None
    for chunk in read_chunks(path, 1024):
        try:
            parser.feed(chunk)
        except etree.XMLSyntaxError as caught:
            error = caught  # libxml2 itself stops an entity bomb; what it is shows in the DOCTYPE
        for _, root in parser.read_events():
            dtd = root.getroottree().docinfo.internalDTD
            if dtd is not None and next(dtd.iterentities(), None) is not None:
                raise UserError(f"{path}: declares XML entities, which NLM's files never do; refused as unsafe")
            if root.tag not in (_SET, *_RECORDS):
                raise UserError(f"{path}: its root is <{root.tag}>, not <{_SET}>; give NLM PubMed XML files")
            return
        if error is not None:
            break
    reason = error.msg if error else "it has no element"
    raise UserError(f"{path}: not well-formed XML before the first record: {reason}; {_AGAIN}")


def _is_known(element: etree._Element) -> bool:
    return element.tag in _RECORDS or element.tag == "DeleteCitation"


def _foreign_elements(element: etree._Element) -> Iterator[NotAnArticle]:
    """One for each element between this record and the one before, which the caller's tag filter has passed over."""
    for sibling in element.itersiblings(preceding=True):
        if not _is_known(sibling):
            yield NotAnArticle("unknown_element")


def _read_record(element: etree._Element, where: str) -> Iterator[Article | Deletion | NotAnArticle]:
    if element.tag == "DeleteCitation":
        for child in element.iterchildren("PMID"):
            pmid = _number(child.text, _MAX_PMID)
            yield NotAnArticle("no_pmid") if pmid is None else Deletion(pmid)
    elif element.tag == "PubmedBookArticle":
        yield NotAnArticle("book_article")
    else:
        yield _read_article(element, where)


def _read_article(element: etree._Element, where: str) -> Article | NotAnArticle:
    citation = _child(element, "MedlineCitation")
    identifier = _child(citation, "PMID")
    pmid = None if identifier is None else _number(identifier.text, _MAX_PMID)
    version = None if identifier is None else _number(identifier.get("Version", "1"), _MAX_VERSION)
    if pmid is None or version is None:
        return NotAnArticle("no_pmid")
    article = _child(citation, "Article")
    types = _child(article, "PublicationTypeList")
    title = _child(article, "ArticleTitle")
    return Article(
        pmid=pmid,
        version=version,
        title="" if title is None else clean_title(_text(title, where)),
        abstract=_abstract(_child(article, "Abstract"), where),
        languages=_texts(article, "Language"),
        publication_types=_texts(types, "PublicationType"),
        year=_year(article),
    )


def _abstract(abstract: etree._Element | None, where: str) -> str:
    """Paragraphs of AbstractText as lines, each after its label; CopyrightInformation is none."""
    if abstract is None:
        return ""
    paragraphs = []
    for part in abstract.iterchildren("AbstractText"):
        text = clean_markup(_text(part, where))
        label = clean_markup(part.get("Label", "")).rstrip(": ")
        if text:
            paragraphs.append(text if label.upper() in _NO_LABEL else f"{label}: {text}")
    return "\n".join(paragraphs)


def _year(article: etree._Element | None) -> int | None:
    """Year of the journal's issue; PubDate has Year, or MedlineDate such as `1978 Jul-Aug` or `Winter 1998-1999`."""
    date = _child(_child(_child(article, "Journal"), "JournalIssue"), "PubDate")
    stated = _child(date, "Year")
    stated = _child(date, "MedlineDate") if stated is None else stated
    match = None if stated is None else _YEAR.search(stated.text or "")
    return int(match[0]) if match else None


def _text(element: etree._Element, where: str) -> str:
    """All text of the element and its descendants, tails included."""
    if not len(element):
        return element.text or ""
    if next(element.iter(etree.Entity), None) is not None:
        raise UserError(f"{where}: a record uses an XML entity that nothing declares; {_AGAIN}")
    return "".join(element.itertext())


def _child(element: etree._Element | None, tag: str) -> etree._Element | None:
    return None if element is None else next(element.iterchildren(tag), None)


def _texts(element: etree._Element | None, tag: str) -> tuple[str, ...]:
    return () if element is None else tuple((child.text or "").strip() for child in element.iterchildren(tag))


def _number(text: str | None, largest: int) -> int | None:
    """A positive decimal number up to `largest`, or None."""
    text = (text or "").strip()
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else 0
    return value if 0 < value <= largest else None
