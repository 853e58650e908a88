"""Weights of a model in memory, and the one way in and out of every format.

Dialects: "native" (model.json, params/ of orbax), "run" (a run directory of `pretrain`, read only), "hf" (Hugging Face
transformers) and "mamba_ssm" (the authors' library). Each is recognised from its folder.
"""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from biomamba_jax.config import ModelConfig
from biomamba_jax.errors import UserError
from biomamba_jax.interop import adapters, classifier, configs, names, native, sizes, tensors, tokenizers
from biomamba_jax.interop.classifier import Classifier
from biomamba_jax.interop.hub import local_folder
from biomamba_jax.interop.model_card import model_card

Dialect = Literal["native", "run", "hf", "mamba_ssm"]


@dataclasses.dataclass
class Weights:
    """A model's weights and what belongs to them.

    Attributes:
      config: the model; `vocab_size` and every size are set, settings of how to compute are at their defaults.
      params: nested dict of float32 numpy arrays, as `nnx.to_pure_dict(nnx.state(LanguageModel(config)))`.
      tokenizer_file: a `tokenizer.model` (SentencePiece) or `tokenizer.json` (Hugging Face), if there is one.
      about: what is known of the training, as JSON can hold it; see `native.describe_run`.
      classifier: a layer beside the model that names the class of a text, if there is one.
      token_ids: bos_token_id, eos_token_id and pad_token_id, as far as the model's own config.json states them.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer_file: Path | None = None
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    classifier: Classifier | None = None
    token_ids: dict[str, Any] = dataclasses.field(default_factory=dict)


def dialect_of(path: str | os.PathLike[str]) -> Dialect:
    """The dialect of the folder `path`.

    Raises:
      UserError: no such folder, or none of the dialects; says what each is recognised by.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that holds a model")
    if (folder / native.MODEL_JSON).exists():
        return "native"
    if (folder / "checkpoints").is_dir():
        return "run"
    if (folder / "config.json").exists():
        raw = native.read_json(folder / "config.json")
        if "model_type" in raw:
            return "hf"
        if "d_model" in raw and "n_layer" in raw:
            return "mamba_ssm"
        raise UserError(
            f"{folder / 'config.json'}: neither of Hugging Face (has model_type) nor of mamba_ssm (d_model and n_layer)"
        )
    raise UserError(
        f"{folder}: holds no model: a native one has {native.MODEL_JSON}, a run directory checkpoints/, Hugging Face's "
        "and mamba_ssm's a config.json"
    )


def read_model(path: str | os.PathLike[str]) -> Weights:
    """Reads a model of any dialect; of a run directory, the best or the newest checkpoint's averaged weights where it
    keeps them, adapters merged into the weights that they belong to.

    float16 and bfloat16 become float32. Memory: the float32 weights and one tensor.

    Raises:
      UserError: damaged or foreign files; tensors that do not fit the config, all in one table.
    """
    folder, dialect = Path(path), dialect_of(path)
    if dialect == "run":
        return _read_run(folder)
    if dialect == "native":
        model, params = native.read(folder)
        beside = classifier.find(folder, model.d_model)
        path, raw = folder / native.MODEL_JSON, native.read_json(folder / native.MODEL_JSON)
        ids = configs.token_ids(path, raw.get("token_ids", {}))
        return Weights(model, params, tokenizers.find(folder), native.read_about(folder), beside, ids)
    source = tensors.open_tensors(folder)
    config_json = folder / "config.json"
    raw = native.read_json(config_json)
    stated = (configs.read_hf if dialect == "hf" else configs.read_mamba_ssm)(config_json, raw)
    tokenizer_file = tokenizers.find(folder)
    vocabulary = tokenizers.vocab_size(tokenizer_file) if tokenizer_file else None
    config = sizes.model_config(config_json, stated, source.shapes, dialect, vocabulary)
    try:
        about = json.loads(source.metadata.get(tensors.METADATA, "{}"))
    except ValueError as error:
        raise UserError(f"{folder}: the metadata {tensors.METADATA} of its tensors is no JSON ({error})") from None
    params = _read_params(config, source, dialect, folder)
    ids = _token_ids(folder) if dialect == "hf" else {}
    return Weights(config, params, tokenizer_file, about, classifier.find(folder, config.d_model), ids)


def _token_ids(folder: Path) -> dict[str, Any]:
    """Those of config.json, or of generation_config.json where that one knows better."""
    found: dict[str, Any] = {}
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.exists():
            found |= configs.token_ids(path, native.read_json(path))
    return found


