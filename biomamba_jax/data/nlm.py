"""NLM's PubmedArticleSet XML as a stream of records; one that is not an article has a named reason.

Avoids known bugs of PubMed parsers: an element's text is all of its text (`itertext`, so that <i>, <sub> and MathML
survive); the abstract is MedlineCitation/Article/Abstract/AbstractText and nothing else; labels of structured abstracts
are kept. Memory is bounded since every record is cleared once it is read.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from lxml import etree

from biomamba_jax.data.records import Article, Deletion, NotAnArticle
from biomamba_jax.data.text import clean_line, clean_markup, clean_title, html_entities
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_chunks, uncompressed_name

_SET = "PubmedArticleSet"
_RECORDS = ("PubmedArticle", "PubmedBookArticle")
_KNOWN = (*_RECORDS, "DeleteCitation")
_NO_LABEL = {"", "UNLABELLED", "UNLABELED"}
_YEAR = re.compile(r"\b(1[5-9]|20)\d\d\b")
_PUBLIC = {"pubmed", "entrez", "epublish", "ppublish", "aheadofprint", "ecollection"}  # not "received"
_MONTHS = {name: number for number, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split(), 1)}
_MONTHS |= {form: number for number in range(1, 13) for form in (f"{number}", f"{number:02d}")}
_DAYS = {form: number for number in range(1, 32) for form in (f"{number}", f"{number:02d}")}
_MAX_PMID, _MAX_VERSION = 2**32 - 1, 2**16 - 1
_CHUNK_BYTES = 1 << 16
_NOTHING = etree.Element("nothing")
_SECOND_DOCUMENT = (etree.ErrorTypes.ERR_DOCUMENT_END, etree.ErrorTypes.ERR_RESERVED_XML_NAME)
_AGAIN = "download it again, or leave it out of --input"


def read_articles(path: str | Path) -> Iterator[Article | Deletion | NotAnArticle]:
    """Yield the records of an .xml file, plain or compressed, in order.

    Raises:
      UserError: the file is truncated, is not well-formed, declares or uses XML entities, or is not a PubmedArticleSet
        (a lone PubmedArticle or PubmedBookArticle counts as one); names the file and the last good record.
    """
    _check_head(path)
    last = "before the first record"
    parser = etree.XMLPullParser(events=("end",), tag=_KNOWN, **_SAFE)
    try:
        for element in _elements(path, parser):
            parent = element.getparent()
            if parent is not None and parent.getparent() is not None:
                continue  # part of a record
            yield from _foreign_elements(element.itersiblings(preceding=True))
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
        raise _not_well_formed(path, last, error) from None
    if root.tag == _SET:
        yield from _foreign_elements(root)


def _not_well_formed(path: str | Path, where: str, error: etree.XMLSyntaxError) -> UserError:
    joined = error.code in _SECOND_DOCUMENT
    remedy = "it may be several documents one after another; give each a file of its own" if joined else _AGAIN
    return UserError(f"{path}: not well-formed XML, {where}: {clean_line(error.msg)}; {remedy}")


def find_records(path: str | Path, pmids: Collection[int]) -> dict[int, str]:
    """Return the XML of title and abstract of the last record of each of `pmids`, to show it.

    Raises:
      UserError: the file is not NLM's XML.
    """
    if not uncompressed_name(path).lower().endswith(".xml"):
        raise UserError(f"{path}: is not XML; --input of inspect takes the NLM files that the shards were made from")
    found: dict[int, str] = {}
    _check_head(path)
    parser = etree.XMLPullParser(events=("end",), tag="PubmedArticle", **_SAFE)
    try:
        for element in _elements(path, parser):
            pmid = _number(element.find("MedlineCitation/PMID"), _MAX_PMID)
            if pmid is not None and pmid in pmids:
                parts = (element.find(f"MedlineCitation/Article/{tag}") for tag in ("ArticleTitle", "Abstract"))
                found[pmid] = "\n".join(
                    etree.tostring(part, encoding="unicode", with_tail=False) for part in parts if part is not None
                )
            element.clear()
        parser.close()
    except etree.XMLSyntaxError as error:
        raise _not_well_formed(path, "of which some records are shown", error) from None
    return found


def _elements(path: str | Path, parser: etree.XMLPullParser) -> Iterator[etree._Element]:
    for chunk in read_chunks(path, _CHUNK_BYTES):
        parser.feed(chunk)
        for _, element in parser.read_events():
            yield element


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
    """Raise UserError if the root is not an article set or the DOCTYPE declares entities.

    So entity bombs are refused before the first record is parsed, at the cost of reading some hundred bytes twice.
    """
    parser = etree.XMLPullParser(events=("start",), **_SAFE)
    error: etree.XMLSyntaxError | None = None
    for chunk in read_chunks(path, 1024):
        try:
            parser.feed(chunk)
        except etree.XMLSyntaxError as caught:
            error = caught  # libxml2 also stops entity bombs; the DOCTYPE, if parsed, tells
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


def _foreign_elements(elements: Iterable[etree._Element]) -> Iterator[NotAnArticle]:
    """Yield a record for each element that PubmedArticleSet does not have, which the parser's tag filter skips."""
    for element in elements:
        if element.tag not in _KNOWN:
            yield NotAnArticle("unknown_element")


