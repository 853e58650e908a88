"""Filters of NLM's records, and the split of recent ones: each reason counted, each record judged by what it says."""

import pytest
from corpora import abstract, documents
from nlm_xml import LONG, article, write_set

from biomamba_jax import prepare
from biomamba_jax.config import PrepareConfig
from biomamba_jax.config.prepare import FilterConfig
from biomamba_jax.data.filters import judge
from biomamba_jax.data.nlm import read_articles
from biomamba_jax.data.records import CODE, KEPT
from biomamba_jax.data.shards import Manifest, ShardReader
from biomamba_jax.errors import UserError


def day(status: str, year: int, month: object, day: object = 1) -> str:
    stated = f"<Year>{year}</Year><Month>{month}</Month><Day>{day}</Day>"
    return f'<PubMedPubDate PubStatus="{status}">{stated}</PubMedPubDate>'


def history(*days: str) -> str:
    return f"<History>{''.join(days)}</History>"


@pytest.fixture
def read(tmp_path):
    return lambda *records: list(read_articles(write_set(tmp_path / "a.xml", *records)))


PMC = '<ArticleIdList><ArticleId IdType="pubmed">1</ArticleId><ArticleId IdType="pmc">PMC77</ArticleId></ArticleIdList>'
CITED = (
    "<ReferenceList><Reference><Citation>x</Citation><ArticleIdList>"
    '<ArticleId IdType="pmc">PMC99</ArticleId></ArticleIdList></Reference></ReferenceList>'
)


def test_the_pmcid_is_the_article_s_own_and_not_a_reference_s(read):
    assert [record.pmcid for record in read(article(1, data=PMC + CITED), article(2, data=CITED), article(3))] == [
        "PMC77",
        None,
        None,
    ]


@pytest.mark.parametrize(
    ("stated", "days", "expected"),
    [
        ("<Year>2021</Year>", [day("entrez", 2021, 6, 15), day("pubmed", 2021, 6, 16)], 20210615),
        ("<Year>2021</Year><Month>Feb</Month>", [day("pubmed", 2021, 6, 16)], 20210201),
        ("<Year>2021</Year><Month>02</Month><Day>3</Day>", [day("pubmed", 2021, 1, 30)], 20210130),
        ("<Year>2021</Year>", [day("received", 2019, 1), day("accepted", 2020, 1)], 20210101),
        ("<Year>2021</Year><Season>Winter</Season>", [], 20210101),
        ("<MedlineDate>1978 Jul-Aug</MedlineDate>", [], 19780101),
        ("", [], None),
        ("<Year>2021</Year>", [day("pubmed", 2021, "")], 20210101),
    ],
)
def test_the_date_is_the_first_day_on_which_the_article_was_public(read, stated, days, expected):
    (record,) = read(article(1, date=stated, data=history(*days)))
    assert record.date == expected


def test_an_article_on_line_before_its_issue_is_as_old_as_that(read):
    date = "</Journal><ArticleDate><Year>2019</Year><Month>12</Month><Day>24</Day></ArticleDate><Journal>"
    record = article(1, date="<Year>2020</Year><Month>Mar</Month>").replace("</Journal>", date + "</Journal>", 1)
    assert read(record)[0].date == 20191224


def status(record, filters: FilterConfig) -> int:
    return next(judge([record], filters)).status


@pytest.mark.parametrize(
    ("filters", "reason"),
    [
        (FilterConfig(languages=["fre"]), "language"),
        (FilterConfig(languages=["fre", "eng"]), None),
        (FilterConfig(article_types=["review"]), "article_type"),
        (FilterConfig(article_types=["Review", "journal article"]), None),
        (FilterConfig(exclude_article_types=["Journal Article"]), "article_type"),
        (FilterConfig(first_year=2000), "year"),
        (FilterConfig(first_year=1999, last_year=1999), None),
        (FilterConfig(last_year=1998), "year"),
        (FilterConfig(require_pmcid=True), "no_pmcid"),
        (FilterConfig(min_abstract_characters=500), "too_short"),
    ],
)
def test_each_filter_leaves_out_under_its_reason(read, filters, reason):
    assert status(read(article(1))[0], filters) == (CODE[reason] if reason else KEPT)


@pytest.mark.parametrize(("least", "reason"), [(len(LONG) + 1, None), (len(LONG) + 2, "too_short")])
def test_a_text_of_just_the_minimum_length_is_kept(read, least, reason):
    filters = FilterConfig(min_abstract_characters=least)
    found = next(judge(read(article(1, f"<AbstractText>{LONG}.</AbstractText>")), filters)).status
    assert found == (CODE[reason] if reason else KEPT)


def test_a_record_without_a_year_is_outside_every_range_of_years(read):
    record = read(article(1, date=""))[0]
    assert status(record, FilterConfig(last_year=3000)) == CODE["year"]
    assert status(record, FilterConfig()) == KEPT


def test_of_several_reasons_the_first_counts(read):
    record = read(article(1, "", publication_type="Retracted Publication"))[0]
    assert status(record, FilterConfig(languages=["fre"])) == CODE["no_abstract"]


@pytest.fixture(scope="module")
def dated(tmp_path_factory):
    """200 records of 2018 to 2025, one a fortnight, in two languages."""
    records = []
    for n in range(200):
        date = day("pubmed", 2018 + n // 25, 1 + n % 25 // 3, 1 + n % 3 * 10)
        records.append(article(n + 1, abstract(n), language="eng" if n % 4 else "ger", data=history(date)))
    return str(write_set(tmp_path_factory.mktemp("dated") / "pubmed26n0001.xml", *records))


def run(dated, output, *options: str) -> Manifest:
    prepare.main(["--input", dated, "--output", str(output), "--train-tokenizer", "300", "--workers=1", *options])
    return Manifest.load(output)


def test_recent_records_are_a_split_of_their_own_whatever_the_others_are(dated, tmp_path):
    manifest = run(dated, tmp_path / "o", "--recent-from", "2024-01-01", "--test-fraction", "0.2")
    assert list(manifest.splits) == ["train", "validation", "test", "recent"]
    recent = ShardReader(tmp_path / "o" / "recent")
    assert sorted(recent[i].pmid for i in range(len(recent))) == list(range(151, 201))
    assert len(documents(tmp_path / "o")) == 200
    before = run(dated, tmp_path / "before", "--test-fraction", "0.2")
    assert before.splits["test"].documents >= manifest.splits["test"].documents > 0


def test_the_command_takes_filters_and_counts_them(dated, tmp_path, capsys):
    options = ["--languages", "eng", "fre", "--last-year=2030", "--exclude-article-types", "Review", "--keep-retracted"]
    manifest = run(dated, tmp_path / "o", *options)
    assert manifest.filters["language"] == 50
    assert manifest.settings["keep_retracted"] is True
    assert manifest.settings["languages"] == ["eng", "fre"]
    assert "language" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["2024", "yesterday", "2024-13-01", "20240101"])
def test_a_date_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="recent_from"):
        PrepareConfig(recent_from=text)
