"""`prepare inspect` and `prepare tokenizers`: counts that agree with the shards, and pages to send to a colleague."""

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from corpora import SMALL, abstract, make_shards
from nlm_xml import article, write_set

from biomamba_jax import prepare
from biomamba_jax.command_line import parse
from biomamba_jax.config.prepare import InspectConfig, TokenizersConfig
from biomamba_jax.data.inspection import inspect, preview, show
from biomamba_jax.data.packing import RowPlan
from biomamba_jax.data.shards import ShardReader
from biomamba_jax.data.tokenizer_comparison import compare_tokenizers
from biomamba_jax.errors import UserError


@pytest.fixture(scope="module")
def nlm(tmp_path_factory):
    records = [article(pmid, abstract(pmid), title=f"Title <i>{pmid}</i>.") for pmid in range(1, 200)]
    return str(write_set(tmp_path_factory.mktemp("in") / "pubmed26n0001.xml.gz", *records, article(500, "")))


@pytest.fixture(scope="module")
def shards(nlm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "shards"
    make_shards([nlm], folder, settings=SMALL, workers=1)
    return folder


def test_lengths_and_packing_are_those_of_the_shards(shards):
    found = inspect(InspectConfig(path=str(shards), sequence_length=256))
    np.testing.assert_array_equal(found.lengths, ShardReader(shards / "train").lengths)
    assert found.markup == (len(found.lengths), 0, 0)


def test_the_packed_share_is_that_of_all_tokens_in_all_rows(shards):
    for length in (256, 1000):
        found = inspect(InspectConfig(path=str(shards), sequence_length=length))
        rows = RowPlan(found.lengths, length, seed=0).rows_in_epoch()
        assert found.packed == pytest.approx(found.lengths.sum() / (rows * length))


def test_the_printed_percentiles_are_lengths_that_so_many_documents_have_at_most(shards, capsys):
    found = dataclasses.replace(inspect(InspectConfig(path=str(shards))), lengths=np.arange(10, 20, dtype=np.uint32))
    show(found)
    line = next(line for line in capsys.readouterr().out.splitlines() if "at most" in line)
    assert [int(cell) for cell in line.split("│")[2:-1]] == [10, 10, 12, 14, 16, 18, 18, 19]


def test_samples_are_shown_before_and_after(nlm, shards):
    found = inspect(InspectConfig(path=str(shards), samples=4, input=[nlm]))
    assert len(found.samples) == 4
    for sample in found.samples:
        pmid = sample.name.split(",")[0].removeprefix("PMID ")
        assert f"<ArticleTitle>Title <i>{pmid}</i>.</ArticleTitle>" in sample.before
        assert sample.after.startswith(f"Title {pmid}.\n")
        assert sample.name.endswith("pubmed26n0001.xml.gz")


def test_the_preview_of_a_mixture_has_its_shares(shards, tmp_path):
    (tmp_path / "b.txt").write_text("\n\n".join(abstract(("b", n)) for n in range(50)))
    make_shards([str(tmp_path / "b.txt")], tmp_path / "b", shards / "tokenizer.model", workers=1)
    sources = {"a": {"path": str(shards), "weight": 3}, "b": {"path": str(tmp_path / "b"), "weight": 1}}
    report = tmp_path / "text.html"
    options = ["--mixture.sources", json.dumps(sources), "--preview-tokens", "50000", "--report", str(report)]
    prepare.main(["inspect", str(shards), *options])
    page = Page(report)
    assert page.count["svg"] == 3
    text = report.read_text("utf-8")
    assert "<title>shards</title>" in text and "MedRAG" in text
    prepare.main(["inspect", str(tmp_path / "b"), "--report", str(report)])
    text = report.read_text("utf-8")
    assert "<title>b</title>" in text
    assert not [word for word in ("MedRAG", "PMID", "Mixture", "Left out") if word in text]  # it is plain text
    found = {share.name: share for share in preview(parse(InspectConfig, [f"--path={shards}", *options], ""))}
    for name, weight in (("a", 0.75), ("b", 0.25)):
        assert found[name].share == pytest.approx(weight, abs=0.005)
        lengths = ShardReader(Path(sources[name]["path"]) / "train").lengths
        assert found[name].epochs == pytest.approx(found[name].tokens / lengths.sum(), rel=0.02)
        assert {f"{found[name].tokens:,}", f"{found[name].epochs:.3f}"} <= page.cells


class Page(HTMLParser):
    """The table cells of a page, and how often each element occurs; every element must be closed."""

    def __init__(self, path):
        super().__init__()
        self.cells, self.count, self.open = set(), {}, []
        self.feed(path.read_text("utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag != "script"
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in ("meta", "path", "use", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.add(data)


def test_the_command_prints_and_the_page_holds_what_became_of_the_records(nlm, shards, tmp_path, capsys):
    report = tmp_path / "text.html"
    prepare.main(["inspect", str(shards), "--input", nlm, "--report", str(report)])
    printed = capsys.readouterr().out
    for word in ("no_abstract", "bytes/token", "90 %", "% full when packed", "entities", "PMID", str(report)):
        assert word in printed
    page = Page(report)
    assert {"no_abstract", "kept", "200", "199", "train"} <= page.cells
    assert page.count["svg"] == 2
    assert page.count["pre"] >= 7  # three samples before and after, and the settings
    assert "http" not in report.read_text().replace("http://www.w3.org", "")


@pytest.mark.parametrize(
    "arguments",
    [["inspect"], ["inspect", "nowhere"], ["polish"], ["inspect", "--splt=x"], ["inspect", "x", "--samples=-1"]],
)
def test_what_cannot_be_inspected_is_refused_in_one_line(arguments):
    with pytest.raises(UserError):
        prepare.main(arguments)


def test_originals_that_are_not_xml_are_refused_by_name(shards, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl: is not XML; --input of inspect takes the NLM files"):
        prepare.main(["inspect", str(shards), "--input", str(tmp_path / "a.jsonl")])


def test_originals_that_are_broken_are_refused_by_name(shards, tmp_path):
    (tmp_path / "a.xml").write_text("<PubmedArticleSet><PubmedArticle></PubmedBook></PubmedArticleSet>")
    with pytest.raises(UserError, match=r"a\.xml: not well-formed XML"):
        prepare.main(["inspect", str(shards), "--input", str(tmp_path / "a.xml")])


def test_tokenizers_are_compared_on_the_same_text(nlm, shards, tmp_path, capsys):
    model = sentencepiece.SentencePieceProcessor(model_file=str(shards / "tokenizer.model"))
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    known = next(piece[1:] for piece in pieces if piece[0] == "▁" and piece[1:].isalpha())
    (tmp_path / "terms.txt").write_text(f"{known}\nxylophone\n")
    config = TokenizersConfig(input=[nlm], terms=str(tmp_path / "terms.txt"))
    (found,) = compare_tokenizers(config, [str(shards)])
    lengths = np.concatenate([ShardReader(shards / split).lengths for split in ("train", "validation", "test")])
    assert found.tokens == lengths.sum() - len(lengths)  # all documents are read, and EOS is not counted
    assert found.vocab_size == 300
    assert found.single_terms == 0.5 and found.tokens_per_term > 1
    assert found.bytes_per_token * found.tokens == pytest.approx(
        sum(document.num_bytes for split in ("train", "validation", "test") for document in _all(shards / split))
    )
    prepare.main(["tokenizers", "--tokenizers", str(shards), str(shards / "tokenizer.model"), "--input", nlm])
    assert capsys.readouterr().out.count(f"{found.bytes_per_token:.3f}") == 2


def test_tokens_are_divided_by_words_and_into_bytes(shards, tmp_path):
    text = " ".join(["naïve β-cells grew in mice"] * 40)
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    (found,) = compare_tokenizers(TokenizersConfig(input=[str(tmp_path / "text.txt")]), [str(shards)])
    assert found.tokens_per_word == pytest.approx(found.tokens / 200) and found.tokens > 200
    assert found.bytes_per_token == pytest.approx(len(text.encode()) / found.tokens)


def _all(folder):
    reader = ShardReader(folder)
    return [reader[i] for i in range(len(reader))]


def test_a_tokenizer_that_loses_the_text_is_shown_with_what_it_loses(shards, tmp_path, capsys):
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "[UNK]": 1, "mice": 2}, unk_token="[UNK]"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "words.json"))
    (tmp_path / "text.txt").write_text("mice cats " * 40)
    arguments = ["tokenizers", "--tokenizers", str(tmp_path / "words.json"), "--input", str(tmp_path / "text.txt")]
    prepare.main(arguments)
    assert "50.00%" in capsys.readouterr().out
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"</s>": 0}, []))
    library.save(str(tmp_path / "words.json"))
    with pytest.raises(UserError, match=r"words\.json: spells nothing"):
        prepare.main(arguments)


@pytest.mark.parametrize("given", [[], ["--tokenizers", "x.model"], ["--input", "a.txt"]])
def test_a_comparison_without_text_or_tokenizers_is_refused(given):
    with pytest.raises(UserError, match="tokenizers"):
        prepare.main(["tokenizers", *given])
