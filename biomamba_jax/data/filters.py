"""Filters on single records: which become candidates for documents, and why the others do not."""

from collections.abc import Iterable, Iterator, Sequence

from biomamba_jax.config.prepare import FilterConfig
from biomamba_jax.data.records import CODE, DELETION, KEPT, Article, Candidate, Deletion, NotAnArticle, Record

RETRACTED = "Retracted Publication"


def judge(records: Iterable[Record], filters: FilterConfig) -> Iterator[Candidate]:
    """Yield each record with its status: kept, a deletion, or the first reason to leave it out."""
    for record in records:
        if isinstance(record, NotAnArticle):
            yield Candidate(CODE[record.reason])
        elif isinstance(record, Deletion):
            yield Candidate(DELETION, pmid=record.pmid)
        elif isinstance(record, Article):
            status = _of_article(record, filters)
            text = record.text if status == KEPT else ""
            yield Candidate(status, text, record.pmid, record.version, record.date or 0, record.html_entities)
        else:
            status = _of_text(record.text, filters)
            text = f"{record.title}\n{record.text}".lstrip("\n") if status == KEPT else ""
            yield Candidate(status, text, record.pmid, 1 if record.pmid else 0, id=record.id)


def _of_text(text: str, filters: FilterConfig) -> int:
    if not text:
        return CODE["no_abstract"]
    return CODE["too_short"] if len(text) < filters.min_abstract_characters else KEPT


def _of_article(article: Article, filters: FilterConfig) -> int:
    types = _folded(article.publication_types)
    wanted, unwanted = _folded(filters.article_types), _folded(filters.exclude_article_types)
    if status := _of_text(article.abstract, filters):
        return status
    if RETRACTED.casefold() in types and not filters.keep_retracted:
        return CODE["retracted"]
    if filters.languages and not set(filters.languages) & set(article.languages):
        return CODE["language"]
    if types & unwanted or (wanted and not types & wanted):
        return CODE["article_type"]
    first, last = filters.first_year, filters.last_year
    if (first, last) != (None, None) and not (first or 0) <= (article.year or -1) <= (last or article.year or 0):
        return CODE["year"]
    return CODE["no_pmcid"] if filters.require_pmcid and article.pmcid is None else KEPT


def _folded(names: Sequence[str]) -> set[str]:
    return {name.casefold() for name in names}
