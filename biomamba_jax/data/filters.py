"""Which records become documents: the reasons to leave one out, and the filters that are judged record by record."""

from dataclasses import dataclass

from biomamba_jax.data.nlm import RETRACTED, Article

KEPT, DELETION = 0, 255
REASONS = {
    "book_article": "book or book chapter, not an article",
    "unknown_element": "element that PubmedArticleSet does not have",
    "no_pmid": "record or deletion without a valid PMID",
    "no_abstract": "no abstract or text",
    "too_short": "abstract or text under the minimum length",
    "retracted": "retracted publication",
    "language": "in none of the languages asked for",
    "article_type": "of a publication type that was not asked for",
    "year": "outside the years asked for, or without a year",
    "no_pmcid": "without a PMCID",
    "evaluation_article": "source article of an evaluation set, by its PMID",
    "evaluation_text": "shares text with an evaluation set",
    "deleted": "taken back by DeleteCitation",
    "superseded": "another version or a later file replaces it",
    "duplicate_text": "same text as an earlier document",
    "near_duplicate": "nearly the same text as an earlier document",
}
"""Why a record may be left out, with what that means; a record has one reason at most, the first that applies."""
CODE = {reason: code for code, reason in enumerate(REASONS, 1)}


@dataclass(frozen=True)
class Filters:
    """Which records can become documents, judged one by one. All but the length are about NLM's records only.

    An empty tuple or None asks for nothing. Languages are NLM's codes (eng), article types its publication types
    ("Randomized Controlled Trial"); years are those of the journal's issue.
    """

    min_abstract_characters: int = 50
    keep_retracted: bool = False
    languages: tuple[str, ...] = ()
    article_types: tuple[str, ...] = ()
    exclude_article_types: tuple[str, ...] = ()
    first_year: int | None = None
    last_year: int | None = None
    require_pmcid: bool = False

    def of_text(self, text: str) -> int:
        """KEPT, or the CODE of the reason why a document of this text is left out."""
        if not text:
            return CODE["no_abstract"]
        return CODE["too_short"] if len(text) < self.min_abstract_characters else KEPT

    def of_article(self, article: Article) -> int:
        """The same of a record of NLM's."""
        types = {name.casefold() for name in article.publication_types}
        if status := self.of_text(article.abstract):
            return status
        if RETRACTED.casefold() in types and not self.keep_retracted:
            return CODE["retracted"]
        if self.languages and not set(self.languages) & set(article.languages):
            return CODE["language"]
        if types & _folded(self.exclude_article_types) or (
            self.article_types and not types & _folded(self.article_types)
        ):
            return CODE["article_type"]
        if not self._year_fits(article.year):
            return CODE["year"]
        return CODE["no_pmcid"] if self.require_pmcid and article.pmcid is None else KEPT

    def _year_fits(self, year: int | None) -> bool:
        if self.first_year is None and self.last_year is None:
            return True
        return year is not None and (self.first_year or 0) <= year <= (self.last_year or year)


def _folded(names: tuple[str, ...]) -> set[str]:
    return {name.casefold() for name in names}
