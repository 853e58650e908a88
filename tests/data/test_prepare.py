"""`prepare`: files in, shards out; every record accounted for, the same bytes however it is run, all or nothing."""

import dataclasses
import gzip
import json
import random
import re
from pathlib import Path

import pytest
from corpora import SMALL, abstract, contents, documents, make_shards
from nlm_xml import LONG, article, deletions, write_set
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from biomamba_jax import prepare
from biomamba_jax.command_line import run_command
from biomamba_jax.config import PrepareConfig
from biomamba_jax.data import build
from biomamba_jax.data.shards import Manifest, ShardReader
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError

BOOK = "<PubmedBookArticle><BookDocument/></PubmedBookArticle>"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    """A baseline and two updates with versions, deletions, every reason to be left out, and 300 good documents."""
    folder = tmp_path_factory.mktemp("nlm")
    good = [article(pmid, abstract(pmid)) for pmid in range(1000, 1300)]
    write_set(
        folder / "pubmed26n0001.xml.gz",
        *good,
        article(1, abstract("old")),
        article(2, abstract(2)),
        article(3, abstract(3)),
        article(3, abstract("v2"), version=2),
        article("", abstract(4)),
        article(5, ""),
        article(6, "<AbstractText>Short.</AbstractText>"),
        article(7, abstract(7), publication_type="Retracted Publication"),
        article(8, abstract(1000).upper().replace("ABSTRACTTEXT", "AbstractText"), title="A  TITLE."),
        BOOK,
        "<Foreign/>",
    )
    write_set(
        folder / "pubmed26n0002.xml", article(1, abstract("new")), article(3, abstract("v1 again")), deletions(2, 9)
    )
    write_set(folder / "pubmed26n0010.xml.gz", article(9, abstract("back")), article(10, abstract(10)), deletions(10))
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def output(files, tmp_path_factory) -> Path:
    """The files prepared in one process, with a small trained tokenizer."""
    folder = tmp_path_factory.mktemp("out") / "shards"
    make_shards(files, folder, settings=SMALL, workers=1)
    return folder


def test_every_record_is_kept_or_counted_under_one_reason(output):
    manifest = Manifest.load(output)
    once = "book_article unknown_element no_pmid no_abstract too_short retracted duplicate_text".split()
    assert {reason: number for reason, number in manifest.filters.items() if number} == {
        **dict.fromkeys(once, 1),
        "deleted": 2,
        "superseded": 3,
    }
    kept = sum(split.documents for split in manifest.splits.values())
    assert sum(source["records"] for source in manifest.sources) == kept + sum(manifest.filters.values())
    assert kept == sum(source["documents"] for source in manifest.sources) == len(documents(output))


def test_the_newest_version_of_the_latest_file_is_what_is_stored(output):
    stored = documents(output)
    assert {pmid for pmid in stored if pmid < 1000} == {1, 3, 9}
    for pmid, seed in ((1, "new"), (3, "v2"), (9, "back"), (1234, 1234)):
        assert stored[pmid] == "A title.\n" + abstract(seed)[len("<AbstractText>") : -len("</AbstractText>")]


def test_the_manifest_s_totals_are_those_of_the_shards(output):
    manifest = Manifest.load(output)
    for name, split in manifest.splits.items():
        reader = ShardReader(output / name)
        assert (split.documents, split.tokens) == (len(reader), int(reader.lengths.sum()))
        assert split.bytes == sum(reader[i].num_bytes for i in range(len(reader)))
    tokenizer = load_tokenizer(output / manifest.tokenizer.file)
    manifest.check_tokenizer(tokenizer.sha256)
    assert (manifest.tokenizer.vocab_size, manifest.tokenizer.eos_id) == (300, 0)


def test_the_output_holds_shards_tokenizer_and_manifest_and_nothing_else(output):
    assert {path.name for path in output.iterdir()} == {
        "train",
        "validation",
        "test",
        "manifest.json",
        "tokenizer.model",
    }
    assert [path.name for path in output.parent.iterdir()] == ["shards"]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_shards_are_the_same_bytes_whatever_the_order_and_the_number_of_processes(files, output, tmp_path, workers):
    make_shards(random.Random(workers).sample(files, 3), tmp_path / "again", settings=SMALL, workers=workers)
    assert contents(tmp_path / "again") == contents(output)


