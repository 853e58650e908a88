"""NLM's PubmedArticleSet XML as a stream of articles: every record comes out, or is accounted for by a named reason.

The rules are those learnt from the field's bugs: an element's text is all of its text (`itertext`, so that <i>, <sub>
and MathML survive); the abstract is MedlineCitation/Article/Abstract/AbstractText and nothing else; labels of
structured abstracts are printed; memory stays bounded because every record is cleared once it is read.
"""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from lxml import etree

from biomamba_jax.data.records import Article, Deletion, NotAnArticle
from biomamba_jax.data.text import clean_line, clean_markup, clean_title, html_entities
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_chunks

_SET = "PubmedArticleSet"
_RECORDS = ("PubmedArticle", "PubmedBookArticle")
_NO_LABEL = {"", "UNLABELLED", "UNLABELED"}
_YEAR = re.compile(r"\b(1[5-9]|20)\d\d\b")
_PUBLIC = {"pubmed", "entrez", "epublish", "ppublish", "aheadofprint", "ecollection"}  # not "received"
_MONTHS = {name: number for number, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split(), 1)}
_MONTHS |= {form: number for number in range(1, 13) for form in (f"{number}", f"{number:02d}")}
_DAYS = {form: number for number in range(1, 32) for form in (f"{number}", f"{number:02d}")}
_MAX_PMID, _MAX_VERSION = 2**32 - 1, 2**16 - 1
_CHUNK_BYTES = 1 << 16
_AGAIN = "download it again, or leave it out of --input"


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
        raise UserError(f"{path}: not well-formed XML, {last}: {clean_line(error.msg)}; {_AGAIN}") from None
    if root.tag == _SET and len(root):
        yield from (NotAnArticle("unknown_element") for child in root if not _is_known(child))


def find_records(path: str | Path, pmids: Collection[int]) -> dict[int, str]:
    """Title and abstract of the last record of each of `pmids`, in XML as they stand in the file: to look at."""
    found: dict[int, str] = {}
    parser = etree.XMLPullParser(events=("end",), tag="PubmedArticle", **_SAFE)
    _check_head(path)
    for chunk in read_chunks(path, _CHUNK_BYTES):
        parser.feed(chunk)
        for _, element in parser.read_events():
            citation = _child(element, "MedlineCitation")
            identifier = _child(citation, "PMID")
            pmid = None if identifier is None else _number(identifier.text, _MAX_PMID)
            if pmid is not None and pmid in pmids:
                parts = (_child(_child(citation, "Article"), tag) for tag in ("ArticleTitle", "Abstract"))
                found[pmid] = "\n".join(
                    etree.tostring(part, encoding="unicode", with_tail=False) for part in parts if part is not None
                )
            element.clear()
    return found


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
    reason = clean_line(error.msg) if error else "it has no element"
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
    title_element = _child(article, "ArticleTitle")
    title = "" if title_element is None else _text(title_element, where)
    parts = _abstract_parts(_child(article, "Abstract"), where)
    issue_date = _child(_child(_child(article, "Journal"), "JournalIssue"), "PubDate")
    year, data = _year(issue_date), _child(element, "PubmedData")
    return Article(
        pmid=pmid,
        version=version,
        title=clean_title(title),
        abstract=_abstract(parts),
        languages=_texts(article, "Language"),
        publication_types=_texts(_child(article, "PublicationTypeList"), "PublicationType"),
        year=year,
        date=_first_day(article, issue_date, data) or (year * 10_000 + 101 if year else None),
        pmcid=_pmcid(_child(data, "ArticleIdList")),
        html_entities=html_entities(title) + sum(html_entities(text) for _, text in parts),
    )


def _abstract_parts(abstract: etree._Element | None, where: str) -> list[tuple[str, str]]:
    """(label, text) of each AbstractText; CopyrightInformation is none."""
    if abstract is None:
        return []
    return [(part.get("Label", ""), _text(part, where)) for part in abstract.iterchildren("AbstractText")]


def _abstract(parts: list[tuple[str, str]]) -> str:
    """Clean paragraphs as lines, each after its label."""
    paragraphs = []
    for label, text in parts:
        text, label = clean_markup(text), clean_markup(label).rstrip(": ")
        if text:
            paragraphs.append(text if label.upper() in _NO_LABEL else f"{label}: {text}")
    return "\n".join(paragraphs)


def _pmcid(identifiers: etree._Element | None) -> str | None:
    """The article's own identifier; those of its references lie deeper."""
    if identifiers is not None:
        for identifier in identifiers.iterchildren("ArticleId"):
            if identifier.get("IdType") == "pmc":
                return (identifier.text or "").strip() or None
    return None


def _first_day(
    article: etree._Element | None, issue_date: etree._Element | None, data: etree._Element | None
) -> int | None:
    """The earliest of the dates on which the article was public, YYYYMMDD, those without a month left aside."""
    days = [_day(issue_date)]
    if article is not None:
        days += map(_day, article.iterchildren("ArticleDate"))
    history = _child(data, "History")
    if history is not None:
        days += [_day(date) for date in history.iterchildren("PubMedPubDate") if date.get("PubStatus") in _PUBLIC]
    return min((day for day in days if day is not None), default=None)


def _day(date: etree._Element | None) -> int | None:
    """YYYYMMDD of an element with Year, Month (a number or an English name) and, if it likes, Day."""
    if date is None:
        return None
    parts = {child.tag: (child.text or "").strip() for child in date}
    year, month = parts.get("Year", ""), _MONTHS.get(parts.get("Month", "")[:3].lower())
    if month is None or len(year) != 4 or not (year.isascii() and year.isdigit()):
        return None
    return int(year) * 10_000 + month * 100 + _DAYS.get(parts.get("Day", ""), 1)


def _year(date: etree._Element | None) -> int | None:
    """Of a PubDate: it has Year, or MedlineDate such as `1978 Jul-Aug` or `Winter 1998-1999`."""
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
