"""Which tokens begin, end and pad a text is known after a conversion as it was before."""

import dataclasses
import json

import pytest
from random_weights import random_weights, write_undigested
from tiny_models import CONFIGS, train_tokenizer, write_byte_level
from tokenizers import Tokenizer, models, pre_tokenizers

from biomamba_jax import convert
from biomamba_jax.data.tokenizer import EOS, load_tokenizer
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
    write_undigested(weights, tmp_path / "hf", "hf")
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


def test_minus_1_is_no_token_and_an_infinite_length_leaves_as_strict_json(folder, tmp_path):
    path = write_byte_level(tmp_path / "t", [EOS], model_max_length=float("inf"))
    state(folder / "config.json", pad_token_id=-1)
    write_model(dataclasses.replace(read_model(folder), tokenizer_file=path), tmp_path / "again", "hf")
    text = (tmp_path / "again" / "tokenizer_config.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["pad_token"] == EOS
    assert ids_in(tmp_path / "again")["pad_token_id"] == 256


def test_a_tokenizer_that_the_model_cannot_have_had_is_refused_before_anything_is_written(folder, tmp_path):
    large = write_byte_level(tmp_path / "large", [EOS, *(f"<{i}>" for i in range(54))])
    words = ["--input", str(folder), "--output", str(tmp_path / "out"), "--tokenizer", str(large)]
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
    write_undigested(weights, tmp_path / "own", "mamba_ssm")
    state(tmp_path / "own" / "config.json", vocab_size=None)
    assert read_model(tmp_path / "own").config.known_vocab == 310


def test_a_given_tokenizer_takes_the_place_of_the_input_s(folder, tmp_path):
    small = write_byte_level(tmp_path / "small", [EOS])
    write_model(
        dataclasses.replace(read_model(folder), tokenizer_file=train_tokenizer(tmp_path).path), tmp_path / "own", "hf"
    )
    words = ["--input", str(tmp_path / "own"), "--output", str(tmp_path / "out"), "--to", "native"]
    with pytest.raises(UserError, match=r"--tokenizer .*: \d+ of 257 ids .* give --new_tokenizer"):
        convert.main([*words, "--tokenizer", str(small)])
    convert.main([*words, "--tokenizer", str(small), "--new_tokenizer"])
    assert read_model(tmp_path / "out").tokenizer_file == tmp_path / "out" / "tokenizer.json"


STATEMENTS = {
    "tokenizer_config.json": {"eos_token": "<over>"},
    "tokenizer_config.json, as an object": {"eos_token": {"content": "<over>", "lstrip": False}},
    "special_tokens_map.json": {"eos_token": "<over>"},
    "config.json": {"eos_token_id": 257},
    "generation_config.json": {"eos_token_id": [257, 256]},
}


@pytest.mark.parametrize("file", STATEMENTS)
def test_the_end_of_text_that_a_file_states_wins_over_a_known_name(tmp_path, file):
    path = write_byte_level(tmp_path / "t", ["</s>", "<over>", EOS])
    (tmp_path / "t" / file.partition(",")[0]).write_text(json.dumps(STATEMENTS[file]))
    tokenizer = load_tokenizer(path)
    assert tokenizer.eos_id == 257
    (tmp_path / "copy").mkdir()
    assert load_tokenizer(tokenizer.save_to(tmp_path / "copy")).eos_id == 257  # as in shards, runs and native models


def test_of_two_statements_that_of_the_tokenizer_s_own_config_counts(tmp_path):
    path = write_byte_level(tmp_path / "t", ["<a>", "<b>", "<c>"], eos_token="<b>")
    (tmp_path / "t" / "config.json").write_text('{"eos_token_id": 258, "bos_token_id": 256}')
    (tmp_path / "t" / "special_tokens_map.json").write_text('{"eos_token": "<c>"}')
    assert load_tokenizer(path).special.named == {"eos": 257, "bos": 256}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", {"eos_token": "<none>"}, "tokenizer_config.json: eos_token '<none>' is not a token"),
        ("config.json", {"eos_token_id": 300}, "config.json: eos_token_id = 300, but there are only 257 ids"),
        (
            "tokenizer_config.json",
            {"bos_token": ["<s>"]},
            r"bos_token = \[.<s>.\]: must be text",
        ),
        ("special_tokens_map.json", {"eos_token": "<no>"}, "special_tokens_map.json: eos_token '<no>' is not a token"),
        ("special_tokens_map.json", {"pad_token": 7}, "special_tokens_map.json: pad_token = 7: must be text"),
        ("tokenizer_config.json", {"add_bos_token": "false"}, "add_bos_token = 'false': must be true or false"),
        ("config.json", {"bos_token_id": 300}, "config.json: bos_token_id = 300, but there are only 257 ids"),
        ("generation_config.json", {"pad_token_id": -2}, "generation_config.json: pad_token_id = -2, but there"),
    ],
)
def test_a_stated_token_that_the_tokenizer_lacks_is_refused(tmp_path, file, content, message):
    path = write_byte_level(tmp_path / "t", [EOS])
    (path.parent / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_tokenizer(path)


def test_text_that_spells_a_special_token_is_ordinary_text_also_where_the_token_was_added_as_a_word(tmp_path):
    path = write_byte_level(tmp_path / "t", plain=["<end>", "<start>", "word"], eos_token="<end>", bos_token="<start>")
    tokenizer = load_tokenizer(path)
    [ids] = tokenizer.encode_batch(["a <end> <start> word"])
    assert tokenizer.special.named == {"eos": 256, "bos": 257}
    assert not {256, 257} & set(ids) and 258 in ids
    assert tokenizer.decode(ids) == "a <end> <start> word"


def test_a_word_that_spells_the_end_of_text_is_unknown_where_words_are_tokens(tmp_path):
    library = Tokenizer(models.WordLevel({EOS: 0, "a": 1, "[UNK]": 2}, unk_token="[UNK]"))
    library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path / "tokenizer.json").encode_batch([f"a {EOS} a", "a a"]) == [[1, 2, 1], [1, 1]]


def test_an_exported_model_keeps_what_its_tokenizer_config_states(folder, tmp_path):
    stated = {"eos_token": "<end>", "bos_token": "<start>", "chat_template": "{{ messages }}", "model_max_length": 77}
    path = write_byte_level(tmp_path / "t", ["<start>", "<end>"], **stated)
    write_model(dataclasses.replace(read_model(folder), tokenizer_file=path), tmp_path / "native", "native")
    write_model(read_model(tmp_path / "native"), tmp_path / "again", "hf")
    written = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert {key: written[key] for key in stated} == stated
    assert ids_in(tmp_path / "again") == {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