def test_a_document_s_split_hangs_on_its_pmid_alone(files, output, tmp_path):
    """Other settings, other neighbours, another text: the same side."""
    write_set(tmp_path / "other.xml", *(article(pmid, abstract(-pmid)) for pmid in range(1100, 1400)))
    make_shards([str(tmp_path / "other.xml")], tmp_path / "other", output / "tokenizer.model", SMALL_GIVEN, workers=1)

    def side(folder: Path) -> dict[int | None, str]:
        readers = {split: ShardReader(folder / split) for split in ("train", "validation", "test")}
        return {reader[i].pmid: split for split, reader in readers.items() for i in range(len(reader))}

    ours, others = side(output), side(tmp_path / "other")
    both = ours.keys() & others.keys()
    assert len(both) == 200
    assert all(ours[pmid] == others[pmid] for pmid in both)
    shares = [list(others.values()).count(split) / len(others) for split in ("test", "validation")]
    assert shares == pytest.approx([0.2, 0.1], abs=0.07)


SMALL_GIVEN = PrepareConfig(validation_fraction=0.1, test_fraction=0.2)


def test_retracted_records_are_kept_when_asked(files, output, tmp_path):
    settings = PrepareConfig(min_abstract_characters=3, keep_retracted=True)
    make_shards(files, tmp_path / "all", output / "tokenizer.model", settings, workers=1)
    assert {6, 7} <= documents(tmp_path / "all").keys()