def _read_record(element: etree._Element, where: str) -> Iterator[Article | Deletion | NotAnArticle]:
    if element.tag == "DeleteCitation":
        for child in element.iterchildren("PMID"):
            pmid = _number(child, _MAX_PMID)
            yield NotAnArticle("no_pmid") if pmid is None else Deletion(pmid)
    elif element.tag == "PubmedBookArticle":
        yield NotAnArticle("book_article")
    else:
        yield _read_article(element, where)


def _read_article(element: etree._Element, where: str) -> Article | NotAnArticle:
    identifier = element.find("MedlineCitation/PMID")
    pmid, version = _number(identifier, _MAX_PMID), _number(identifier, _MAX_VERSION, "Version")
    if pmid is None or version is None:
        return NotAnArticle("no_pmid")
    article = element.find("MedlineCitation/Article")
    article = _NOTHING if article is None else article
    title = _text(article.find("ArticleTitle"), where)
    parts = [(part.get("Label", ""), _text(part, where)) for part in article.iterfind("Abstract/AbstractText")]
    issue_date = article.find("Journal/JournalIssue/PubDate")
    year = _year(issue_date)
    return Article(
        pmid=pmid,
        version=version,
        title=clean_title(title),
        abstract=_abstract(parts),
        languages=_texts(article, "Language"),
        publication_types=_texts(article, "PublicationTypeList/PublicationType"),
        year=year,
        date=_first_day(element, issue_date) or (year * 10_000 + 101 if year else None),
        pmcid=_pmcid(element),
        html_entities=html_entities(title) + sum(html_entities(text) for _, text in parts),
    )


def _abstract(parts: list[tuple[str, str]]) -> str:
    """Return clean paragraphs as lines, each after its label."""
    paragraphs = []
    for label, text in parts:
        text, label = clean_markup(text), clean_markup(label).rstrip(": ")
        if text:
            paragraphs.append(text if label.upper() in _NO_LABEL else f"{label}: {text}")
    return "\n".join(paragraphs)


def _pmcid(element: etree._Element) -> str | None:
    """Return the article's own PMCID; those of its references are nested deeper."""
    identifiers = element.iterfind("PubmedData/ArticleIdList/ArticleId")
    own = [child.text or "" for child in identifiers if child.get("IdType") == "pmc"]
    return own[0].strip() or None if own else None


def _first_day(element: etree._Element, issue_date: etree._Element | None) -> int | None:
    """Return the earliest date on which the article was public, YYYYMMDD, ignoring dates without a month."""
    history = element.iterfind("PubmedData/History/PubMedPubDate")
    public = (date for date in history if date.get("PubStatus") in _PUBLIC)
    days = map(_day, (issue_date, *element.iterfind("MedlineCitation/Article/ArticleDate"), *public))
    return min((day for day in days if day is not None), default=None)


def _day(date: etree._Element | None) -> int | None:
    """Return YYYYMMDD of an element with Year, Month (a number or an English name) and, optionally, Day."""
    if date is None:
        return None
    parts = {child.tag: (child.text or "").strip() for child in date}
    year, month = parts.get("Year", ""), _MONTHS.get(parts.get("Month", "")[:3].lower())
    if month is None or len(year) != 4 or not (year.isascii() and year.isdigit()):
        return None
    return int(year) * 10_000 + month * 100 + _DAYS.get(parts.get("Day", ""), 1)


def _year(date: etree._Element | None) -> int | None:
    """Return the year of a PubDate, from Year or a MedlineDate such as `1978 Jul-Aug` or `Winter 1998-1999`."""
    stated = None if date is None else date.findtext("Year", date.findtext("MedlineDate"))
    match = _YEAR.search(stated or "")
    return int(match[0]) if match else None


def _text(element: etree._Element | None, where: str) -> str:
    """Return all text of the element and its descendants, tails included."""
    if element is None or not len(element):
        return "" if element is None else element.text or ""
    if next(element.iter(etree.Entity), None) is not None:
        raise UserError(f"{where}: a record uses an XML entity that nothing declares; {_AGAIN}")
    return "".join(element.itertext())


def _texts(element: etree._Element, path: str) -> tuple[str, ...]:
    return tuple((child.text or "").strip() for child in element.iterfind(path))


def _number(element: etree._Element | None, largest: int, attribute: str | None = None) -> int | None:
    """Return an element's text, or an attribute (1 if missing), if it is a whole number from 1 to `largest`."""
    if element is None:
        return None
    text = ((element.get(attribute, "1") if attribute else element.text) or "").strip()
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else 0
    return value if 0 < value <= largest else None
