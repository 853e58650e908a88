"""General text in the forms in which it is published: the same documents whatever the container and its compression."""

import bz2
import csv
import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pytest
from nlm_xml import LONG, article, write_set
from pyarrow import parquet

from biomamba_jax.config.prepare import FilterConfig, TextFields
from biomamba_jax.data import hub_dataset
from biomamba_jax.data.filters import judge
from biomamba_jax.data.readers import files_in, read_records
from biomamba_jax.data.records import CODE, KEPT
from biomamba_jax.data.wikipedia import prose
from biomamba_jax.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TEXTS = [f"{LONG} {word}." for word in ("one", "two, with α", "three")]
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd.compress}


def candidates(path: Path, **fields: str):
    return list(judge(read_records(path, TextFields(**fields)), FilterConfig()))


def texts_of(path: Path) -> list[str]:
    return [record.text for record in candidates(path) if record.status == KEPT]


def lines(*records: dict) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


CONTENT = {
    "a.jsonl": lines(*({"text": text, "id": 1} for text in TEXTS)),
    "c4-train.00000-of-01024.json": lines(
        *({"text": t, "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for t in TEXTS)
    ),
    "a.txt": "\n\n".join(TEXTS).encode(),
}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("name", CONTENT)
def test_text_is_the_same_whatever_it_is_packed_in(tmp_path, name, suffix):
    path = tmp_path / (name + suffix)
    path.write_bytes(PACK[suffix](CONTENT[name]))
    assert texts_of(path) == TEXTS


@pytest.mark.parametrize("log", [27, 28, 31])
def test_zstd_may_look_back_as_far_as_its_format_allows(tmp_path, log):
    packer = zstd.ZstdCompressor()  # in two steps, so that the frame states a window and not its size
    packed = bytearray(packer.compress(CONTENT["a.jsonl"]) + packer.flush())
    assert not packed[4] & 0x20
    packed[5] = log - 10 << 3  # the window's descriptor
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert texts_of(tmp_path / "a.jsonl.zst") == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "another format"])
def test_a_damaged_file_is_named_and_never_read_in_part(tmp_path, suffix, damage):
    packed = PACK[suffix](lines(*({"text": text * 50} for text in TEXTS)))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed[:-3] if damage == "truncated" else b"plain text")
    with pytest.raises(UserError, match=r"a\.jsonl"):
        texts_of(path)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".zst"])
def test_an_empty_file_is_no_packed_one(tmp_path, suffix):
    (tmp_path / f"a.jsonl{suffix}").touch()
    with pytest.raises(UserError, match="truncated or damaged"):
        texts_of(tmp_path / f"a.jsonl{suffix}")


@pytest.mark.parametrize("pmid", ["Infinity", "3.9", "true", "-1", '"x"'])
def test_a_pmid_that_is_no_whole_number_is_named(tmp_path, pmid):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{LONG}", "pmid": {pmid}}}')
    with pytest.raises(UserError, match=r"line 1: its 'pmid' is .*, not a PMID"):
        texts_of(tmp_path / "a.jsonl")


@pytest.mark.parametrize("pmid", ["3", "3.0", '"3"'])
def test_a_pmid_may_be_written_as_tables_do(tmp_path, pmid):
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{LONG}", "pmid": {pmid}}}')
    assert [record.pmid for record in candidates(tmp_path / "a.jsonl")] == [3]


def test_parquet_as_wikipedia_is_published_gives_its_text_column(tmp_path):
    path = tmp_path / "train-00000-of-00041.parquet"
    table = pyarrow.table({"id": ["1", "2", "3"], "url": ["u"] * 3, "title": ["t"] * 3, "text": TEXTS})
    parquet.write_table(table, path)
    assert texts_of(path) == TEXTS


def test_parquet_may_have_pmids_and_empty_texts(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [TEXTS[0], None], "pmid": [7, None]}), path)
    assert [(r.status, r.pmid) for r in candidates(path)] == [(KEPT, 7), (CODE["no_abstract"], 0)]


