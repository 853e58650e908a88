"""Documents of a domain: the same text for every model."""

import json

import numpy as np
import pytest
from tiny_models import WORDS, train_tokenizer

from biomamba_jax.config import DomainConfig, PrepareConfig
from biomamba_jax.data import shards
from biomamba_jax.data.build import build_shards
from biomamba_jax.errors import UserError
from biomamba_jax.tasks.documents import read_domain

TEXTS = [" ".join(np.random.default_rng(i).choice(WORDS, 20)) + f" β {i}" for i in range(40)]


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "pmid": 100 + i}) + "\n" for i, text in enumerate(TEXTS)))
    return path


def test_json_lines_and_paragraphs_are_documents(jsonl, tmp_path):
    assert [d.text for d in read_domain("d", DomainConfig(path=str(jsonl)))[0]] == TEXTS
    (tmp_path / "t.txt").write_text("first\n\nsecond  line\nthird\n")
    documents, _ = read_domain("d", DomainConfig(path=[str(tmp_path / "t.txt")]))
    assert [(d.key, d.text) for d in documents] == [("t.txt:1", "first"), ("t.txt:2", "second line\nthird")]


def test_a_domain_names_its_keys_of_text_title_and_id(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"paper": {"abstract": "second", "doi": "10/1"}, "name": "first"}))
    with pytest.raises(UserError, match=r"line 1: has no 'text' but paper, name; .* of a domain --domains\.NAME\.text"):
        read_domain("d", DomainConfig(path=str(tmp_path / "a.jsonl")))
    keys = {"text": "paper.abstract", "title": "name", "id": "paper.doi"}
    [document], _ = read_domain("d", DomainConfig(path=str(tmp_path / "a.jsonl"), **keys))
    assert (document.key, document.text) == ("10/1", "first\nsecond")


def test_bytes_and_words_are_those_of_the_text(jsonl):
    (first, *_), _ = read_domain("d", DomainConfig(path=str(jsonl)))
    assert (first.key, first.bytes, first.words) == ("100", len(TEXTS[0].encode()), 22)


def test_shards_give_back_the_text_that_they_were_made_of(jsonl, tmp_path):
    files = {
        "input": [str(jsonl)],
        "output": str(tmp_path / "shards"),
        "tokenizer": str(train_tokenizer(tmp_path).path),
    }
    build_shards(PrepareConfig(**files, validation_fraction=0.2, test_fraction=0.3, workers=1))
    found = {}
    for split in ("train", "validation", "test"):
        documents, left_out = read_domain("d", DomainConfig(path=str(tmp_path / "shards"), split=split))
        found |= {document.key: document.text for document in documents}
        assert not left_out
    assert found == {str(100 + i): text for i, text in enumerate(TEXTS)}


def store(folder, tokenizer, texts):
    """A folder of shards whose records state the texts' lengths, whatever their ids spell."""
    stored = [
        shards.Document(np.array([*ids, tokenizer.eos_id]), pmid, 1, 0, len(text.encode()))
        for pmid, (text, ids) in enumerate(zip(texts, tokenizer.encode_batch(texts), strict=True), 1)
    ]
    info = shards.write_documents(folder / "test", stored)
    tokenizer.save_to(folder)
    about = shards.TokenizerInfo("t", tokenizer.sha256, "tokenizer.model", tokenizer.vocab_size, tokenizer.eos_id)
    shards.Manifest(about, {"test": info}, {}, [{"name": "t", "sha256": ""}], {}).save(folder)
    return DomainConfig(path=str(folder))


def test_a_stored_document_that_its_ids_do_not_spell_is_left_out_and_counted(tmp_path):
    tokenizer = train_tokenizer(tmp_path)
    lossy = "glucose\u2581serum"  # SentencePiece's own sign for a space
    documents, left_out = read_domain("d", store(tmp_path / "s", tokenizer, [TEXTS[0], lossy, TEXTS[1]]))
    assert ([document.text for document in documents], left_out) == (TEXTS[:2], {"unspelled": 1})
    with pytest.raises(UserError, match=r"domains\.d: .* no document whose ids spell its text, of 2"):
        read_domain("d", store(tmp_path / "all", tokenizer, [lossy, lossy]))


def test_a_sample_is_the_same_for_every_model_and_another_with_another_seed(jsonl):
    config = DomainConfig(path=str(jsonl), max_documents=7)
    first, again, other = (read_domain("d", config, seed)[0] for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 7 and [int(d.key) for d in first] == sorted(int(d.key) for d in first)


def test_empty_texts_and_those_outside_a_sample_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a", "", "b", "c")))
    documents, left_out = read_domain("d", DomainConfig(path=str(tmp_path / "a.jsonl"), max_documents=2))
    assert (len(documents), left_out) == (2, {"no_abstract": 1, "not in the sample": 1})


def test_a_domain_without_a_document_is_refused_by_name(tmp_path):
    (tmp_path / "n.json").write_text("5")
    with pytest.raises(UserError, match=r"n\.json, line 1: is not a mapping"):
        read_domain("general", DomainConfig(path=str(tmp_path / "n.json")))
    (tmp_path / "t.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"domains\.general: .*t\.txt holds no document"):
        read_domain("general", DomainConfig(path=str(tmp_path / "t.txt")))
