"""NLM's XML becomes articles: each rule of reading it, one test."""

import gzip
import html
import unicodedata
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from nlm_xml import LONG, article, deletions, write_set

from biomamba_jax.data.nlm import Article, Deletion, NotAnArticle, read_articles


@pytest.fixture
def read(tmp_path):
    """Reads records that are given as XML text."""
    return lambda *records: list(read_articles(write_set(tmp_path / "a.xml", *records)))


def abstract_of(read, content: str) -> str:
    (record,) = read(article(1, content))
    return record.abstract


def title_of(read, title: str) -> str:
    (record,) = read(article(1, title=title))
    return record.title


def test_an_article_has_its_identity_language_types_and_year(read):
    (record,) = read(article(12345678, version=2, publication_type="Review"))
    assert record == Article(12345678, 2, "A title.", LONG + ".", ("eng",), ("Review",), 1999, 19990101)


def test_text_inside_and_after_inline_markup_is_kept(read):
    content = "<AbstractText>H<sub>2</sub>O and <i>E. <b>coli</b></i> at 10<sup>-3</sup> M</AbstractText>"
    assert abstract_of(read, content) == "H2O and E. coli at 10-3 M"


def test_mathml_keeps_its_letters(read):
    namespace = 'xmlns:mml="http://www.w3.org/1998/Math/MathML"'
    mathml = f"<mml:math {namespace}>\n  <mml:mi>α</mml:mi>\n  <mml:mo>≥</mml:mo>\n</mml:math>"
    assert abstract_of(read, f"<AbstractText>Where {mathml} holds</AbstractText>") == "Where α ≥ holds"


def test_comments_and_processing_instructions_do_not_split_or_enter_a_text(read):
    assert abstract_of(read, "<AbstractText>one<!-- no --> two<?no no?> three</AbstractText>") == "one two three"


def test_other_abstracts_and_copyright_are_not_the_abstract(read):
    (record,) = read(
        article(
            1,
            "<AbstractText>Mine.</AbstractText><CopyrightInformation>(c) P</CopyrightInformation>",
            extra='<OtherAbstract Language="fre"><AbstractText>Le mien.</AbstractText></OtherAbstract>',
        )
    )
    assert record.abstract == "Mine."


def test_labels_of_a_structured_abstract_are_printed_each_on_its_line(read):
    content = '<AbstractText Label="AIM">To see.</AbstractText><AbstractText Label="RESULTS:">Seen.</AbstractText>'
    assert abstract_of(read, content) == "AIM: To see.\nRESULTS: Seen."


@pytest.mark.parametrize("label", ["", "UNLABELLED", "Unlabelled"])
def test_an_empty_label_prints_nothing(read, label):
    assert abstract_of(read, f'<AbstractText Label="{label}">Seen.</AbstractText>') == "Seen."


def test_an_empty_section_leaves_no_label_behind(read):
    assert abstract_of(read, '<AbstractText Label="AIM"/><AbstractText>Seen.</AbstractText>') == "Seen."


def test_abstract_texts_without_labels_are_paragraphs(read):
    assert abstract_of(read, "<AbstractText>One.</AbstractText><AbstractText>Two.</AbstractText>") == "One.\nTwo."


def test_white_space_collapses_inside_each_abstract_text(read):
    assert abstract_of(read, "<AbstractText>\n  one\n\ttwo   three </AbstractText>") == "one two three"


@pytest.mark.parametrize("space", ["\u00a0", "\u2009", "\u202f"])
def test_special_spaces_become_spaces(read, space):
    assert abstract_of(read, f"<AbstractText>p{space}={space}1</AbstractText>") == "p = 1"


def test_text_is_nfc(read):
    assert abstract_of(read, "<AbstractText>cafe\u0301 \u212b</AbstractText>") == "caf\u00e9 \u00c5"


@pytest.mark.parametrize(
    ("escaped", "expected"),
    [
        ("P&amp;lt;0.05", "P<0.05"),
        ("a &amp;gt; b", "a > b"),
        ("R&amp;amp;D", "R&D"),
        ("&amp;#945;-helix &amp;#x3b1;", "α-helix α"),
        ("P&lt;0.05 &amp; Q&gt;1", "P<0.05 & Q>1"),
        ("&amp;amp;lt;", "<"),
        ("x&amp;copy;y&amp;nbsp;z &amp;rsquo;", "x©y z ’"),
        ("AT&amp;T; &amp;notit; R&amp;D", "AT&T; &notit; R&D"),
    ],
)
def test_entities_that_were_escaped_again_are_unescaped_and_what_only_looks_like_one_is_not(read, escaped, expected):
    assert abstract_of(read, f"<AbstractText>{escaped}</AbstractText>") == expected


def test_tags_that_arrive_as_escaped_text_are_dropped_but_comparisons_are_not(read):
    content = "<AbstractText>&lt;p&gt;&lt;i&gt;n&lt;/i&gt; = 3&lt;/p&gt; if a&lt;c&gt;d</AbstractText>"
    assert abstract_of(read, content) == "n = 3 if a<c>d"
    comparisons = "if A&lt;b 0.5 and C&gt;D, n&lt;p than q but later r &gt; s"
    assert abstract_of(read, f"<AbstractText>{comparisons}</AbstractText>") == html.unescape(comparisons)


