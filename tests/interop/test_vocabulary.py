"""A model belongs to one tokenizer: another is refused where they meet, or taken with rows that follow its tokens."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from random_weights import random_weights
from tiny_models import CONFIGS, sentences, train_tokenizer, write_byte_level, write_tiny_model

from biomamba_jax import prepare, pretrain
from biomamba_jax.config import PretrainConfig
from biomamba_jax.data.tokenizer import EOS, load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.interop import read_model, write_model
from biomamba_jax.interop.vocabulary import require_same, row_sources, with_tokenizer

MERGES = [("Ġ", "p"), ("e", "n"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he")]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece model, which writes a space as U+2581."""
    return train_tokenizer(tmp_path_factory.mktemp("pieces"))


@pytest.fixture(scope="module")
def bytes_and_merges(tmp_path_factory):
    """A byte-level tokenizer, which writes a space as U+0120 and has each byte as a letter."""
    return load_tokenizer(write_byte_level(tmp_path_factory.mktemp("bytes"), [EOS], merges=MERGES))


def test_tokens_of_different_kinds_of_tokenizers_meet_by_the_text_that_they_spell(pieces, bytes_and_merges):
    sources = row_sources(pieces, bytes_and_merges)
    for token, source in enumerate(sources.tolist()):
        if source >= 0:
            assert pieces.decode([5, source])[1:] == bytes_and_merges.decode([5, token])[1:] or source == pieces.eos_id
    found = {bytes_and_merges.token(token): pieces.token(source) for token, source in enumerate(sources) if source >= 0}
    assert found["Ġthe"] == "▁the" and found[EOS] == EOS and found["a"] == "a" and found["Ġ"] in ("▁", "<0x20>")
    assert "Ã" not in found  # in one the letter, in the other half of a letter
    np.testing.assert_array_equal(row_sources(pieces, pieces), np.arange(pieces.vocab_size))


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_of_the_same_spelling_keep_their_rows_and_the_others_are_drawn_like_them(pieces, bytes_and_merges, tied):
    config = dataclasses.replace(CONFIGS["mamba2"], vocab_size=pieces.vocab_size, tie_embeddings=tied)
    before = dataclasses.replace(random_weights(config), tokenizer_file=pieces.path)
    after, drawn = with_tokenizer(before, bytes_and_merges)
    sources = row_sources(pieces, bytes_and_merges)
    assert after.config.vocab_size == bytes_and_merges.vocab_size and drawn == (sources < 0).sum() > 0
    assert after.tokenizer_file == bytes_and_merges.path
    for name in ("embedding",) if tied else ("embedding", "lm_head"):
        old, new = before.params[name][: pieces.vocab_size], after.params[name]
        assert new.shape == (after.config.padded_vocab, config.d_model)
        np.testing.assert_array_equal(new[: len(sources)][sources >= 0], old[sources[sources >= 0]])
        fresh = new[: len(sources)][sources < 0]
        assert 0.7 < fresh.std() / old.std() < 1.3 and not (fresh[:, None] == old).all(-1).any()
    assert after.params["norm_f"] is before.params["norm_f"]


def test_the_same_tokens_in_another_file_are_no_other_tokenizer(bytes_and_merges, tmp_path):
    """As transformers rewrites a tokenizer.json, or with tokens added behind those of the ids."""
    raw = json.loads(bytes_and_merges.path.read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw, indent=1))
    more = write_byte_level(tmp_path / "more", [EOS, "<|asks|>"], merges=MERGES)
    for ours in (tmp_path / "tokenizer.json", more):
        require_same(load_tokenizer(ours), bytes_and_merges, "shards", "")


def test_other_tokens_or_another_start_are_refused_with_both_digests(pieces, bytes_and_merges, tmp_path):
    with pytest.raises(
        UserError, match=rf"shards: \d+ of 262 ids .*{bytes_and_merges.sha256[:12]}.*{pieces.sha256[:12]}"
    ):
        require_same(pieces, bytes_and_merges, "shards", "do this")
    other = write_byte_level(tmp_path / "t", [EOS, "<|end|>"], merges=MERGES, eos_token="<|end|>")
    with pytest.raises(UserError, match=r"shards: 0 of 262 ids .*end 261.*; do this"):
        require_same(load_tokenizer(other), bytes_and_merges, "shards", "do this")


@pytest.mark.parametrize("dialect", ["native", "hf", "mamba_ssm"])
def test_a_folder_whose_tokenizer_was_replaced_is_refused(pieces, dialect, tmp_path):
    folder = write_tiny_model(tmp_path / "m", "mamba2", pieces, dialect)
    assert read_model(folder).about == {}
    other = write_byte_level(tmp_path / "t", [EOS], merges=MERGES)
    (folder / "tokenizer.model").unlink()
    shutil.copy(other, folder / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        read_model(folder)


def test_shards_of_another_tokenizer_are_refused_or_taken_with_new_rows(pieces, bytes_and_merges, tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences()[:50]))
    words = f"--input {tmp_path}/a.jsonl --output {tmp_path}/shards --workers 1 --tokenizer {bytes_and_merges.path}"
    prepare.main(words.split())
    folder = write_tiny_model(tmp_path / "m", "mamba2", pieces)
    config = PretrainConfig(init_from=str(folder), run_dir=str(tmp_path / "run"))
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(tmp_path / "shards")))
    with pytest.raises(UserError, match=r"shards: \d+ of 262 ids of its tokenizer .*give --new_tokenizer"):
        pretrain.with_initial_weights(config)
    caplog.set_level("INFO")
    changed, params = pretrain.with_initial_weights(dataclasses.replace(config, new_tokenizer=True))
    assert changed.model.vocab_size == 262 and params["embedding"].shape[0] == changed.model.padded_vocab
    assert "of 262 tokens keep their embeddings" in caplog.text
    write_model(dataclasses.replace(read_model(folder), tokenizer_file=None), tmp_path / "bare", "mamba_ssm")
    pretrain.with_initial_weights(dataclasses.replace(config, init_from=str(tmp_path / "bare")))
    assert "has no tokenizer" in caplog.text
