"""Tokenizers: whatever file they come from, text in and out is the same, and every one can end a document."""

import random

import hypothesis
import pytest
import tokenizers
from corpora import WORDS
from hypothesis import strategies as st

from biomamba_jax.config.prepare import TokenizerTraining
from biomamba_jax.data.text import clean_document
from biomamba_jax.data.tokenizer import EOS, load_tokenizer, train_sentencepiece
from biomamba_jax.errors import UserError

TEXTS = [" ".join(random.Random(i).choices(WORDS, k=40)) + "\nResults: α-helix." for i in range(200)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_sentencepiece(TEXTS, 300, tmp_path_factory.mktemp("tokenizer") / "small.model")


@pytest.fixture(scope="module")
def neox(shared_data):
    return load_tokenizer(shared_data / "tokenizers" / "gpt_neox_20b_tokenizer.json")


def test_training_gives_the_asked_size_with_eos_first(trained):
    assert (trained.vocab_size, trained.eos_id) == (300, 0)
    assert trained.decode([0]) == EOS


def test_the_same_texts_train_the_same_bytes(trained, tmp_path):
    assert train_sentencepiece(iter(TEXTS), 300, tmp_path / "again.model").sha256 == trained.sha256


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581\x00")))
@hypothesis.settings(max_examples=200)
def test_clean_text_survives_the_trained_tokenizer(trained, text):
    text = clean_document(text)
    ids = trained.encode_batch([text])[0]
    assert trained.decode(ids) == text
    assert not {0, 1} & set(ids)  # neither end of text nor unknown


@hypothesis.given(st.text(st.characters(exclude_categories=["Cs"])))
@hypothesis.settings(max_examples=100)
def test_clean_text_survives_gpt_neox(neox, text):
    text = clean_document(text)
    assert neox.decode(neox.encode_batch([text])[0]) == text


def test_digits_stand_alone(trained):
    ids = trained.encode_batch(["25 3"])[0]
    assert [trained.decode([i]) for i in ids if trained.decode([i]).strip().isdigit()] == ["2", "5", "3"]


def test_a_batch_is_its_texts_one_by_one(trained):
    assert trained.encode_batch(TEXTS[:5]) == [trained.encode_batch([text])[0] for text in TEXTS[:5]]


@pytest.mark.parametrize("which", ["trained", "neox"])
def test_a_batch_is_decoded_as_its_parts(which, request):
    tokenizer = request.getfixturevalue(which)
    for end in ([], [tokenizer.eos_id]):
        batch = [[*ids, *end] for ids in tokenizer.encode_batch([*TEXTS[:3], ""])]
        assert tokenizer.decode_batch(batch) == [tokenizer.decode(ids) for ids in batch]


def test_gpt_neox_is_the_published_one(neox):
    assert (neox.vocab_size, neox.eos_id) == (50277, 0)
    assert neox.encode_batch([" yes", " no", " maybe"]) == [[4754], [642], [5046]]


@pytest.mark.parametrize("which", ["trained", "neox"])
def test_a_text_that_spells_the_end_of_text_does_not_end_it(which, request):
    tokenizer = request.getfixturevalue(which)
    ids = tokenizer.encode_batch([f"a {EOS} b"])[0]
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == f"a {EOS} b{EOS}"


@pytest.mark.parametrize("which", ["trained", "neox"])
def test_a_saved_tokenizer_is_the_same_one(which, request, tmp_path):
    tokenizer = request.getfixturevalue(which)
    copy = load_tokenizer(tokenizer.save_to(tmp_path))
    assert (copy.sha256, copy.eos_id) == (tokenizer.sha256, tokenizer.eos_id)


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(path))
    with pytest.raises(UserError, match=r"tokenizer\.json: has no end-of-text token"):
        load_tokenizer(path)


def word_level(path, unk_token="[UNK]", **vocabulary):
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({EOS: 0, **vocabulary}, unk_token=unk_token))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("(x+)+$"), "isolated")
    made.save(str(path))
    return path


def test_a_tokenizer_that_lacks_its_own_unknown_token_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot encode text \(.*\[UNK\]"):
        load_tokenizer(word_level(tmp_path / "tokenizer.json", a=1))


def test_an_expression_without_end_is_one_line(tmp_path):
    loaded = load_tokenizer(word_level(tmp_path / "tokenizer.json", **{"[UNK]": 1}))
    with pytest.raises(UserError, match=r"tokenizer\.json: cannot encode text \(.*retry-limit"):
        loaded.encode_batch(["x" * 60 + "!"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("a.json", "{}"), ("a.json", "\xff"), ("a.json", ""), ("a.model", "no"), ("a.model", ""), ("a.txt", "a")),
        ("none.model", None),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, name, content, capfd):
    if content is not None:
        (tmp_path / name).write_text(content, "latin-1")
    with pytest.raises(UserError, match=name):
        load_tokenizer(tmp_path / name)
    assert not capfd.readouterr().err  # SentencePiece's own log


def test_ids_far_beyond_the_tokens_are_refused(tmp_path):
    """Each would get a row of the embedding."""
    with pytest.raises(UserError, match=r"tokenizer\.json: has ids up to 1,000,000 for 3 tokens"):
        load_tokenizer(word_level(tmp_path / "tokenizer.json", a=10**6, **{"[UNK]": 1}))


@pytest.mark.parametrize("size", [100, 100_000, 2**40])
def test_an_impossible_vocabulary_is_refused(tmp_path, size):
    with pytest.raises(UserError, match=f"--train-tokenizer {size}"):
        train_sentencepiece(TEXTS, size, tmp_path / "a.model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_either_kind_is_reproducible_and_spells_every_text(tmp_path, kind):
    training = TokenizerTraining(305, tokenizer_kind=kind)
    one, other = (train_sentencepiece(iter(TEXTS), training, tmp_path / f"{name}.model") for name in "ab")
    assert one.sha256 == other.sha256
    assert one.vocab_size == 305
    text = "Zürich: 漢字 \U0001f9ec grew\nby 125 mg."
    assert one.decode(one.encode_batch([text])[0]) == text


def test_digits_stand_alone_unless_asked_otherwise(tmp_path):
    texts = [f"dose 2500 mg, {text}" for text in TEXTS]
    apart = train_sentencepiece(texts, TokenizerTraining(308, "bpe"), tmp_path / "a.model")
    whole = TokenizerTraining(308, "bpe", tokenizer_split_digits=False)
    together = train_sentencepiece(texts, whole, tmp_path / "b.model")
    lengths = [len(tokenizer.encode_batch([" 2500"])[0]) for tokenizer in (apart, together)]
    assert lengths[0] >= 4 > lengths[1]


def test_without_byte_fallback_all_pieces_are_learnt(tmp_path):
    tokenizer = train_sentencepiece(TEXTS, TokenizerTraining(50, tokenizer_byte_fallback=False), tmp_path / "a.model")
    assert tokenizer.vocab_size == 50
    assert tokenizer.encode_batch(["漢"])[0][-1] == 1
