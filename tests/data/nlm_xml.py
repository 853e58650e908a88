"""Small pieces of NLM XML for the tests of reading and preparing it."""

import gzip
from pathlib import Path

DOCTYPE = '<!DOCTYPE PubmedArticleSet PUBLIC "-//NLM//DTD PubMedArticle//EN" "https://nowhere.invalid/pubmed.dtd">'
LONG = "An abstract that is certainly longer than the fifty characters that are asked for"


def article(
    pmid: object = 1,
    abstract: str = f"<AbstractText>{LONG}.</AbstractText>",
    *,
    title: str = "A title.",
    version: object = 1,
    extra: str = "",
    date: str = "<Year>1999</Year>",
    publication_type: str = "Journal Article",
    language: str = "eng",
    data: str = "",
) -> str:
    """One PubmedArticle; `abstract` is the content of Abstract, `extra` follows the Article, `data` is PubmedData's."""
    pubmed_data = f"<PubmedData>{data}</PubmedData>" if data else ""
    return (
        f'<PubmedArticle><MedlineCitation><PMID Version="{version}">{pmid}</PMID><Article>'
        f"<Journal><JournalIssue><PubDate>{date}</PubDate></JournalIssue><Title>A Journal</Title></Journal>"
        f"<ArticleTitle>{title}</ArticleTitle><Abstract>{abstract}</Abstract><Language>{language}</Language>"
        f"<PublicationTypeList><PublicationType>{publication_type}</PublicationType></PublicationTypeList>"
        f"</Article>{extra}</MedlineCitation>{pubmed_data}</PubmedArticle>\n"
    )


def deletions(*pmids: int) -> str:
    """A DeleteCitation."""
    return "<DeleteCitation>" + "".join(f'<PMID Version="1">{pmid}</PMID>\n' for pmid in pmids) + "</DeleteCitation>"


def write_set(path: Path, *records: str, doctype: str = DOCTYPE) -> Path:
    """A PubmedArticleSet file, gzip if its name says so."""
    text = (
        f'<?xml version="1.0" encoding="utf-8"?>\n{doctype}\n<PubmedArticleSet>\n{"".join(records)}</PubmedArticleSet>'
    )
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
