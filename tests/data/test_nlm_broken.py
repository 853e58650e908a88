"""Broken, hostile and mutated NLM files: one clear line that names the file, or every record accounted for."""

import gzip
import hashlib
import random
import re
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st
from nlm_xml import article, deletions, write_set

from biomamba_jax.data.input_files import checksums
from biomamba_jax.data.nlm import Article, read_articles
from biomamba_jax.errors import UserError

BOMB = "".join(f'<!ENTITY x{i} "{f"&x{i - 1};" * 10 if i else "lol" * 10}">' for i in range(12))


def refusal(path: Path) -> str:
    """The message with which the file is refused, after a check that it is one line that names the file."""
    with pytest.raises(UserError) as caught:
        list(read_articles(path))
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_truncated_gzip_is_refused(tmp_path):
    path = write_set(tmp_path / "a.xml.gz", *(article(pmid) for pmid in range(1, 400)))
    path.write_bytes(path.read_bytes()[:-9])
    assert "truncated or damaged gzip" in refusal(path)


def test_a_flipped_bit_in_a_gzip_is_refused(tmp_path):
    path = write_set(tmp_path / "a.xml.gz", *(article(pmid) for pmid in range(1, 400)))
    data = bytearray(path.read_bytes())
    data[-8] ^= 1  # the stored checksum: the text itself reads well
    path.write_bytes(data)
    assert "truncated or damaged gzip" in refusal(path)


def test_text_under_a_gzip_name_is_refused(tmp_path):
    path = tmp_path / "a.xml.gz"
    path.write_bytes(write_set(tmp_path / "a.xml", article()).read_bytes())
    assert "gzip" in refusal(path)


