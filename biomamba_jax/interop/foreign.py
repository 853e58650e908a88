"""Folders of Hugging Face transformers and of mamba_ssm: config.json, tensors, and a tokenizer for transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from biomamba_jax.config import ModelConfig
from biomamba_jax.data.special_tokens import TOKEN_IDS, token_ids
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json, write_json
from biomamba_jax.interop import configs, heads, names, sizes, tensors, tokenizers, vocabulary
from biomamba_jax.interop.weights import Weights
from biomamba_jax.parallel.sharding import leaves_by_path


def read(folder: Path, dialect: str) -> Weights:
    """Read a folder of `dialect`, "hf" or "mamba_ssm"; float16 and bfloat16 are converted to float32.

    Raises:
      UserError: a file is damaged, or tensors do not fit the config; lists all of these.
    """
    source, config_json = tensors.open_tensors(folder), folder / "config.json"
    stated = (configs.read_hf if dialect == "hf" else configs.read_mamba_ssm)(config_json, read_json(config_json))
    tokenizer_file = tokenizers.find(folder)
    tokenizer = load_tokenizer(tokenizer_file) if tokenizer_file else None
    ids_in_use = tokenizer.vocab_size if tokenizer else None
    config = sizes.model_config(config_json, stated, source.shapes, dialect, ids_in_use)
    try:
        about = json.loads(source.metadata.get(tensors.METADATA, "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder}: the metadata {tensors.METADATA} of its tensors is not JSON ({error})") from None
    if not isinstance(about, dict):
        raise UserError(f"{folder}: the metadata {tensors.METADATA} of its tensors is not a mapping")
    vocabulary.check_recorded(folder, tokenizer, about.pop("tokenizer", None))
    params = _read_params(config, source, dialect, folder)
    ids: dict[str, Any] = {}
    for path in (config_json, folder / "generation_config.json") if dialect == "hf" else ():  # the last one wins
        ids |= token_ids(path, read_json(path), config.known_vocab) if path.exists() else {}
    return Weights(config, params, tokenizer_file, about, heads.find(folder, config), ids)


def _read_params(config: ModelConfig, source: tensors.TensorSource, dialect: str, folder: Path) -> dict[str, Any]:
    params = {path: np.zeros(shape, np.float32) for path, shape in names.native_shapes(config).items()}
    for tensor in sizes.expected_tensors(config, source.shapes, dialect):
        value = source.read(tensor.key)
        if not (tensor.key == names.HEAD and config.tie_embeddings):
            tensor.read_into(params, value)
        elif not np.array_equal(value.view(np.int32), params["embedding"][tensor.index].view(np.int32)):
            raise UserError(
                f"{folder}: the config ties the head to the embedding, but {names.HEAD} and "
                f"{names.EMBEDDINGS[dialect]} differ; set tie_embeddings (tie_word_embeddings) to false"
            )
    return unflatten_dict(params, sep="/")


def write(weights: Weights, folder: Path, dialect: str, dtype: str) -> None:
    """Write everything but the tokenizer's own file, which must be in `folder`; arguments as of `write_model`."""
    config, source = weights.config, weights.tokenizer_file
    if dialect == "hf":
        ids, special = weights.token_ids, None
        if source:  # its EOS token is authoritative, and the default of the other special tokens
            special = load_tokenizer(source).special
            eos, stated = special.eos, ids.get("eos_token_id")
            known = {"bos_token_id": special.start} | {f"{name}_token_id": id for name, id in special.named.items()}
            ids = {key: ids.get(key, known.get(key, eos)) for key in TOKEN_IDS}
            ids["eos_token_id"] = stated if isinstance(stated, list) and eos in stated else eos
            tokenizers.write_for_transformers(source, folder, ids)
        raw = configs.write_hf(config, dtype, ids)
        raw |= {"start_token_id": special.start} if special else {}
        if "auto_map" in raw:
            heads.write_code(folder, raw["model_type"])
        if weights.head is not None:
            heads.write_for_transformers(weights.head, folder, raw)
        write_json(folder / "generation_config.json", ids)
    else:
        raw = configs.write_mamba_ssm(config)
    write_json(folder / "config.json", raw)
    table, flat = list(names.foreign_tensors(config, dialect)), leaves_by_path(weights.params)
    recorded = {"tokenizer": vocabulary.identity(load_tokenizer(source))} if source else {}
    about = weights.about | recorded
    metadata = {tensors.METADATA: json.dumps(about)} if about else {}
    shapes = {tensor.key: tensor.shape for tensor in table}
    built = (tensor.build(flat) for tensor in table)
    tensors.write_safetensors(folder / tensors.SAFETENSORS, shapes, built, dtype, metadata)
    if dialect == "mamba_ssm":
        tensors.write_bin(folder)
