"""The two whole NLM files of the sample, record by record against another XML library's plain reading of them."""

import gzip
import unicodedata
from collections import Counter
from xml.etree import ElementTree

import pytest

from biomamba_jax.config import PrepareConfig
from biomamba_jax.data.build import FileTask, spool_file
from biomamba_jax.data.nlm import Article, Deletion, read_articles
from biomamba_jax.data.records import CODE, DELETION, KEPT
from biomamba_jax.data.resolve import resolve
from biomamba_jax.data.sample import nlm_sample
from biomamba_jax.data.text import remaining_markup
from biomamba_jax.errors import UserError


@pytest.fixture(scope="module")
def files():
    try:
        return nlm_sample()
    except UserError as error:
        # Without pip or an index there is no sample; an index that has other versions of it says that the pin is wrong.
        if not any(sign in str(error) for sign in ("from versions: none", "No module named pip")):
            raise
        pytest.skip(str(error))


def plain_records(path):
    """(PMID, paragraphs as (label, text)) of each record as the other library has them, and ("deleted", PMID)."""
    with gzip.open(path) as file:
        depth = 0
        for event, element in ElementTree.iterparse(file, ("start", "end")):
            depth += 1 if event == "start" else -1
            if event == "start" or depth != 1:
                continue
            if element.tag == "DeleteCitation":
                yield from (("deleted", int(pmid.text)) for pmid in element.findall("PMID"))
            else:
                parts = element.findall("MedlineCitation/Article/Abstract/AbstractText")
                texts = [(part.get("Label", ""), "".join(part.itertext())) for part in parts]
                yield int(element.findtext("MedlineCitation/PMID")), texts
            element.clear()


def line(label: str, text: str) -> str:
    text, label = (" ".join(unicodedata.normalize("NFC", part).split()) for part in (text, label))
    label = label.rstrip(": ")  # publishers write some colons into the label
    return text if label.upper() in ("", "UNLABELLED") else f"{label}: {text}"


@pytest.mark.long
def test_every_abstract_is_read_as_it_stands_without_markup_or_entities_left(files):
    totals: Counter[str] = Counter()
    for path in files:
        for ours, (pmid, texts) in zip(read_articles(path), plain_records(path), strict=True):
            if pmid == "deleted":
                assert ours == Deletion(texts)
                totals["deletions"] += 1
                continue
            assert isinstance(ours, Article) and ours.pmid == pmid
            totals["records"] += 1
            totals["abstracts"] += bool(ours.abstract)
            totals["labels"] += sum(label.upper() not in ("", "UNLABELLED") for label, text in texts if text.strip())
            assert remaining_markup(ours.text) == (False, False)
            assert unicodedata.is_normalized("NFC", ours.text)
            if any(sign in text for _, text in texts for sign in "&<"):
                totals["escaped"] += 1  # what was escaped twice is text for the other library
                continue
            assert ours.abstract.split("\n") == ([line(*part) for part in texts if part[1].strip()] or [""])
    assert totals["records"] == 50_788
    assert totals["abstracts"] == 33_277
    assert totals["deletions"] == 20
    assert totals["escaped"] < 0.15 * totals["abstracts"]
    assert totals["labels"] > 10_000


@pytest.mark.long
def test_versions_are_resolved_and_every_abstract_is_accounted_for(files, tmp_path):
    spools = [spool_file(FileTask(path, tmp_path, PrepareConfig())) for path in files]
    indexes = [each.load_index() for each in spools]
    status = resolve([each.load_index for each in spools])
    counts = Counter(code for part in status for code in part.tolist())
    names = {code: reason for reason, code in CODE.items()} | {KEPT: "kept", DELETION: "deletions"}
    found = {names[code]: number for code, number in counts.items()}
    assert found.pop("deletions") == 20
    assert found.pop("no_abstract") == 50_788 - 33_277
    assert found == {"kept": 33_239, "too_short": 6, "retracted": 5, "superseded": 5, "duplicate_text": 22}
    kept = [int(row["pmid"]) for index, part in zip(indexes, status, strict=True) for row in index[part == KEPT]]
    assert len(set(kept)) == len(kept)
    versions: dict[int, list[tuple[int, int]]] = {}
    for index, part in zip(indexes, status, strict=True):
        for row, code in zip(index, part, strict=True):
            if code in (KEPT, CODE["superseded"]):
                versions.setdefault(int(row["pmid"]), []).append((int(row["version"]), int(code)))
    several = [sorted(each) for each in versions.values() if len(each) > 1]
    assert several
    assert all(each[-1][1] == KEPT and all(code != KEPT for _, code in each[:-1]) for each in several)
