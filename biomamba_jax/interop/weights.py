"""Weights of a model in memory, read from and written to every format.

Dialects: "native" (model.json, params/ of orbax), "run" (a run directory of `pretrain`, read-only), "hf" (Hugging Face
transformers) and "mamba_ssm" (the authors' library). Each is recognised by its files.
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
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json, write_json, write_text
from biomamba_jax.interop import adapters, classifier, configs, names, native, sizes, tensors, tokenizers
from biomamba_jax.interop.classifier import Classifier
from biomamba_jax.interop.hub import local_folder
from biomamba_jax.interop.model_card import model_card

Dialect = Literal["native", "run", "hf", "mamba_ssm"]


@dataclasses.dataclass
class Weights:
    """A model's weights, tokenizer and metadata."""

    config: ModelConfig
    """The model; every size is set, and execution settings are at their defaults."""
    params: dict[str, Any]
    """Nested dict of float32 numpy arrays, like `nnx.to_pure_dict(nnx.state(LanguageModel(config)))`."""
    tokenizer_file: Path | None = None
    """`tokenizer.model` (SentencePiece) or `tokenizer.json` (Hugging Face)."""
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Information about the training, see `native.describe_run`."""
    classifier: Classifier | None = None
    """Classification head."""
    token_ids: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Those of bos_token_id, eos_token_id and pad_token_id that the model's config.json states."""