def test_a_wrong_md5_is_refused_and_a_right_one_is_not(tmp_path):
    path = write_set(tmp_path / "pubmed26n0001.xml.gz", article())
    sidecar = Path(f"{path}.md5")
    sidecar.write_text(f"MD5(pubmed26n0001.xml.gz)= {hashlib.md5(path.read_bytes()).hexdigest()}\n")
    assert checksums(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    sidecar.write_text(f"MD5(pubmed26n0001.xml.gz)= {'0' * 32}\n")
    with pytest.raises(UserError, match=rf"{path}: its MD5 is .*download it again"):
        checksums(path)
    sidecar.write_text("<html>404</html>")
    with pytest.raises(UserError, match="holds no MD5"):
        checksums(path)


def test_malformed_xml_names_the_record_before_and_the_line(tmp_path):
    filler = "<AbstractText>" + "word " * 40_000 + "</AbstractText>"
    path = write_set(tmp_path / "a.xml", article(41, filler), article(42, filler), "<PubmedArticle></wrong>")
    message = refusal(path)
    assert "after the record with PMID 4" in message
    assert re.search(r"line \d+", message)


@pytest.mark.parametrize("second", ['<?xml version="1.0"?>\n<PubmedArticleSet/>', "<PubmedArticleSet/>"])
def test_two_results_in_one_file_are_told_apart_from_damage(tmp_path, second):
    path = write_set(tmp_path / "a.xml", article(41))
    path.write_text(path.read_text() + second)
    message = refusal(path)
    assert "give each a file of its own" in message and "download" not in message


def test_the_malformed_sample_is_refused(shared_data):
    refusal(shared_data / "pubmed_xml" / "malformed.xml")


@pytest.mark.parametrize("text", ["", "plain text", "<PubmedArticleSet><PubmedArticle>", "\x00\x01"])
def test_what_is_no_xml_document_is_refused(tmp_path, text):
    path = tmp_path / "a.xml"
    path.write_text(text)
    assert "not well-formed" in refusal(path)


def test_another_kind_of_xml_is_refused(tmp_path):
    path = tmp_path / "a.xml"
    path.write_text("<html><body>404</body></html>")
    assert "<html>" in refusal(path)


def test_a_missing_file_is_refused(tmp_path):
    assert "cannot be read" in refusal(tmp_path / "none.xml")


@pytest.mark.parametrize("use", ["<AbstractText>&x11;</AbstractText>", '<AbstractText Label="&x11;">a</AbstractText>'])
def test_an_entity_bomb_is_refused_within_half_a_gibibyte(tmp_path, use):
    path = write_set(tmp_path / "a.xml", article(1, use), doctype=f"<!DOCTYPE PubmedArticleSet [{BOMB}]>")
    assert "entities" in refusal(path)
    code = (
        "import resource, sys\nfrom biomamba_jax.data.nlm import read_articles, UserError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 29, 1 << 29))\n"
        "try: list(read_articles(sys.argv[1]))\n"
        "except UserError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "refused\n"


def test_a_parameter_entity_or_an_external_one_is_refused(tmp_path):
    for declaration in ('<!ENTITY % p "x">', '<!ENTITY p SYSTEM "file:///etc/passwd">'):
        path = write_set(tmp_path / "a.xml", article(), doctype=f"<!DOCTYPE PubmedArticleSet [{declaration}]>")
        assert "declares XML entities" in refusal(path)


def test_an_entity_that_nothing_declares_is_refused_not_dropped(tmp_path):
    path = write_set(tmp_path / "a.xml", article(31), article(32, "<AbstractText>a &eacute; b</AbstractText>"))
    message = refusal(path)
    assert "nothing declares" in message
    assert "after the record with PMID 31" in message


FRAGMENTS = [
    "<PubmedArticle>",
    "</PubmedArticle>",
    "<PMID>",
    "&lt;",
    "&x;",
    "<!--",
    "]]>",
    "\x00",
    "é",
    '"',
    "<",
    ">",
    "<?",
]


@st.composite
def mutations(draw) -> bytes:
    """A well-formed set with a few places cut, doubled or overwritten."""
    records = [article(pmid, version=pmid % 3 or 1) for pmid in range(1, 6)]
    book = "<PubmedBookArticle><BookDocument/></PubmedBookArticle>"
    data = "<PubmedArticleSet>" + "".join(records) + book + deletions(2, 9) + "</PubmedArticleSet>"
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 60)))
        new = draw(st.sampled_from(["", data[start:end] * 2, *FRAGMENTS]) | st.text(max_size=5))
        data = data[:start] + new + data[end:]
    return data.encode("utf-8", "replace")


def account(path: Path) -> None:
    """Reads the file: it is refused in one line, or every top-level record is there."""
    from lxml import etree

    try:
        records = list(read_articles(path))
    except UserError as error:
        assert str(path) in str(error)
        return
    root = etree.parse(
        str(path), etree.XMLParser(resolve_entities=False, remove_comments=True, remove_pis=True)
    ).getroot()
    elements = list(root) if root.tag == "PubmedArticleSet" else [root]
    expected = sum(len(e.findall("PMID")) if e.tag == "DeleteCitation" else 1 for e in elements)
    assert len(records) == expected
    assert len({r.pmid for r in records if isinstance(r, Article)}) <= expected


@hypothesis.given(mutations())
@hypothesis.settings(max_examples=400, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_a_mutated_file_is_refused_or_accounted_for_record_by_record(tmp_path, data):
    path = tmp_path / "a.xml"
    path.write_bytes(data)
    account(path)


def test_mutated_bytes_of_a_real_file_are_refused_or_accounted_for(shared_data, tmp_path):
    raw = gzip.decompress((shared_data / "pubmed_xml" / "pubmed21n1000.xml.gz").read_bytes())
    path = tmp_path / "a.xml"
    random_ = random.Random(0)
    for _ in range(150):
        data = bytearray(raw)
        for _ in range(random_.randint(1, 3)):
            data[random_.randrange(len(data))] = random_.choice(b"<>&\"'/a \xff\x00")
        path.write_bytes(data)
        account(path)
