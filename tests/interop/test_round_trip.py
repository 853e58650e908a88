"""From any format to any other and back: the same bits, and the same config."""

import dataclasses
import json
import os
import signal
import sys

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from random_weights import random_weights, write_undigested
from safetensors.numpy import load_file, save_file

from biomamba_jax import convert
from biomamba_jax.config import ModelConfig
from biomamba_jax.errors import UserError
from biomamba_jax.interop import Weights, dialect_of, read_model, write_model
from biomamba_jax.parallel.sharding import leaves_by_path

MODELS = {
    "mamba1": ModelConfig(kind="mamba1", d_model=32, n_layers=2, vocab_size=61, pad_vocab_multiple=8),
    "mamba1, odd": ModelConfig(
        kind="mamba1", d_model=24, n_layers=2, vocab_size=61, pad_vocab_multiple=1, bias=True, tie_embeddings=False,
        dt_rank=3, d_state=8, expand=3, d_conv=3,
    ),
    "mamba2": ModelConfig(kind="mamba2", d_model=64, n_layers=2, vocab_size=61, pad_vocab_multiple=16),
    "mamba2, odd": ModelConfig(
        kind="mamba2", d_model=32, n_layers=2, vocab_size=64, pad_vocab_multiple=1, bias=True, tie_embeddings=False,
        headdim=16, n_groups=2, d_state=24, conv_bias=False, chunk_size=32,
    ),
    "mamba3": ModelConfig(kind="mamba3", d_model=64, n_layers=2, vocab_size=61, d_intermediate=128),
    "mamba3, odd": ModelConfig(
        kind="mamba3", d_model=32, n_layers=2, vocab_size=64, pad_vocab_multiple=1, tie_embeddings=False, headdim=16,
        n_groups=2, d_state=24, mimo_rank=3, rope_fraction=1.0, outproj_norm=True, a_floor=0.01,
    ),
}  # fmt: skip


@pytest.fixture(params=MODELS)
def weights(request) -> Weights:
    weights = random_weights(MODELS[request.param])
    for path in {"embedding", "lm_head"} & weights.params.keys():
        weights.params[path][weights.config.known_vocab :] = 0  # padding, which has no place in Hugging Face files
    return weights


def assert_equal(ours: Weights, theirs: Weights) -> None:
    assert ours.config == theirs.config
    assert ours.about == theirs.about
    left, right = leaves_by_path(ours.params), leaves_by_path(theirs.params)
    assert left.keys() == right.keys()
    for path in left:
        assert right[path].dtype == np.float32
        np.testing.assert_array_equal(left[path], right[path], err_msg=path)


@pytest.mark.parametrize("dialect", ["native", "hf", "mamba_ssm"])
def test_native_weights_come_back_from_every_format_bit_for_bit(weights, dialect, tmp_path):
    weights.about = {"steps": 3, "tokens": 99}
    write_model(weights, tmp_path / "a", "native")
    write_model(read_model(tmp_path / "a"), tmp_path / "b", dialect)
    assert dialect_of(tmp_path / "b") == dialect
    write_model(read_model(tmp_path / "b"), tmp_path / "c", "native")
    assert_equal(weights, read_model(tmp_path / "c"))


def test_hugging_face_files_come_back_from_mamba_ssm_bit_for_bit(weights, tmp_path):
    write_model(weights, tmp_path / "hf", "hf")
    write_model(read_model(tmp_path / "hf"), tmp_path / "ssm", "mamba_ssm")
    write_model(read_model(tmp_path / "ssm"), tmp_path / "again", "hf")
    names = sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in set(names) - {"README.md"}:  # the model card names its folder
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_half_precision_file_is_upcast_and_written_back_unchanged(weights, dtype, tmp_path):
    write_model(weights, tmp_path / "half", "hf", dtype)
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {dtype}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == dtype
    write_model(read_model(tmp_path / "half"), tmp_path / "again", "hf", dtype)
    half, again = (tmp_path / name / "model.safetensors" for name in ("half", "again"))
    assert half.read_bytes() == again.read_bytes()


def test_a_value_beyond_float16_is_refused_by_name(weights, tmp_path):
    leaves_by_path(weights.params)["layers/mixer/D"][1, 0] = 1e6
    with pytest.raises(UserError, match=r"backbone\.layers\.1\.mixer\.D .*float16"):
        write_model(weights, tmp_path / "out", "hf", "float16")
    assert list(tmp_path.iterdir()) == []


