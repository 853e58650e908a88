"""Shards: what is written is read back, and a folder that is incomplete, foreign or damaged is refused in one line."""

import dataclasses
import json
import os
import pickle

import numpy as np
import pytest
from corpora import write_split

from biomamba_jax.data.shards import Document, Manifest, ShardReader, TokenizerInfo, open_split, write_documents
from biomamba_jax.errors import UserError

DOCUMENTS = [[*range(1, n), 0] for n in (1, 5, 300, 2, 9, 1, 40, 7)]


@pytest.fixture
def folder(tmp_path):
    info = write_split(tmp_path / "train", DOCUMENTS, per_shard=3)
    tokenizer = TokenizerInfo("small", "ab" * 32, "tokenizer.json", 512, 0)
    Manifest(tokenizer, {"train": info}, {"no abstract": 3}, [{"name": "a.xml", "sha256": "cd" * 32}], {}).save(
        tmp_path
    )
    return tmp_path


@pytest.mark.parametrize("token_dtype", ["uint16", "uint32"])
def test_documents_are_read_back_in_any_order(tmp_path, token_dtype):
    write_split(tmp_path / "train", DOCUMENTS, per_shard=3, token_dtype=token_dtype)
    reader = ShardReader(tmp_path / "train")
    assert len(reader) == len(DOCUMENTS)
    for i in reversed(range(len(DOCUMENTS))):
        ids, *rest = reader[i]
        assert ids.dtype == np.int32
        assert ids.tolist() == DOCUMENTS[i]
        assert rest == [1000 + i, None, i % 2, 10 * i, None, None]
    np.testing.assert_array_equal(reader.lengths, [len(d) for d in DOCUMENTS])


def test_shards_carry_their_number_and_count(folder):
    assert sorted(os.listdir(folder / "train")) == [
        "lengths.npy",
        *(f"shard-0000{i}-of-00003.array_record" for i in range(3)),
    ]


def test_a_pickled_reader_opens_its_files_anew_and_carries_no_lengths(folder):
    reader = ShardReader(folder / "train")
    other = pickle.loads(pickle.dumps(reader))
    assert other[2].ids.tolist() == DOCUMENTS[2]
    assert isinstance(other.lengths, np.memmap)


def test_indices_beyond_the_documents_end_a_loop(folder):
    assert len(list(ShardReader(folder / "train"))) == len(DOCUMENTS)


def test_an_empty_split_is_valid(tmp_path):
    assert write_documents(tmp_path, []).documents == len(ShardReader(tmp_path)) == 0


def test_an_exception_leaves_no_file(tmp_path):
    def broken():
        for ids in DOCUMENTS:
            yield Document(np.array(ids), None, None, 0, 1)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_documents(tmp_path, broken())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ids", [[], [-1, 0], [65_536, 0]])
def test_ids_that_cannot_be_stored_are_refused(tmp_path, ids):
    with pytest.raises(ValueError, match="PMID 7"):
        write_documents(tmp_path, [Document(np.array(ids), 7, 1, 0, 1)])


def test_manifest_is_read_back_and_totals_agree(folder):
    manifest, reader = open_split(folder, "train", tokenizer_sha256="ab" * 32)
    assert manifest.splits["train"].tokens == sum(map(len, DOCUMENTS))
    assert manifest.splits["train"].bytes == sum(10 * i for i in range(len(DOCUMENTS)))
    assert manifest.filters == {"no abstract": 3}
    assert len(reader) == len(DOCUMENTS)


def test_another_tokenizer_is_refused(folder):
    with pytest.raises(UserError, match="made with tokenizer 'small'"):
        open_split(folder, "train", tokenizer_sha256="00" * 32)


def test_a_missing_split_is_named_with_those_present(folder):
    with pytest.raises(UserError, match=r"no split 'test'; choose from train"):
        open_split(folder, "test")


def test_a_folder_without_manifest_is_unfinished(tmp_path):
    with pytest.raises(UserError, match=r"manifest\.json: no such file"):
        Manifest.load(tmp_path)


