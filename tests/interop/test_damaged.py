"""Damaged or foreign input ends in one clear line, and nothing is written."""

import json
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from random_weights import random_weights, write_undigested
from safetensors.numpy import load_file, save_file

from biomamba_jax import convert
from biomamba_jax.command_line import run_command
from biomamba_jax.config import ModelConfig
from biomamba_jax.interop import read_model

MODELS = {
    "mamba1": ModelConfig(kind="mamba1", d_model=32, n_layers=3, vocab_size=61, pad_vocab_multiple=1),
    "mamba2": ModelConfig(kind="mamba2", d_model=64, n_layers=3, vocab_size=61, pad_vocab_multiple=1),
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path) -> Path:
    """A sound Hugging Face folder."""
    write_undigested(random_weights(MODELS[request.param]), tmp_path / "hf", "hf")
    return tmp_path / "hf"


def refusal(folder: Path, capsys) -> str:
    """What `convert` says of it: one line, exit status 1, and no output folder, not even a half one."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(SystemExit) as end:
        run_command(convert.main, ["--input", str(folder), "--output", str(folder.parent / "out"), "--to", "native"])
    captured = capsys.readouterr()
    assert end.value.code == 1
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert sorted(folder.parent.iterdir()) == before
    return captured.err


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def set_config(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_missing_and_an_unexpected_tensor_are_listed_together(folder, capsys):
    def edit(tensors):
        del tensors["backbone.layers.1.mixer.D"]
        tensors["backbone.extra"] = np.zeros(3, np.float32)

    change(folder, edit)
    message = refusal(folder, capsys)
    assert "backbone.extra: unexpected, [3]" in message
    assert "backbone.layers.1.mixer.D: [" in message and "], missing" in message


def test_a_transposed_tensor_is_named_with_both_shapes(folder, capsys):
    key = "backbone.layers.2.mixer.out_proj.weight"
    change(folder, lambda tensors: tensors.update({key: np.ascontiguousarray(tensors[key].T)}))
    shape = list(load_file(folder / "model.safetensors")[key].shape)
    assert f"{key}: {shape[::-1]}, {shape}\n" in refusal(folder, capsys)


def test_a_wrong_state_size_in_the_config_is_told_once_for_all_layers(folder, capsys):
    set_config(folder / "config.json", state_size=8)
    message = refusal(folder, capsys)
    assert "d_state 8" in message
    key = "A_log" if "mamba1" in message else "conv1d.weight"
    assert message.count(f"backbone.layers.{{0-2}}.mixer.{key}:") == 1


def test_more_layers_in_the_config_than_in_the_file_are_missing(folder, capsys):
    set_config(folder / "config.json", num_hidden_layers=5)
    assert "backbone.layers.{3-4}.norm.weight: " in refusal(folder, capsys)


@pytest.mark.parametrize("kept", [4, 1000, -7])
def test_a_truncated_file_is_named(folder, kept, capsys):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path}: damaged or truncated" in refusal(folder, capsys)


def test_a_shard_that_is_not_there_is_named(folder, capsys):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors: no such file" in refusal(folder, capsys)


def test_a_tensor_in_two_files_is_named_with_both(folder, capsys):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    (folder / "b.safetensors").write_bytes((folder / "a.safetensors").read_bytes())
    index = {"weight_map": {"backbone.norm_f.weight": "a.safetensors", "b": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "b.safetensors: holds backbone." in (said := refusal(folder, capsys)) and "also in a.safetensors" in said


def test_a_head_with_a_description_that_is_nested_without_end_is_named(folder, capsys):
    metadata = {"head": "[" * 100_000}
    save_file({"weight": np.zeros((1, 1), np.float32)}, folder / "head.safetensors", metadata=metadata)
    assert "head.safetensors: is not a head" in refusal(folder, capsys)


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_pickle_with_code_is_refused_and_does_not_run(folder, form, capsys, monkeypatch):
    torch = pytest.importorskip("torch", reason="pytorch_model.bin needs torch")
    monkeypatch.chdir(folder)
    (folder / "model.safetensors").unlink()
    if form == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"backbone.norm_f.weight": Code()}))
    else:
        torch.save({"backbone.norm_f.weight": Code()}, folder / "pytorch_model.bin")
    assert "refused by torch's weights-only loader" in refusal(folder, capsys)
    assert not (folder / "ran").exists()


def test_without_torch_a_torch_file_names_the_remedy(folder, capsys, monkeypatch):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "pip install torch" in refusal(folder, capsys)


def test_settings_that_our_models_lack_are_listed(folder, capsys):
    set_config(folder / "config.json", hidden_act="gelu", time_step_limit=[0.0, 0.5])
    message = refusal(folder, capsys)
    assert "hidden_act = 'gelu'" in message
    assert "mamba2" not in (folder / "config.json").read_text() or "time_step_limit = [0.0, 0.5]" in message


def test_a_tied_head_that_differs_from_the_embedding_is_refused(folder, capsys):
    change(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["backbone.embeddings.weight"] + 1}))
    assert "differ; set tie_embeddings" in refusal(folder, capsys)


def test_a_folder_without_a_model_says_what_one_has(tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    assert "holds no model" in refusal(tmp_path / "hf", capsys)


def test_native_parameters_of_another_shape_are_listed(tmp_path, capsys):
    write_undigested(random_weights(MODELS["mamba1"]), tmp_path / "native", "native")
    path = tmp_path / "native" / "model.json"
    raw = json.loads(path.read_text())
    raw["model"]["d_state"] = 8
    path.write_text(json.dumps(raw))
    assert "layers/mixer/A_log: (3, 64, 8), (3, 64, 16)" in refusal(tmp_path / "native", capsys)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": ["mamba2"]}, "model_type ['mamba2']"),
        ({"hidden_size": "32"}, "hidden_size = '32': must be an integer"),
        ({"expand": 2.0}, "expand = 2.0: must be an integer"),
        ({"use_bias": "false"}, "use_bias = 'false': must be true or false"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon = '1e-5': must be a number"),
        ({"layer_norm_epsilon": -1}, "norm_eps = -1: must be 0 or more"),
        ({"unpadded_vocab_size": 0}, "vocab_size is 0"),
        ({"pad_vocab_size_multiple": "8"}, "pad_vocab_size_multiple = '8'"),
        ({"model_type": "mamba2", "num_heads": "2"}, "num_heads = '2'"),
        ({"model_type": "mamba2", "time_step_limit": None}, "time_step_limit = None"),
        ({"model_type": "mamba2", "time_step_limit": 5}, "time_step_limit = 5"),
        ({"model_type": "mamba2", "time_step_limit": [{}, "a"]}, "time_step_limit = [{}, 'a']"),
        ({"model_type": "mamba2", "time_step_limit": [0, 10**400]}, "time_step_limit = [0, 1000"),
        ({"eos_token_id": 61}, "eos_token_id = 61, but there are only 61 ids"),
    ],
    ids=str,
)
def test_a_setting_of_another_type_is_named_with_its_file(folder, values, message, capsys):
    set_config(folder / "config.json", **values)
    said = refusal(folder, capsys)
    assert f"{folder / 'config.json'}: " in said and message in said


def test_a_size_that_is_null_comes_from_the_tensors(folder, capsys):
    set_config(folder / "config.json", hidden_size=None, expand=None)
    assert read_model(folder).config.d_model in (32, 64)


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": 5}},
        {"weight_map": {"a": 5, "b": "c"}},
        {"weight_map": {"a": "../b"}},
        {"weight_map": {"a": ".."}},
        {"weight_map": {"a": ""}},
        {"weight_map": []},
        [],
    ],
)
def test_an_index_that_names_no_files_is_named(folder, index, capsys):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model.safetensors.index.json: " in refusal(folder, capsys)


def test_metadata_of_tensors_that_is_no_json_is_refused(folder, capsys):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"biomamba_jax": "{"})
    assert "biomamba_jax of its tensors is not JSON" in refusal(folder, capsys)


@pytest.mark.parametrize("ssm", ["x", {"layer": ["Mamba2"]}, {"dt_limit": None}, {"d_state": "16"}], ids=str)
def test_a_damaged_config_of_mamba_ssm_is_named(tmp_path, ssm, capsys):
    write_undigested(random_weights(MODELS["mamba2"]), tmp_path / "ssm", "mamba_ssm")
    set_config(tmp_path / "ssm" / "config.json", ssm_cfg=ssm)
    assert f"{tmp_path / 'ssm' / 'config.json'}: " in refusal(tmp_path / "ssm", capsys)


@pytest.mark.parametrize(
    "values",
    [{"d_state": "16"}, {"n_layers": 2.5}, {"d_model": None}, {"kind": "mamba9"}, {"vocab_size": None}],
    ids=str,
)
def test_a_native_model_s_setting_of_another_type_is_named_with_its_file(tmp_path, values, capsys):
    write_undigested(random_weights(MODELS["mamba1"]), tmp_path / "native", "native")
    path = tmp_path / "native" / "model.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"model": raw["model"] | values}))
    said = refusal(tmp_path / "native", capsys)
    assert f"{path}: is not the config of a model" in said and f"model.{next(iter(values))}" in said


def test_native_parameters_that_are_damaged_are_named(tmp_path, capsys):
    write_undigested(random_weights(MODELS["mamba1"]), tmp_path / "native", "native")
    (tmp_path / "native" / "params" / "_METADATA").write_text("{")
    assert f"{tmp_path / 'native' / 'params'}: cannot be read" in refusal(tmp_path / "native", capsys)