def test_sharded_safetensors_read_like_a_single_file(weights, tmp_path):
    write_model(weights, tmp_path / "hf", "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "model.safetensors").unlink()
    keys, index = sorted(tensors), {}
    for number, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"model-{number:05}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, tmp_path / "hf" / name)
        index |= dict.fromkeys(part, name)
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_equal(weights, read_model(tmp_path / "hf"))


def test_a_torch_file_reads_like_safetensors(weights, tmp_path):
    pytest.importorskip("torch", reason="pytorch_model.bin needs torch")
    write_model(weights, tmp_path / "ssm", "mamba_ssm")
    (tmp_path / "ssm" / "model.safetensors").unlink()
    assert_equal(weights, read_model(tmp_path / "ssm"))


def test_the_tensors_decide_the_number_of_rows_and_released_padding_is_known(tmp_path):
    config = ModelConfig(kind="mamba1", d_model=16, n_layers=1, vocab_size=50280, pad_vocab_multiple=8)
    write_model(random_weights(config), tmp_path / "ssm", "mamba_ssm")
    back = read_model(tmp_path / "ssm").config  # without a tokenizer: 50,280 rows are GPT-NeoX's 50,277 ids
    assert (back.vocab_size, back.padded_vocab, back.pad_vocab_multiple) == (50277, 50280, 8)


def test_a_released_mamba1_config_without_layer_or_sizes_is_enough(tmp_path):
    """As in state-spaces/mamba-130m: an empty ssm_cfg, and a head that repeats the embedding."""
    weights = random_weights(ModelConfig(kind="mamba1", d_model=32, n_layers=2, vocab_size=61, pad_vocab_multiple=8))
    write_undigested(weights, tmp_path / "ssm", "mamba_ssm")
    released = {
        "d_model": 32,
        "n_layer": 2,
        "vocab_size": 61,
        "ssm_cfg": {},
        "rms_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    (tmp_path / "ssm" / "config.json").write_text(json.dumps(released))
    assert_equal(weights, read_model(tmp_path / "ssm"))


def test_sizes_that_a_config_leaves_out_come_from_the_tensors(tmp_path):
    config = ModelConfig(
        kind="mamba2", d_model=32, n_layers=2, vocab_size=61, headdim=16, d_state=24, expand=3, d_conv=3
    )
    weights = random_weights(dataclasses.replace(config, bias=True, tie_embeddings=False, pad_vocab_multiple=1))
    write_undigested(weights, tmp_path / "hf", "hf")
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "mamba2"}')
    assert_equal(weights, read_model(tmp_path / "hf"))


@pytest.mark.parametrize("rank", [None, 2])
def test_a_released_mamba3_config_needs_no_sizes(rank, tmp_path):
    weights = random_weights(dataclasses.replace(MODELS["mamba3"], n_groups=2, mimo_rank=rank, rope_fraction=1.0))
    write_undigested(weights, tmp_path / "ssm", "mamba_ssm")
    mixer = {"layer": "Mamba3", "is_mimo": rank is not None} | ({"mimo_rank": rank} if rank else {})
    released = {"d_model": 64, "n_layer": 2, "vocab_size": 61, "ssm_cfg": mixer}
    (tmp_path / "ssm" / "config.json").write_text(json.dumps(released))
    assert_equal(weights, read_model(tmp_path / "ssm"))


def test_the_command_converts_and_lists_what_it_wrote(weights, tmp_path, capsys):
    write_model(weights, tmp_path / "hf", "hf")
    convert.main(["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "out"), "--to", "native"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("model.json", "params", "README.md"))
    assert_equal(weights, read_model(tmp_path / "out"))


def test_an_export_is_strict_json_and_states_what_transformers_needs(weights, tmp_path):
    if weights.config.tie_embeddings:
        weights.config = dataclasses.replace(weights.config, norm_eps=1e-3)
    weights.about = {"steps": 3, "tokens": 99, "evaluation": {"step": 3, "loss": float("nan")}}
    write_model(weights, tmp_path / "hf", "hf")

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    for path in (tmp_path / "hf").glob("*.json"):
        json.loads(path.read_text(), parse_constant=refuse)
    config, raw = weights.config, json.loads((tmp_path / "hf" / "config.json").read_text())
    assert raw["intermediate_size"] == raw["expand"] * raw["hidden_size"] == config.d_inner
    assert raw["layer_norm_epsilon"] == config.norm_eps and raw["tie_word_embeddings"] == config.tie_embeddings
    assert raw["vocab_size"] == config.known_vocab
    again = read_model(tmp_path / "hf")
    assert again.config == config and again.about["evaluation"]["loss"] == "NaN"
    write_model(again, tmp_path / "native", "native")
    json.loads((tmp_path / "native" / "model.json").read_text(), parse_constant=refuse)


def test_an_existing_folder_is_left_alone(weights, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        write_model(weights, tmp_path / "out", "hf")
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_bfloat16_keeps_the_nearest_values(weights, tmp_path):
    write_model(weights, tmp_path / "hf", "hf", "bfloat16")
    expected = weights.params["embedding"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(read_model(tmp_path / "hf").params["embedding"], expected)


def test_without_torch_the_command_says_which_file_is_missing(weights, tmp_path, capsys, monkeypatch):
    write_model(weights, tmp_path / "native", "native")
    monkeypatch.setitem(sys.modules, "torch", None)
    convert.main(["--input", str(tmp_path / "native"), "--output", str(tmp_path / "out"), "--to", "mamba_ssm"])
    assert "torch is not installed: pytorch_model.bin" in capsys.readouterr().out


def test_ctrl_c_counts_once_the_threads_that_write_have_ended_and_leaves_nothing(tmp_path, monkeypatch):
    ended, save = [], ocp.Checkpointer.save

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        save(*arguments, **options)
        ended.append(True)

    monkeypatch.setattr(ocp.Checkpointer, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_model(random_weights(MODELS["mamba2"]), tmp_path / "native", "native")
    assert ended and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["file/out", "n" * 300])
def test_an_output_that_cannot_be_is_refused_in_one_line(weights, name, tmp_path):
    write_model(weights, tmp_path / "native", "native")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        convert.main(["--input", str(tmp_path / "native"), f"--output={tmp_path}/{name}", "--to", "hf"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "native"]


def test_an_output_may_have_the_longest_name_that_there_is(weights, tmp_path):
    write_model(weights, tmp_path / ("n" * 255), "hf")
    assert_equal(weights, read_model(tmp_path / ("n" * 255)))