def dialect_of(path: str | os.PathLike[str]) -> Dialect:
    """Return the dialect of a folder.

    Raises:
      UserError: the folder doesn't exist or has none of the dialects.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder of a model")
    if (folder / native.MODEL_JSON).exists():
        return "native"
    if (folder / "checkpoints").is_dir():
        return "run"
    if (folder / "config.json").exists():
        raw = read_json(folder / "config.json")
        if "model_type" in raw:
            return "hf"
        if "d_model" in raw and "n_layer" in raw:
            return "mamba_ssm"
        raise UserError(
            f"{folder / 'config.json'}: has neither Hugging Face's model_type nor mamba_ssm's d_model and n_layer"
        )
    raise UserError(
        f"{folder}: holds no model: no {native.MODEL_JSON} (native), checkpoints/ (a run directory) or config.json "
        "(Hugging Face and mamba_ssm)"
    )


def read_model(path: str | os.PathLike[str]) -> Weights:
    """Read a model of any dialect; of a run directory see `native.read_run`, with adapters merged into their base.

    float16 and bfloat16 are converted to float32. Memory: the float32 weights and one tensor.

    Raises:
      UserError: a file is damaged or unknown, or tensors do not fit the config; lists all of these.
    """
    folder, dialect = Path(path), dialect_of(path)
    if dialect == "run":
        return _read_run(folder)
    if dialect == "native":
        config, params, about, ids = native.read(folder)
        return Weights(config, params, tokenizers.find(folder), about, classifier.find(folder, config.d_model), ids)
    source = tensors.open_tensors(folder)
    config_json = folder / "config.json"
    raw = read_json(config_json)
    stated = (configs.read_hf if dialect == "hf" else configs.read_mamba_ssm)(config_json, raw)
    tokenizer_file = tokenizers.find(folder)
    vocabulary = load_tokenizer(tokenizer_file).vocab_size if tokenizer_file else None
    config = sizes.model_config(config_json, stated, source.shapes, dialect, vocabulary)
    try:
        about = json.loads(source.metadata.get(tensors.METADATA, "{}"))
    except ValueError as error:
        raise UserError(f"{folder}: the metadata {tensors.METADATA} of its tensors is not JSON ({error})") from None
    params = _read_params(config, source, dialect, folder)
    ids = _token_ids(folder) if dialect == "hf" else {}
    return Weights(config, params, tokenizer_file, about, classifier.find(folder, config.d_model), ids)


def _token_ids(folder: Path) -> dict[str, Any]:
    """Return the ids that config.json states; those of generation_config.json win."""
    found: dict[str, Any] = {}
    for path in (folder / "config.json", folder / "generation_config.json"):
        if path.exists():
            found |= configs.token_ids(path, read_json(path))
    return found


def _read_run(folder: Path) -> Weights:
    run = native.read_run(folder)
    params = dict(run.params)
    head = Classifier(params.pop("classifier"), run.labels) if run.labels else None
    if run.base is not None:
        params = adapters.merged(read_model(local_folder(run.base.path)).params, params, run.base)
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
    """Write a model as a new folder, atomically.

    native: model.json, params/ and the tokenizer. hf: files for `AutoModelForCausalLM`, `AutoTokenizer` and `pipeline`.
    mamba_ssm: files for `MambaLMHeadModel.from_pretrained`; pytorch_model.bin only if torch is installed. Each with a
    model card, README.md, and with classifier.safetensors if there is a classifier.

    Args:
      weights: the model.
      folder: folder to create.
      dialect: format to write.
      dtype: dtype of the tensors; native is always float32.

    Returns:
      The paths written, in `folder`.

    Raises:
      UserError: the folder exists, or the dialect or dtype cannot represent the model.
    """
    if dialect == "native" and dtype != "float32":
        raise UserError(f"--dtype {dtype}: native weights are float32; give --to hf or mamba_ssm for other types")
    # Strict JSON has no NaN: these become strings.
    weights = dataclasses.replace(weights, about=json.loads(json.dumps(weights.about), parse_constant=str))
    with _whole_folder(Path(folder)) as new:
        tokenizer_file = weights.tokenizer_file and load_tokenizer(weights.tokenizer_file).save_to(new)
        if dialect == "native":
            native.write(new, weights.config, weights.params, weights.about, weights.token_ids)
        else:
            _write_foreign(weights, new, dialect, dtype)
        if weights.classifier is not None:
            classifier.write(weights.classifier, new)
        card = model_card(Path(folder).name, dialect, weights.config, dtype, weights.about, tokenizer_file is not None)
        write_text(new / "README.md", card)
    return sorted(Path(folder).iterdir())


def _write_foreign(weights: Weights, folder: Path, dialect: str, dtype: str) -> None:
    config, source = weights.config, weights.tokenizer_file
    if dialect == "hf":
        ids = weights.token_ids
        if source:  # its EOS token is authoritative, and the default of the other special tokens
            eos = load_tokenizer(source).eos_id
            ids = dict.fromkeys(configs.TOKEN_IDS, eos) | ids | {"eos_token_id": eos}
            beside = source.parent / tokenizers.TOKENIZER_CONFIG
            tokenizers.write_for_transformers(source, folder, read_json(beside) if beside.exists() else {}, ids)
        raw = configs.write_hf(config, dtype, ids)
        write_json(folder / "generation_config.json", tokenizers.generation_config(config, ids))
    else:
        raw = configs.write_mamba_ssm(config)
    write_json(folder / "config.json", raw)
    table, flat = list(names.foreign_tensors(config, dialect)), names.flatten(weights.params)
    metadata = {tensors.METADATA: json.dumps(weights.about)} if weights.about else {}
    shapes = {tensor.key: tensor.shape for tensor in table}
    built = (tensor.build(flat) for tensor in table)
    tensors.write_safetensors(folder / tensors.SAFETENSORS, shapes, built, dtype, metadata)
    if dialect == "mamba_ssm":
        tensors.write_bin(folder)


def refuse_existing(folder: Path) -> None:
    """Raise a UserError if `folder` exists or cannot exist."""
    try:
        exists = folder.exists()
    except OSError as error:  # the name is too long, or a parent folder not accessible
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give --output another folder") from None
    if exists:
        raise UserError(f"{folder}: exists already; give --output a new folder")


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `folder`, renamed to it when the block ends and removed when it raises."""
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