def test_json_lines_and_paragraphs_of_text_are_documents(output, tmp_path):
    lines = [{"text": f"{LONG} one.", "pmid": 77}, {"text": f"{LONG}\r\n\n two.\ud800", "id": "x"}, {"text": " "}]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, lines)) + "\n\n")
    (tmp_path / "b.txt").write_text(f"{LONG} three\nand  more.\n\n \n{LONG} four.\n")
    inputs = [str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.txt")]
    manifest = make_shards(inputs, tmp_path / "o", output / "tokenizer.model", workers=1)
    assert documents(tmp_path / "o")[77] == f"{LONG} one."
    reader = ShardReader(tmp_path / "o" / "train")
    tokenizer = load_tokenizer(output / "tokenizer.model")
    texts = {tokenizer.decode(reader[i].ids[:-1]) for i in range(len(reader))}
    assert texts == {f"{LONG} one.", f"{LONG}\ntwo.\ufffd", f"{LONG} three\nand more.", f"{LONG} four."}
    assert manifest.filters["no_abstract"] == 1


@pytest.fixture
def lossy(tmp_path):
    """A tokenizer that knows the characters of LONG alone and drops any other."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator([LONG], trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False))
    made.save(str(tmp_path / "lossy.json"))
    return tmp_path / "lossy.json"


def write_lines(path: Path, texts: list[str]) -> list[str]:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [str(path)]


def test_documents_that_their_ids_do_not_spell_are_counted(tmp_path, lossy, capsys):
    texts = [" ".join([LONG] * (number + 1)) for number in range(40)] + [f"{LONG} ±β", f"{LONG} ± {LONG}"]
    inputs = write_lines(tmp_path / "a.jsonl", texts)
    prepare.main(["--input", *inputs, "--output", str(tmp_path / "o"), "--tokenizer", str(lossy), "--workers", "1"])
    manifest = Manifest.load(tmp_path / "o")
    assert sum(split.unspelled for split in manifest.splits.values()) == 2
    assert re.search(r"unspelled . +2 . of these: their ids spell another text", capsys.readouterr().out)


def test_a_tokenizer_that_loses_more_than_the_stated_share_is_refused(tmp_path, lossy):
    texts = [" ".join([LONG] * (number + 1)) for number in range(9)] + [f"{LONG} ±β"]
    inputs = write_lines(tmp_path / "a.jsonl", texts)
    with pytest.raises(UserError, match=r"lossy\.json: its ids do not spell the text of at least 1 of 10 documents"):
        make_shards(inputs, tmp_path / "o", lossy, workers=1, max_unspelled=0.09)
    assert make_shards(inputs, tmp_path / "o", lossy, workers=1, max_unspelled=0.1).filters["too_short"] == 0


def test_the_stored_length_is_that_of_the_text_that_the_ids_spell(tmp_path, output):
    """SentencePiece writes a space as U+2581, so that a text with that character comes back with a space."""
    texts = [f"{LONG} one\u2581two.", *(f"{LONG} {number}." for number in range(20))]
    inputs = write_lines(tmp_path / "a.jsonl", texts)
    manifest = make_shards(inputs, tmp_path / "o", output / "tokenizer.model", workers=1)
    assert sum(split.unspelled for split in manifest.splits.values()) == 1
    reader, tokenizer = ShardReader(tmp_path / "o" / "train"), load_tokenizer(output / "tokenizer.model")
    lengths = {tokenizer.decode(document.ids[:-1]): document.num_bytes for document in reader}
    assert all(len(text.encode()) == length for text, length in lengths.items())
    assert f"{LONG} one two." in lengths


def test_ids_that_are_not_pmids_are_stored_and_decide_the_split(tmp_path, output):
    splits = []
    for edition in ("first", "second"):
        rows = [{"id": f"x-{number}", "body": f"{LONG} {edition} {number}."} for number in range(60)]
        (tmp_path / f"{edition}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = PrepareConfig(text="body", id="id", validation_fraction=0.3, test_fraction=0)
        make_shards(
            [str(tmp_path / f"{edition}.jsonl")], tmp_path / edition, output / "tokenizer.model", settings, workers=1
        )
        names = ("train", "validation")
        splits.append({stored.id: name for name in names for stored in ShardReader(tmp_path / edition / name)})
    assert splits[0] == splits[1]
    assert set(splits[0].values()) == {"train", "validation"}


@pytest.mark.parametrize("line", ["{", "[]", '{"txt": "a"}', '{"text": 1}', '{"text": "a", "pmid": "x"}'])
def test_a_bad_json_line_is_named(tmp_path, output, line):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": LONG}) + "\n" + line)
    with pytest.raises(UserError, match=r"a\.jsonl, line 2: (is not|cannot be read as JSON|has no|its)"):
        make_shards([str(tmp_path / "a.jsonl")], tmp_path / "o", output / "tokenizer.model", workers=1)


def broken(folder: Path) -> dict[str, Path]:
    truncated = write_set(folder / "truncated.xml.gz", *(article(pmid, abstract(pmid)) for pmid in range(1, 200)))
    truncated.write_bytes(truncated.read_bytes()[:-40])
    sums = write_set(folder / "sums.xml", article())
    Path(f"{sums}.md5").write_text(f"MD5(sums.xml)= {'0' * 32}")
    bomb = '<!DOCTYPE PubmedArticleSet [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'
    return {
        "truncated or damaged gzip": truncated,
        "MD5": sums,
        "not well-formed": write_set(folder / "malformed.xml", article(1), "<PubmedArticle>"),
        "declares XML entities": write_set(folder / "bomb.xml", article(), doctype=bomb),
        "unknown kind of file": write_set(folder / "a.pdf", article()),
        "cannot be read": folder / "missing.xml",
        "no document is left": write_set(folder / "empty.xml", article(1, "")),
    }


REFUSALS = (
    "truncated or damaged gzip",
    "MD5",
    "not well-formed",
    "declares XML entities",
    "unknown kind of file",
    "cannot be read",
    "no document is left",
)


@pytest.mark.parametrize("reason", REFUSALS)
def test_broken_input_ends_in_one_line_and_leaves_nothing(tmp_path, output, capsys, reason):
    path = broken(tmp_path)[reason]
    before = set(tmp_path.rglob("*"))
    argv = ["--input", str(path), "--output", str(tmp_path / "o"), "--tokenizer", str(output / "tokenizer.model")]
    with pytest.raises(SystemExit) as ended:
        run_command(prepare.main, [*argv, "--workers", "1"])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert reason in line
    assert set(tmp_path.rglob("*")) == before


def test_one_broken_file_among_workers_ends_the_others_and_leaves_no_output(files, tmp_path):
    bad = broken(tmp_path)["not well-formed"]
    with pytest.raises(UserError, match=r"malformed\.xml"):
        make_shards([*files, str(bad)], tmp_path / "o", settings=SMALL, workers=2)
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "o.partial" / "output").exists()


def test_an_output_that_exists_is_not_touched(files, output):
    before = contents(output)
    with pytest.raises(UserError, match="already exists"):
        make_shards(files, output, settings=SMALL, workers=1)
    assert contents(output) == before


def test_the_tokenizer_is_trained_on_a_seeded_sample_of_the_training_split(files, output, tmp_path, monkeypatch):
    samples = []

    def stop(texts, training, path):
        samples.append(list(texts))
        raise UserError("that is enough")

    monkeypatch.setattr(build, "train_sentencepiece", stop)
    for seed in (0, 0, 1):
        settings = dataclasses.replace(SMALL, tokenizer_sample_bytes=20_000, seed=seed)
        with pytest.raises(UserError, match="enough"):
            make_shards(files, tmp_path / "o", settings=settings, workers=1)
    assert samples[0] == samples[1] != samples[2]
    tokenizer, reader = load_tokenizer(output / "tokenizer.model"), ShardReader(output / "train")
    train = {tokenizer.decode(document.ids[:-1]) for document in reader}
    for sample in samples:
        assert set(sample) < train
        size = sum(len(text.encode()) for text in sample)
        assert 20_000 <= size < 20_000 + max(len(text.encode()) for text in train)


def test_a_file_given_twice_is_refused(files, tmp_path):
    with pytest.raises(UserError, match="given twice"):
        make_shards([*files, files[0]], tmp_path / "o", settings=SMALL, workers=1)


def test_one_of_a_given_and_a_trained_tokenizer_must_be_chosen(files, output, tmp_path):
    for tokenizer, settings in ((None, PrepareConfig()), (output / "tokenizer.model", SMALL)):
        with pytest.raises(UserError, match="either --tokenizer"):
            make_shards(files, tmp_path / "o", tokenizer, settings, workers=1)


@pytest.mark.parametrize(
    "option", ["--languages=eng", "--first_year=2000", "--require_pmcid", "--recent_from=2025-01-01"]
)
def test_filters_of_nlm_s_records_are_refused_where_no_input_has_any(tmp_path, option):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    words = ["--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "o"), "--train-tokenizer=300"]
    with pytest.raises(UserError, match=rf"{option.partition('=')[0]}: counts for NLM's records alone"):
        prepare.main([*words, option])
    assert not (tmp_path / "o").exists()


def test_the_command_prints_what_became_of_every_record(files, tmp_path, capsys):
    prepare.main(["--input", *files, "--output", str(tmp_path / "o"), "--train-tokenizer=300", "--workers=1"])
    printed = capsys.readouterr().out
    for word in ("superseded", "duplicate_text", "validation", "bytes/token", "315", "303"):
        assert word in printed


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["--near_duplicates", "--decontaminate", "--recent_from", "--spools"]),
        (["download"], ["--mirror", "--numbers"]),
        (["inspect"], ["--report", "--mixture.preset"]),
        (["tokenizers"], ["--terms"]),
    ],
)
def test_every_command_explains_its_settings(command, words, capsys):
    with pytest.raises(SystemExit) as ended:
        prepare.main([*command, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in words)


def test_a_config_file_says_the_same_as_options(files, output, tmp_path):
    config = tmp_path / "prepare.yaml"
    listed = "".join(f"- {path}\n" for path in files)
    config.write_text(
        f"input:\n{listed}train_tokenizer: 300\nvalidation_fraction: 0.1\ntest_fraction: 0.2\nworkers: 1\n"
    )
    prepare.main(["--config", str(config), "--output", str(tmp_path / "o")])
    assert contents(tmp_path / "o") == contents(output)