@pytest.mark.parametrize("tag", ["<br>", "<BR />", '<br clear="all"/>', "</p><p>", "</li><li>", "<div>", "</o:p>"])
def test_an_escaped_tag_of_a_block_separates_words_and_one_inside_a_line_does_not(read, tag):
    content = html.escape(f"METHODS{tag}We gave Ca<sup>2+</sup>.")
    assert abstract_of(read, f"<AbstractText>{content}</AbstractText>") == "METHODS We gave Ca2+."


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("[On sleep].", "On sleep."),
        ("[Is it so?]", "Is it so?"),
        ("[Is it so?].", "Is it so?"),
        ("[Of [3H]Raffinose (author's transl)].", "Of [3H]Raffinose (author's transl)."),
        ("[3H]Raffinose, a label.", "[3H]Raffinose, a label."),
        ("[3H] and [14C].", "[3H] and [14C]."),
        ("[Not Available].", ""),
    ],
)
def test_brackets_around_a_translated_title_are_stripped(read, title, expected):
    assert title_of(read, title) == expected


def test_a_title_keeps_its_inline_markup_s_text(read):
    assert title_of(read, "Role of <i>TP53</i> in\n cancer.") == "Role of TP53 in cancer."


def test_the_document_is_title_then_abstract_and_the_abstract_alone_without_a_title(read):
    assert [record.text for record in read(article(1), article(2, title=""))] == [f"A title.\n{LONG}.", f"{LONG}."]


def test_a_record_without_an_abstract_is_an_article_with_an_empty_one(read):
    assert abstract_of(read, "") == ""


@pytest.mark.parametrize(
    ("date", "year"),
    [
        ("<MedlineDate>1978 Jul-Aug</MedlineDate>", 1978),
        ("<MedlineDate>Winter 1998-1999</MedlineDate>", 1998),
        ("<MedlineDate>no date</MedlineDate>", None),
        ("", None),
    ],
)
def test_a_date_may_be_a_medline_date(read, date, year):
    (record,) = read(article(1, date=date))
    assert record.year == year


def test_deletions_come_out_in_place(read):
    assert read(article(7), deletions(5, 6))[1:] == [Deletion(5), Deletion(6)]


@pytest.mark.parametrize("pmid", ["", "abc", "0", "-1", "99999999999", "1.5"])
def test_a_record_without_a_valid_pmid_is_counted(read, pmid):
    assert read(article(pmid)) == [NotAnArticle("no_pmid")]


def test_books_and_foreign_elements_are_counted_wherever_they_stand(read):
    foreign, book = "<Foreign/>", "<PubmedBookArticle><BookDocument><PMID>1</PMID></BookDocument></PubmedBookArticle>"
    reasons = [getattr(r, "reason", None) for r in read(foreign, article(1), foreign, book, article(2), foreign)]
    assert Counter(reasons) == {None: 2, "unknown_element": 3, "book_article": 1}


def test_records_inside_records_are_parts_and_not_records(read):
    assert [
        r.pmid for r in read(article(1, extra=f"<CommentsCorrectionsList>{article(2)}</CommentsCorrectionsList>"))
    ] == [1]


def test_an_empty_set_has_no_records(read):
    assert read() == []


def test_gzip_of_several_members_is_read_to_its_end(tmp_path):
    data = write_set(tmp_path / "a.xml", article(1), article(2)).read_bytes()
    path = tmp_path / "b.xml.gz"
    path.write_bytes(gzip.compress(data[:300]) + gzip.compress(data[300:]))
    assert [record.pmid for record in read_articles(path)] == [1, 2]


def test_every_record_of_the_samples_is_read_or_counted(shared_data: Path):
    """Against a plain reading of each whole file with another XML library, white space and labels aside."""
    totals = Counter()
    for path in sorted((shared_data / "pubmed_xml").glob("*.xml*")):
        if path.name == "malformed.xml":
            continue
        root = ElementTree.fromstring(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
        expected = [root] if root.tag != "PubmedArticleSet" else [r for r in root if r.tag != "DeleteCitation"]
        records = list(read_articles(path))
        assert len([record for record in records if not isinstance(record, Deletion)]) == len(expected)
        deleted = [int(pmid.text) for pmid in root.iterfind("DeleteCitation/PMID")]
        assert [record.pmid for record in records if isinstance(record, Deletion)] == deleted
        for record, element in zip(records, expected, strict=False):
            totals[getattr(record, "reason", "article")] += 1
            if isinstance(record, Article):
                assert str(record.pmid) == element.findtext("MedlineCitation/PMID")
                parts = element.findall("MedlineCitation/Article/Abstract/AbstractText")
                texts = [unicodedata.normalize("NFC", " ".join("".join(part.itertext()).split())) for part in parts]
                ours = record.abstract.split("\n") if record.abstract else []
                for text, line in zip([text for text in texts if text], ours, strict=True):
                    assert line.endswith(text)
    assert totals == {"article": 344, "no_pmid": 1, "book_article": 1}
