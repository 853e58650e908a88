"""Thousands of mutated records through all of `prepare`: whole shards with every record counted, or one clear line."""

import copy
import random
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import hypothesis
import pytest
from corpora import SMALL, abstract, make_shards
from hypothesis import strategies as st
from nlm_xml import article, deletions, write_set

from biomamba_jax.config import PrepareConfig
from biomamba_jax.data.shards import MANIFEST_NAME, open_split
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError

RECORDS = 20  # of a file
STRUCTURED = (
    '<AbstractText Label="AIM">Of <i>TP53</i> &lt; 3 &amp; &amp;lt;p&amp;gt; in a<sub>1</sub>, α &#x3b2;.'
    "</AbstractText>"
    '<AbstractText Label="UNLABELLED">Then <mml:math xmlns:mml="http://www.w3.org/1998/Math/MathML"><mml:mi>x</mml:mi>'
    "</mml:math> was more than it had been before.</AbstractText><CopyrightInformation>©</CopyrightInformation>"
)
DATA = (
    '<History><PubMedPubDate PubStatus="pubmed"><Year>2020</Year><Month>2</Month><Day>30</Day></PubMedPubDate>'
    '</History><ArticleIdList><ArticleId IdType="pmc">PMC1</ArticleId></ArticleIdList>'
)
TEMPLATES = [
    article(7, abstract(1)),
    article(8, STRUCTURED, title="[Über <b>etwas</b>].", version=2, data=DATA),
    article(9, "", title="", date="<MedlineDate>Winter 1998-1999</MedlineDate>"),
    deletions(7, 12),
    "<PubmedBookArticle><BookDocument><PMID>5</PMID></BookDocument></PubmedBookArticle>",
]
NASTY = [
    "",
    "0",
    "-1",
    "7" * 400,
    "\u2028",
    "&nbsp;",
    "<",
    "]]>",
    "\x85",
    "é" * 3,
    "\U0001f9ec",
    "NaN",
    " \n\t ",
    "&#0;",
]
BROKEN = ["<", "&", "&x;", "</PubmedArticle>", "<PubmedArticle>", "\x00", "<!--", "<![CDATA[", "\ufffe", "<?", '"', "é"]


def mutate_tree(root: ElementTree.Element, random_: random.Random) -> None:
    """One element of the record, or its place, is changed; the XML stays well-formed."""
    element = random_.choice(list(root.iter()))
    other = random_.choice(list(root.iter()))
    match random_.randrange(7):
        case 0:
            element.text = random_.choice(NASTY)
        case 1:
            element.tail = random_.choice(NASTY)
        case 2:
            element.attrib = {random_.choice(["Version", "Label", "IdType", "PubStatus"]): random_.choice(NASTY)}
        case 3 if len(element):
            element.remove(random_.choice(list(element)))
        case 4 if len(other) < 30:
            other.append(copy.deepcopy(element))
        case 5 if element is not root:
            element.tag = random_.choice([each.tag for each in root.iter()])
        case _ if len(element) > 1:
            element[:] = random_.sample(list(element), len(element))


def mutated(random_: random.Random) -> str:
    root = ElementTree.fromstring(random_.choice(TEMPLATES))
    for pmid in root.iter("PMID"):
        pmid.text = str(random_.randrange(1, 30))
    for _ in range(random_.randrange(1, 4)):
        mutate_tree(root, random_)
    text = ElementTree.tostring(root, "unicode").translate({0: None, 0xFFFE: None})
    return "".join(c for c in text if c in "\t\n\r" or c >= " ")


def broken(text: str, random_: random.Random) -> str:
    """A few places of the whole file overwritten, cut out or doubled."""
    for _ in range(random_.randrange(1, 3)):
        start = random_.randrange(len(text))
        end = start + random_.randrange(40)
        text = text[:start] + random_.choice([*BROKEN, "", text[start:end] * 2]) + text[end:]
    return text


def expected_records(path: Path) -> int | None:
    """Records and deletions of the file by another XML library; None where it is none or no article set."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError):
        return None
    if root.tag not in ("PubmedArticleSet", "PubmedArticle", "PubmedBookArticle"):
        return None
    elements = list(root) if root.tag == "PubmedArticleSet" else [root]
    return sum(len(e.findall("PMID")) if e.tag == "DeleteCitation" else 1 for e in elements)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    good = write_set(folder / "a.xml", *(article(pmid, abstract(pmid)) for pmid in range(1, 200)))
    make_shards([str(good)], folder / "o", settings=SMALL, workers=1)
    return str(folder / "o" / "tokenizer.model")


def prepared_or_refused(folder: Path, tokenizer: str, seed: int) -> str:
    """What became of one file of mutated records, once it was checked that it was that and nothing in between."""
    random_ = random.Random(seed)
    path, output = folder / f"{seed}.xml", folder / f"{seed}"
    text = write_set(path, *(mutated(random_) for _ in range(RECORDS))).read_text("utf-8")
    if random_.random() < 0.25:
        path.write_text(broken(text, random_), "utf-8", errors="replace")
    settings = PrepareConfig(near_duplicates=0.8, recent_from="2020-01-01")
    try:
        manifest = make_shards([str(path)], output, tokenizer, settings, workers=1)
    except UserError as error:
        assert str(path) in str(error) or "no document is left" in str(error)
        assert "\n" not in str(error)
        assert not output.exists()
        assert not output.with_name(f"{output.name}.partial").exists()
        return "nothing left" if "no document is left" in str(error) else "refused"
    (source,) = manifest.sources
    kept = sum(split.documents for split in manifest.splits.values())
    assert source["records"] == kept + sum(manifest.filters.values())
    assert source["records"] + source["deletions"] == expected_records(path)
    used = load_tokenizer(output / manifest.tokenizer.file)
    for split in manifest.splits:
        _, reader = open_split(output, split)
        for index in range(len(reader)):
            assert len(used.decode(reader[index].ids[:-1]).encode()) == reader[index].num_bytes
    assert (output / MANIFEST_NAME).exists()
    return "prepared"


@pytest.mark.parametrize("files", [50, pytest.param(500, marks=pytest.mark.long)])
def test_files_of_mutated_records_are_prepared_and_counted_or_refused(tokenizer, tmp_path, files):
    outcomes: Counter[str] = Counter()

    @hypothesis.given(st.integers(0, 2**64))
    @hypothesis.settings(max_examples=files, database=None)
    def check(seed: int) -> None:
        outcomes[prepared_or_refused(tmp_path, tokenizer, seed)] += 1

    check()
    assert outcomes.total() >= files
    assert min(outcomes["prepared"], outcomes["refused"]) > files / 20