def _read_run(folder: Path) -> Weights:
    run = native.read_run(folder)
    trained = dict(run.params)
    head = Classifier(trained.pop("classifier"), run.labels) if run.labels else None
    params = trained
    if run.base is not None:
        params = adapters.merged(read_model(local_folder(run.base.path)).params, trained, run.base)
    return Weights(run.config, params, run.tokenizer_file, run.about, head)


def _read_params(config: ModelConfig, source: tensors.TensorSource, dialect: str, folder: Path) -> dict[str, Any]:
    params = {path: np.empty(shape, np.float32) for path, shape in names.native_shapes(config).items()}
    for tensor in sizes.expected_tensors(config, source.shapes, dialect):
        value = source.read(tensor.key)
        if tensor.key == names.HEAD and config.tie_embeddings:
            if not np.array_equal(value.view(np.int32), params["embedding"].view(np.int32)):
                raise UserError(
                    f"{folder}: the config ties the head to the embedding, but {names.HEAD} and "
                    f"{names.EMBEDDINGS[dialect]} differ; set tie_embeddings (tie_word_embeddings) to false"
                )
        else:
            tensor.read_into(params, value)
    return names.unflatten(params)


def write_model(
    weights: Weights,
    folder: str | os.PathLike[str],
    dialect: Literal["native", "hf", "mamba_ssm"],
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> list[Path]:
    """Writes a model as a new folder, whole or not at all.

    native: model.json, params/, the tokenizer. hf: what `AutoModelForCausalLM`, `AutoTokenizer` and `pipeline` load.
    mamba_ssm: what `MambaLMHeadModel.from_pretrained` loads; its pytorch_model.bin only where torch is installed.
    Each with a model card, README.md, and with classifier.safetensors where there is a classifier.

    Args:
      dtype: of the tensors; native is always float32.

    Returns:
      The files and folders written, in `folder`.

    Raises:
      UserError: the folder exists, or the dialect or dtype cannot hold the model.
    """
    if dialect == "native" and dtype != "float32":
        raise UserError(f"--dtype {dtype}: native weights are float32; give --to hf or mamba_ssm for other types")
    with _whole_folder(Path(folder)) as new:
        tokenizer_file = weights.tokenizer_file and tokenizers.copy(weights.tokenizer_file, new)
        if dialect == "native":
            native.write(new, weights.config, weights.params, weights.about, weights.token_ids)
        else:
            _write_foreign(weights, new, dialect, dtype)
        if weights.classifier is not None:
            classifier.write(weights.classifier, new)
        card = model_card(Path(folder).name, dialect, weights.config, dtype, weights.about, tokenizer_file is not None)
        (new / "README.md").write_text(card, encoding="utf-8")
    return sorted(Path(folder).iterdir())


def _write_foreign(weights: Weights, folder: Path, dialect: str, dtype: str) -> None:
    config, source = weights.config, weights.tokenizer_file
    if dialect == "hf":
        ids = weights.token_ids
        if source:  # which token ends a text is the tokenizer's to say, and that one stands in where no other is stated
            eos = tokenizers.eos_id(source)
            ids = dict.fromkeys(configs.TOKEN_IDS, eos) | ids | {"eos_token_id": eos}
            beside = source.parent / tokenizers.TOKENIZER_CONFIG
            tokenizers.write_for_transformers(source, folder, native.read_json(beside) if beside.exists() else {}, ids)
        raw = configs.write_hf(config, dtype, ids)
        native.write_json(folder / "generation_config.json", tokenizers.generation_config(config, ids))
    else:
        raw = configs.write_mamba_ssm(config)
    native.write_json(folder / "config.json", raw)
    table, flat = list(names.foreign_tensors(config, dialect)), names.flatten(weights.params)
    metadata = {tensors.METADATA: json.dumps(weights.about)} if weights.about else {}
    shapes = {tensor.key: tensor.shape for tensor in table}
    built = (tensor.build(flat) for tensor in table)
    tensors.write_safetensors(folder / tensors.SAFETENSORS, shapes, built, dtype, metadata)
    if dialect == "mamba_ssm":
        tensors.write_bin(folder)


def refuse_existing(folder: Path) -> None:
    """Raises a UserError where `folder` exists, or can never exist."""
    try:
        exists = folder.exists()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give --output another folder") from None
    if exists:
        raise UserError(f"{folder}: exists already; give --output a new folder")


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its name when the block ends, and goes when it fails."""
    refuse_existing(folder)
    new = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
        yield new
        new.chmod(0o755)
        os.rename(new, folder)
    except BaseException as error:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{folder}: cannot be written ({error})") from None
        raise