def test_parquet_without_text_or_damaged_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"content": TEXTS}), path)
    with pytest.raises(
        UserError, match=r"a\.parquet, row 1: has no 'text' but content; name the key of its text: --text"
    ):
        texts_of(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet"):
        texts_of(path)


ROWS = [
    {"doc": "x-1", "head": "First  title", "document": {"body": TEXTS[0]}, "n": 1},
    {"doc": "x-2", "head": None, "document": {"body": TEXTS[1]}, "n": 2},
]
FIELDS = {"text": "document.body", "title": "head", "id": "doc"}


def written(path: Path, rows: list[dict]) -> Path:
    """Rows as JSON lines, CSV, TSV or Parquet; a table has the column document.body."""
    if path.suffix == ".jsonl":
        path.write_bytes(lines(*rows))
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        flat = [{**row, "document.body": row["document"]["body"]} for row in rows]
        with open(path, "w", newline="") as file:
            out = csv.DictWriter(
                file, [*FIELDS.values(), "n"], dialect="excel-tab" if path.suffix == ".tsv" else "excel"
            )
            out.writeheader()
            out.writerows({key: row[key] for key in out.fieldnames} for row in flat)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_text_title_and_id_may_have_any_name_and_stand_in_nested_objects(tmp_path, kind):
    found = candidates(written(tmp_path / f"a{kind}", ROWS), **FIELDS)
    assert [record.text for record in found] == [f"First title\n{TEXTS[0]}", TEXTS[1]]
    assert [(record.id, record.pmid) for record in found] == [("x-1", 0), ("x-2", 0)]


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("field", ["text", "title", "id"])
def test_a_key_that_no_row_has_is_named(tmp_path, kind, field):
    with pytest.raises(UserError, match=rf"a\{kind}.*'misspelt'"):
        candidates(written(tmp_path / f"a{kind}", ROWS), **{**FIELDS, field: "misspelt"})


def test_an_id_is_a_pmid_only_where_its_key_says_so(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines({"text": TEXTS[0], "n": 5, "meta": {"PMID": "7"}}))
    assert [(r.pmid, r.id) for r in candidates(path, id="n")] == [(0, "5")]
    assert [(r.pmid, r.id) for r in candidates(path, id="meta.PMID")] == [(7, "")]


def test_an_id_that_is_nan_is_missing_and_bytes_are_refused(tmp_path):
    ids = pyarrow.table({"text": TEXTS[:2], "id": [7.0, float("nan")]})  # as pandas has them where some are missing
    parquet.write_table(ids, tmp_path / "a.parquet")
    assert [record.id for record in candidates(tmp_path / "a.parquet", id="id")] == ["7", ""]
    parquet.write_table(pyarrow.table({"text": TEXTS[:1], "id": [b"x"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet, row 1: its 'id' is b'x', not an id"):
        candidates(tmp_path / "b.parquet", id="id")


def test_a_list_of_strings_is_text_of_as_many_lines(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"parts": TEXTS[:2]}))
    assert [record.text for record in candidates(tmp_path / "a.jsonl", text="parts")] == ["\n".join(TEXTS[:2])]


def test_the_length_of_a_text_is_counted_without_its_title(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines({"text": "Short.", "t": LONG}, {"text": "", "t": LONG}))
    found = candidates(tmp_path / "a.jsonl", title="t")
    assert [record.status for record in found] == [CODE["too_short"], CODE["no_abstract"]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("text,text\na,b\n", "twice"),
        ("text,b\na\n", "1 cells under 2 columns"),
        ('text,b\n"a,b\nc,d\n', "unexpected end of data"),
        ('text,b\n"a"x,b\n', "expected after"),
    ],
)
def test_a_table_that_is_none_is_named_with_its_line(tmp_path, content, reason):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=rf"a\.csv, line \d: is not a table of CSV \(.*{reason}"):
        texts_of(tmp_path / "a.csv")


def test_quoted_cells_of_a_table_keep_separators_quotes_and_line_ends(tmp_path):
    (tmp_path / "a.csv").write_text(f'text\n"{TEXTS[0]}, ""so""\nand on"\n')
    assert texts_of(tmp_path / "a.csv") == [f'{TEXTS[0]}, "so"\nand on']


@pytest.fixture
def dataset(tmp_path):
    """A dataset of two files, as a folder that the library of the hub's datasets reads."""
    (tmp_path / "d").mkdir()
    for number, row in enumerate(ROWS):
        (tmp_path / "d" / f"train-{number}.jsonl").write_bytes(lines(row))
    return f"hf:{tmp_path / 'd'}"


def test_a_dataset_of_the_hub_is_read_in_parts(dataset):
    parts = files_in(dataset)
    assert len(parts) == 2
    assert [record.id for part in parts for record in candidates(part, **FIELDS)] == ["x-1", "x-2"]


def test_a_dataset_that_changed_since_its_parts_were_named_is_refused(dataset):
    part, _ = files_in(dataset)
    Path(dataset.removeprefix("hf:"), "train-2.jsonl").write_bytes(lines(ROWS[0]))
    hub_dataset._open.cache_clear()
    with pytest.raises(UserError, match="changed while it was read"):
        candidates(part, **FIELDS)


def test_a_dataset_that_cannot_be_reached_is_one_line(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"hf:nobody/nothing: cannot be read \(.*; check the name and the connection"):
        files_in("hf:nobody/nothing")


PAGE = "<page><title>{}</title><ns>{}</ns>{}<revision><text>{}</text></revision></page>\n"


def dump(markup: str) -> str:
    """Wikipedia's dump of an article, a redirect and a talk page."""
    pages = [
        PAGE.format("Insulin", 0, "", markup),
        PAGE.format("Insulins", 0, '<redirect title="Insulin" />', "#REDIRECT [[Insulin]]"),
        PAGE.format("Talk:Insulin", 1, "", LONG),
    ]
    space = "http://www.mediawiki.org/xml/export-0.11/"
    return f'<mediawiki xmlns="{space}"><siteinfo><sitename>W</sitename></siteinfo>\n{"".join(pages)}</mediawiki>'


MARKUP = """{{Infobox protein|name=Insulin|symbol={{nested|x}}}}
[[File:Insulin.png|thumb|A picture of [[insulin]].]]
'''Insulin''' (from [[Latin]] ''insula'', 'island') is a [[peptide hormone|hormone]] of [[beta cell]]s.&lt;ref&gt;A
1999.&lt;/ref&gt;
It lowers blood &lt;b&gt;glucose&lt;/b&gt; &amp;amp; more.

== Structure ==
{| class="wikitable"
| cell
|}
It has 51 amino acids.

== See also ==
* [[Glucagon]]
[[Category:Hormones]]"""


@pytest.mark.parametrize(
    ("markup", "text"),
    [
        ("<small>Small<ref>Jones 1999</ref></small>.", "Small."),
        ("'''Bold<ref>a b c</ref>''' word", "Bold word"),
        ("<div>[[File:a.jpg|thumb|a caption]]Text.</div>", "Text."),
        ("<div>\n{|\n! head\n|-\n| cell\n|}\nText.</div>", "Text."),
        ("Text.<gallery>a.jpg<ref>inner</ref></gallery>", "Text."),
    ],
)
def test_what_is_no_prose_is_left_out_inside_other_markup_too(markup, text):
    assert prose(markup) == text


@pytest.mark.parametrize(
    "name", ["enwiki-20260101-pages-articles.xml", "enwiki-20260101-pages-articles1.xml-p1p41242.bz2"]
)
def test_wikipedia_s_dump_gives_the_prose_of_its_articles(tmp_path, name):
    content = dump(MARKUP).encode()
    path = tmp_path / name
    path.write_bytes(bz2.compress(content) if name.endswith(".bz2") else content)
    records = candidates(path)
    assert [record.status for record in records] == [KEPT, CODE["no_abstract"], CODE["no_abstract"]]
    assert records[0].text == (
        "Insulin\n"
        "Insulin (from Latin insula, 'island') is a hormone of beta cells.\n"
        "It lowers blood glucose & more.\n"
        "Structure\n"
        "It has 51 amino acids."
    )


def test_a_broken_dump_is_named(tmp_path):
    path = tmp_path / "enwiki-20260101-pages-articles.xml"
    path.write_text(dump(MARKUP)[:-40])
    with pytest.raises(UserError, match=r"articles\.xml: not well-formed XML, "):
        texts_of(path)


def test_prose_of_plain_text_is_itself():
    assert prose("Plain text, 3 < 4 and a&b.") == "Plain text, 3 < 4 and a&b."


def test_a_folder_stands_for_its_files_by_name(tmp_path):
    for name in ("pubmed26n0002.xml.gz", "pubmed26n0001.xml.gz"):
        write_set(tmp_path / name, article())
        (tmp_path / f"{name}.md5").write_text("")
    (tmp_path / "README.txt").write_text("NLM says how to use it.")
    assert [path.name for path in files_in(str(tmp_path))] == ["pubmed26n0001.xml.gz", "pubmed26n0002.xml.gz"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file of a known kind"):
        files_in(str(tmp_path / "empty"))