def drop(*keys):
    def change(raw):
        for key in keys[:-1]:
            raw = raw[key]
        del raw[keys[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.update(format_version=3), "format_version is 3, this program reads 1 and 2"),
        (drop("format_version"), "format_version is None"),
        (drop("sources"), "sources: Field required"),
        (drop("tokenizer", "sha256"), r"tokenizer\.sha256: Field required"),
        (drop("splits", "train", "tokens"), r"splits\.train\.tokens: Field required"),
        (lambda raw: raw.update(colour="red"), "colour: Unexpected"),
        (lambda raw: raw["splits"]["train"].update(tokens="9"), r"splits\.train\.tokens: Input should be"),
        (lambda raw: raw["splits"]["train"].update(tokens=True), r"splits\.train\.tokens: Input should be"),
        (lambda raw: raw.update(splits=[]), "splits: Input should be an object"),
        (lambda raw: raw["splits"]["train"].update(documents=9), "holds 8 documents, manifest.json says 9"),
        (lambda raw: raw["splits"]["train"].update(shards=2), "holds 3 shards, manifest.json says 2"),
        (lambda raw: raw["tokenizer"].update(file="a" * 256), r"tokenizer\.file: 'aa*' is not a file of this folder"),
        (lambda raw: raw["tokenizer"].update(eos_id=-1), r"tokenizer\.eos_id: -1 is none of the \d+ ids"),
        (lambda raw: raw["tokenizer"].update(start_id=10**12), r"tokenizer\.start_id: 10{12} is none of the"),
    ],
)
def test_a_manifest_that_is_unknown_or_wrong_is_refused(folder, change, message):
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=message) as caught:
        open_split(folder, "train")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_of_the_first_format_is_read(folder):
    """It states no start token and counts no unspelled documents: each document follows EOS."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    del raw["splits"]["train"]["unspelled"], raw["tokenizer"]["start_id"]
    path.write_text(json.dumps(raw | {"format_version": 1}))
    manifest, reader = open_split(folder, "train")
    assert manifest.splits["train"].unspelled == 0
    assert [document.inputs[0] for document in reader] == [document.ids[-1] for document in reader]


def test_another_tokenizer_s_file_in_the_folder_is_refused(folder):
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: is not the tokenizer that made .* \(sha256 44136fa355b3"):
        open_split(folder, "train")


def test_every_document_begins_with_the_start_token_of_the_manifest(folder):
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    raw["tokenizer"]["start_id"] = 300
    path.write_text(json.dumps(raw))
    for document, ids in zip(open_split(folder, "train")[1], DOCUMENTS, strict=True):
        assert (document.inputs.tolist(), document.targets.tolist()) == ([300, *ids[:-1]], ids)


def test_a_manifest_that_is_not_json_is_refused(folder):
    (folder / "manifest.json").write_text('{"format_version": 1')
    with pytest.raises(UserError, match="cannot be read as JSON"):
        Manifest.load(folder)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def zeroed(path):
    path.write_bytes(bytes(path.stat().st_size))


def no_tokens(path):
    np.save(path, np.zeros(8, np.uint32))


def broken_header(path):
    content = bytearray(path.read_bytes())
    content[content.index(b"}")] = ord("(")  # NumPy's parser raises no ValueError
    path.write_bytes(content)


def wrong_lengths(path):
    np.save(path, np.ones(3, np.uint32))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("shard-00001-of-00003.array_record", os.remove, "one is missing or foreign"),
        ("shard-00001-of-00003.array_record", cut, "a shard is damaged"),
        ("lengths.npy", os.remove, r"lengths\.npy: cannot be read"),
        ("lengths.npy", cut, r"lengths\.npy: cannot be read"),
        ("lengths.npy", zeroed, r"lengths\.npy: cannot be read"),
        ("lengths.npy", broken_header, r"lengths\.npy: cannot be read"),
        ("lengths.npy", no_tokens, r"lengths\.npy: has documents of 0 tokens"),
        ("lengths.npy", wrong_lengths, "has 3 documents, the shards next to it hold 8"),
    ],
)
def test_a_damaged_split_is_refused_when_it_is_opened(folder, name, damage, message):
    damage(folder / "train" / name)
    with pytest.raises(UserError, match=message):
        open_split(folder, "train")


def test_damage_inside_a_record_is_found_when_it_is_read(folder):
    path = folder / "train" / "shard-00000-of-00003.array_record"
    content = bytearray(path.read_bytes())
    start = content.index(b"pmid")
    content[start : start + 4] = b"dimp"
    path.write_bytes(content)
    reader = ShardReader(folder / "train")
    with pytest.raises(UserError, match=r"document \d cannot be read"):
        list(reader)


def test_the_manifest_is_frozen(folder):
    with pytest.raises(dataclasses.FrozenInstanceError):
        Manifest.load(folder).settings = {}
