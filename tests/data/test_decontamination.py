"""Evaluation text is kept out: by the PMIDs of its articles, and by shared runs of words even where it was edited."""

import gzip
import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from corpora import documents, make_shards
from nlm_xml import article, write_set

from biomamba_jax.config import PrepareConfig
from biomamba_jax.data.build import REMOVED_NAME
from biomamba_jax.data.decontamination import read_evaluation
from biomamba_jax.data.shingles import shingles
from biomamba_jax.errors import UserError

LEAST = PrepareConfig().decontaminate_overlap
_WORDS = ["of the in and patients with was were to for study results".split(), [f"term{i}" for i in range(3000)]]


def passage(seed: object, words: int = 180) -> str:
    """Made-up prose: half of its words are common ones."""
    random_ = random.Random(str(seed))
    return " ".join(random_.choice(random_.choice(_WORDS)) for _ in range(words)) + "."


def edited(text: str, seed: object) -> str:
    """One word in 20 replaced, case and punctuation changed, the last tenth cut off."""
    random_ = random.Random(str(seed))
    words = [f"other{random_.randrange(99)}" if random_.random() < 0.05 else word for word in text.split()]
    words = words[: len(words) * 9 // 10]
    return ", ".join(" ".join(words[i : i + 9]) for i in range(0, len(words), 9)).upper()


@pytest.fixture
def evaluation_of(tmp_path):
    """Makes evaluation text of one line."""

    def make(text: str):
        (tmp_path / "a.txt").write_text(text + "\n")
        return read_evaluation([str(tmp_path / "a.txt")])

    return make


def pubmedqa(path: Path, contexts: dict[int, str]) -> str:
    questions = {
        str(pmid): {"QUESTION": f"Does {text[:40]}?", "CONTEXTS": [text[:300], text[300:]], "final_decision": "yes"}
        for pmid, text in contexts.items()
    }
    path.write_text(json.dumps(questions))
    return str(path)


def test_runs_of_words_are_those_of_a_plain_loop():
    texts = ["One two, three!", "a b c d e f", "", "A  b\nc d", "x"]
    runs, offsets = shingles(texts, 3)
    assert offsets.tolist() == [0, 1, 5, 6, 8, 9]
    assert runs[1] == runs[6] and runs[2] == runs[7]  # "a b c" and "b c d", case and white space aside
    assert len(set(runs.tolist())) == 7
    alone = np.concatenate([shingles([text], 3)[0] for text in texts])
    np.testing.assert_array_equal(runs, alone)


def test_planted_evaluation_text_is_found_and_clean_text_is_not(tmp_path):
    """All exact PMIDs, at least 95 % of lightly edited texts, under 0.1 % of clean records; each removal is listed."""
    contexts = {pmid: passage(pmid) for pmid in range(1, 201)}
    evaluation = pubmedqa(tmp_path / "ori_pqal.json", contexts)
    exact = [article(pmid, f"<AbstractText>{passage(('rewritten', pmid))}</AbstractText>") for pmid in range(1, 101)]
    light = [
        article(10_000 + pmid, f"<AbstractText>{passage('around', 30)} {edited(contexts[pmid], pmid)}</AbstractText>")
        for pmid in range(101, 201)
    ]
    clean = [article(20_000 + n, f"<AbstractText>{passage(('clean', n))}</AbstractText>") for n in range(2000)]
    records = exact + light + clean
    random.Random(0).shuffle(records)
    path = write_set(tmp_path / "pubmed26n0001.xml", *records)
    settings = PrepareConfig(decontaminate=[evaluation], train_tokenizer=300)
    manifest = make_shards([str(path)], tmp_path / "o", settings=settings, workers=1)
    kept = Counter(pmid // 10_000 for pmid in documents(tmp_path / "o"))
    assert manifest.filters["evaluation_article"] == 100
    assert kept[0] == 0
    assert kept[1] <= 5
    assert kept[2] >= 1999
    assert manifest.filters["evaluation_text"] == 2100 - kept[1] - kept[2]
    listed = [json.loads(line) for line in (tmp_path / "o" / REMOVED_NAME).read_text().splitlines()]
    assert Counter(entry["reason"] for entry in listed) == {
        reason: number for reason, number in manifest.filters.items() if number and reason.startswith("evaluation")
    }
    by_text = [entry for entry in listed if entry["reason"] == "evaluation_text"]
    assert all(entry["repeats"] == f"ori_pqal.json: {entry['pmid'] - 10_000}" for entry in by_text)
    assert all(LEAST <= entry["share"] <= 1 and entry["source"] == path.name for entry in by_text)


def test_real_contexts_are_found_in_each_other_only_where_they_are_the_same(shared_data, tmp_path):
    """Half of PubMedQA as evaluation, the other half as clean abstracts of just its kind."""
    questions = json.loads((shared_data / "pubmedqa" / "ori_pqal.json").read_text())
    pmids = sorted(questions)
    texts = {pmid: " ".join(questions[pmid]["CONTEXTS"]) for pmid in pmids}
    held = tmp_path / "held.json"
    held.write_text(json.dumps({pmid: questions[pmid] for pmid in pmids[::2]}))
    evaluation = read_evaluation([str(held)])
    assert all(evaluation.holds_pmid(int(pmid)) for pmid in pmids[::2])
    assert not any(evaluation.holds_pmid(int(pmid)) for pmid in pmids[1::2])
    light = evaluation.overlaps([edited(texts[pmid], pmid) for pmid in pmids[::2]], LEAST)
    assert len(light) >= 0.95 * 500
    assert len(evaluation.overlaps([texts[pmid] for pmid in pmids[1::2]], LEAST)) == 0


def test_a_set_phrase_alone_is_no_contamination(evaluation_of):
    evaluation = evaluation_of("The aim of this study was to evaluate the effect of " + passage(1, 150))
    assert evaluation.overlaps(["The aim of this study was to evaluate the effect of " + passage(2, 150)], LEAST) == {}


def made_up(name: str, words: int) -> str:
    return " ".join(f"{name}{i}" for i in range(words))


@pytest.mark.parametrize(("words", "found"), [(10, False), (11, True)])
def test_a_shared_phrase_counts_from_eleven_words_on(evaluation_of, words, found):
    evaluation = evaluation_of(made_up("item", 12))
    text = made_up("item", words) + " " + made_up("other", 30)
    assert bool(evaluation.overlaps([text], LEAST)) is found


@pytest.mark.parametrize(("least", "found"), [(0.25, True), (0.26, False)])
def test_a_document_of_just_the_least_overlap_is_left_out(evaluation_of, least, found):
    evaluation = evaluation_of(made_up("item", 23))  # 16 runs of 8 words, of which a phrase of 11 words has 4
    text = made_up("item", 11) + " " + made_up("other", 60)
    assert bool(evaluation.overlaps([text], least)) is found


def test_a_short_document_inside_an_item_is_contamination(evaluation_of):
    text = passage(3)
    evaluation = evaluation_of(text)
    inside = " ".join(text.split()[20:40])
    assert evaluation.overlaps([inside, passage(4, 20)], LEAST).keys() == {0}
    assert evaluation.overlaps([inside], LEAST)[0].share == 1.0


def test_bioasq_s_documents_and_snippets_are_evaluation_text(tmp_path):
    question = {
        "id": "5a",
        "body": passage("body", 20),
        "documents": ["http://www.ncbi.nlm.nih.gov/pubmed/111", "https://pubmed.ncbi.nlm.nih.gov/222/"],
        "snippets": [{"document": "http://www.ncbi.nlm.nih.gov/pubmed/333", "text": passage("snippet", 60)}],
    }
    path = tmp_path / "BioASQ-training.json"
    path.write_text(json.dumps({"questions": [question]}))
    evaluation = read_evaluation([str(path)])
    assert evaluation.pmids.tolist() == [111, 222, 333]
    found = evaluation.overlaps([passage("x", 50) + " " + passage("snippet", 60), passage("y")], LEAST)
    assert found == {0: ("BioASQ-training.json: 5a", 1.0)}


def test_pubmedqa_s_list_of_test_articles_gives_pmids_alone(tmp_path):
    path = tmp_path / "test_ground_truth.json"
    path.write_text(json.dumps({"123": "yes", "456": "no"}))
    assert read_evaluation([str(path)]).pmids.tolist() == [123, 456]


@pytest.mark.parametrize("name", ["ori_pqal.JSON", "ori_pqal.json.gz"])
def test_source_articles_are_known_whatever_the_spelling_or_packing_of_the_name(tmp_path, name):
    plain = Path(pubmedqa(tmp_path / "a.json", {123: passage(1)})).read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(plain) if name.endswith(".gz") else plain)
    assert read_evaluation([str(tmp_path / name)]).pmids.tolist() == [123]


def test_questions_with_empty_parts_are_read(tmp_path):
    bioasq = {"id": "5a", "body": None, "documents": None, "snippets": [{"document": None, "text": passage(1, 40)}]}
    pubmed = {"QUESTION": None, "CONTEXTS": None, "LONG_ANSWER": passage(2, 40)}
    for name, content in (("a.json", {"questions": [bioasq]}), ("b.json", {"7": pubmed})):
        (tmp_path / name).write_text(json.dumps(content))
    evaluation = read_evaluation([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert evaluation.overlaps([passage(1, 40), passage(2, 40)], LEAST).keys() == {0, 1}


def test_lines_of_json_are_items_of_all_their_strings(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps({"q": passage(1, 40), "choices": [passage(2, 40), 3], "n": None}) + "\n\n")
    assert read_evaluation([str(path)]).overlaps([passage(2, 40)], LEAST)[0] == ("set.jsonl: line 1", 1.0)


ASKED = passage("asked", 30)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ({"q1": ASKED}, "q1"),
        ({"q1": {"question": ASKED, "answer": "yes"}}, "q1"),
        ({"medical": {"0001": {"question": ASKED, "options": {"A": "x"}}}}, "medical.0001"),
        ({"questions": [{"question": ASKED}]}, "questions.1"),
        ({"data": [{"paragraphs": [{"qas": [{"id": "a7", "question": ASKED}]}]}]}, "a7"),
        ({"id": 3, "question": {"stem": ASKED}}, "3"),
        ({"question": [passage("x", 40), ASKED], "answer": ["yes", "no"]}, "question"),
        ([ASKED, "another"], "1"),
        ({"q": {ASKED: "yes"}}, "q"),
        ([{"tokens": ASKED.split(), "tags": [0]}], "1.tokens"),
    ],
)
def test_json_of_any_layout_is_read_and_its_items_named_by_their_place(tmp_path, layout, name):
    (tmp_path / "a.json").write_text(json.dumps(layout))
    evaluation = read_evaluation([str(tmp_path / "a.json")])
    assert evaluation.overlaps([f"{ASKED} {passage('y', 300)}"], LEAST) == {0: (f"a.json: {name}", 1.0)}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_of_a_table_are_evaluation_text_with_their_pmids(tmp_path, kind):
    row = {"question": ASKED, "pmid": "17"}
    rows = f"question,pmid\n{ASKED},17\n" if kind == "csv" else json.dumps(row)
    (tmp_path / f"a.{kind}").write_text(rows)
    evaluation = read_evaluation([str(tmp_path / f"a.{kind}")])
    assert evaluation.pmids.tolist() == [17]
    assert evaluation.overlaps([ASKED], LEAST).keys() == {0}


def test_binary_columns_of_parquet_are_text_where_they_are_utf_8(tmp_path):
    arrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    parquet.write_table(arrow.table({"q": [ASKED.encode()], "image": [b"\xff\xd8"]}), tmp_path / "a.parquet")
    assert read_evaluation([str(tmp_path / "a.parquet")]).overlaps([ASKED], LEAST).keys() == {0}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"1": {"QUESTION": 5, "CONTEXTS": [ASKED]}}, "QUESTION"),
        ({"1": {"QUESTION": ASKED, "CONTEXTS": [ASKED, 5]}}, "CONTEXTS"),
        ({"1": {"QUESTION": ASKED, "LONG_ANSWER": {"a": 1}}}, "LONG_ANSWER"),
        ({"questions": [{"id": "1", "body": True}]}, "body"),
        ({"questions": [{"id": "1", "body": ASKED, "ideal_answer": [2]}]}, "ideal_answer"),
        ({"data": [{"id": "1", "context": 7, "qas": [{"question": ASKED}]}]}, "context"),
        ({"questions": [{"id": "1", "body": ASKED, "snippets": [{"text": 3.5}]}]}, "text"),
    ],
)
def test_a_number_where_text_belongs_is_named(tmp_path, content, key):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"a\.json: '{key}' of 1.* is .*, not text"):
        read_evaluation([str(tmp_path / "a.json")])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "[1]"),
        ("a.json", "{"),
        ("a.json", "{}"),
        ("a.json", '{"questions": 3}'),
        ("a.jsonl", "{"),
        ("a.txt", ""),
        ("a.txt", "Only seven words stand on this line."),
        ("a.json", '{"a": [1, 2], "b": "yes"}'),
        ("a.csv", "question,answer"),
    ],
)
def test_what_is_no_evaluation_text_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=str(path)):
        read_evaluation([str(path)])


def test_other_evaluation_text_is_another_selection(tmp_path):
    """The spools of a run that was stopped are not used for other evaluation files."""
    digests = {read_evaluation([pubmedqa(tmp_path / "a.json", {n: passage(n)})]).digest for n in (1, 2)}
    assert len(digests) == 2
