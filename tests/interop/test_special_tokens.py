"""Which tokens begin, end and pad a text is known after a conversion as it was before."""

import dataclasses
import json

import pytest
from random_weights import random_weights
from tiny_models import CONFIGS, train_tokenizer
from tokenizers import Tokenizer, models

from biomamba_jax import convert
from biomamba_jax.errors import UserError
from biomamba_jax.interop import read_model, write_model
from biomamba_jax.interop.tokenizers import from_sentencepiece

IDS = {"bos_token_id": 4, "eos_token_id": [5, 7], "pad_token_id": 3}


def ids_in(folder, name="config.json"):
    raw = json.loads((folder / name).read_text())
    return {key: raw[key] for key in IDS if key in raw}


def state(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(params=["mamba1", "mamba2"])
def folder(request, tmp_path):
    """A Hugging Face folder without a tokenizer."""
    weights = random_weights(dataclasses.replace(CONFIGS[request.param], vocab_size=310))
    write_model(weights, tmp_path / "hf", "hf")
    return tmp_path / "hf"


def test_ids_of_a_model_without_a_tokenizer_are_carried_through(folder, tmp_path):
    for name in ("config.json", "generation_config.json"):
        state(folder / name, **IDS)
    write_model(read_model(folder), tmp_path / "native", "native")
    write_model(read_model(tmp_path / "native"), tmp_path / "again", "hf")
    for name in ("config.json", "generation_config.json"):
        assert ids_in(tmp_path / "again", name) == IDS


def test_ids_that_nobody_knows_are_not_made_up(folder):
    assert ids_in(folder, "generation_config.json") == {}
    transformers = pytest.importorskip("transformers", reason="has defaults of its own")
    config = transformers.AutoConfig.from_pretrained(folder)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_an_id_that_is_none_is_refused_by_name(folder):
    state(folder / "config.json", eos_token_id="2")
    with pytest.raises(UserError, match=r"config\.json: eos_token_id = '2': must be a token id"):
        read_model(folder)


def test_special_tokens_beside_the_end_of_the_text_stay_what_they_were(folder, tmp_path):
    library = from_sentencepiece(train_tokenizer(tmp_path).path)
    library.save(str(folder / "tokenizer.json"))
    named = {"bos_token": library.id_to_token(4), "pad_token": {"content": library.id_to_token(3)}, "unk_token": "u"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    state(folder / "config.json", bos_token_id=4, pad_token_id=3)
    write_model(read_model(folder), tmp_path / "again", "hf")
    written = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert {key: written[key] for key in named} == named
    assert ids_in(tmp_path / "again") == {"bos_token_id": 4, "eos_token_id": 0, "pad_token_id": 3}
    write_model(read_model(folder), tmp_path / "native", "native")
    write_model(read_model(tmp_path / "native"), tmp_path / "later", "hf")
    assert json.loads((tmp_path / "later" / "tokenizer_config.json").read_text())["bos_token"] == named["bos_token"]


def test_a_tokenizer_that_the_model_cannot_have_had_is_refused_before_anything_is_written(folder, tmp_path):
    large = {f"w{i}": i for i in range(310)} | {"<|endoftext|>": 310}
    Tokenizer(models.WordLevel(large, unk_token="w0")).save(str(tmp_path / "large.json"))
    words = ["--input", str(folder), "--output", str(tmp_path / "out"), "--tokenizer", str(tmp_path / "large.json")]
    with pytest.raises(UserError, match="has 311 ids, the model 310"):
        convert.main(words)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_as_many_ids_as_the_model_is_accepted(folder, tmp_path):
    words = ["--input", str(folder), "--output", str(tmp_path / "out")]
    convert.main([*words, "--tokenizer", str(train_tokenizer(tmp_path).path)])
    assert read_model(tmp_path / "out").config.known_vocab == 310


def test_rows_beyond_the_tokenizer_s_ids_are_padding_where_the_config_does_not_say(folder, tmp_path):
    weights = dataclasses.replace(read_model(folder), tokenizer_file=train_tokenizer(tmp_path).path)
    assert weights.config.padded_vocab == 320
    write_model(weights, tmp_path / "own", "hf")
    raw = json.loads((tmp_path / "own" / "config.json").read_text())
    del raw["unpadded_vocab_size"]
    (tmp_path / "own" / "config.json").write_text(json.dumps(raw))
    assert read_model(tmp_path / "own").config.known_vocab == 310


def test_a_given_tokenizer_takes_the_place_of_the_input_s(folder, tmp_path):
    small = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "other": 1}, unk_token="other"))
    small.save(str(tmp_path / "small.json"))
    write_model(
        dataclasses.replace(read_model(folder), tokenizer_file=train_tokenizer(tmp_path).path), tmp_path / "own", "hf"
    )
    words = ["--input", str(tmp_path / "own"), "--output", str(tmp_path / "out"), "--to", "native"]
    convert.main([*words, "--tokenizer", str(tmp_path / "small.json")])
    assert read_model(tmp_path / "out").tokenizer_file == tmp_path / "out" / "tokenizer.json"
