"""Sizes of a model from its tensors, and their comparison with its config."""

import dataclasses
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from biomamba_jax.config import ModelConfig
from biomamba_jax.errors import UserError
from biomamba_jax.interop.names import EMBEDDINGS, HEAD, Shape, Tensor, foreign_tensors

_LAYER = re.compile(r"^backbone\.layers\.(\d+)\.(.*)$")
# Padded GPT-NeoX vocabularies of the released models, with 50,277 ids in use.
_KNOWN_PADDING = {50280: 50277, 50288: 50277}
_USUAL_MULTIPLES = (16, 8, 4, 2, 1)
# Size -> tensor of a layer and its axis.
_COMMON_AXES = {
    "d_model": ("norm.weight", 0),
    "d_conv": ("mixer.conv1d.weight", 2),
    "inner": ("mixer.out_proj.weight", 1),
    "d_intermediate": ("mlp.fc2.weight", 1),
}
_AXES = {
    "mamba1": _COMMON_AXES | {"d_state": ("mixer.A_log", 1), "dt_rank": ("mixer.dt_proj.weight", 1)},
    "mamba2": _COMMON_AXES | {"heads": ("mixer.A_log", 0), "channels": ("mixer.conv1d.weight", 0)},
    "mamba3": _COMMON_AXES
    | {
        "heads": ("mixer.dt_bias", 0),
        "d_state": ("mixer.B_norm.weight", 0),
        "mimo_rank": ("mixer.mimo_x", 1),
        "rows": ("mixer.in_proj.weight", 0),
    },
}


def model_config(
    path: Path, stated: dict[str, Any], shapes: dict[str, Shape], dialect: str, tokenizer_vocab: int | None
) -> ModelConfig:
    """Return the config of the model that `shapes` describe.

    Args:
      path: path of config.json, for messages.
      stated: fields of ModelConfig that config.json states; the others are inferred from the tensors.
      shapes: shape of every tensor, by name.
      dialect: "hf" or "mamba_ssm".
      tokenizer_vocab: number of ids of the tokenizer in the same folder, if there is one.

    Raises:
      UserError: the tensors are not those of such a model; lists every missing or unexpected tensor and wrong shape.
    """
    embedding = shapes.get(EMBEDDINGS[dialect], (0, 0))
    if len(embedding) != 2:
        raise UserError(f"{path.parent}: {EMBEDDINGS[dialect]} has shape {list(embedding)}, not [rows, width]")
    _refuse_absurd(path, stated, shapes)
    fields = {"n_groups": 1} | _from_tensors(stated["kind"], shapes, dialect) | stated
    vocabulary = _vocabulary(path, embedding[0], stated, dialect, tokenizer_vocab) if embedding[0] else {}
    try:
        config = ModelConfig(**(fields | vocabulary))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    compare(path, config, shapes, dialect)
    return config


def _from_tensors(kind: str, shapes: dict[str, Shape], dialect: str) -> dict[str, Any]:
    """Return the sizes that can be inferred from the tensors."""
    first = {match[2]: shape for key, shape in shapes.items() if (match := _LAYER.match(key)) and match[1] == "0"}
    layers = [int(match[1]) for key in shapes if (match := _LAYER.match(key))]
    found: dict[str, Any] = {
        size: first[key][axis] for size, (key, axis) in _AXES[kind].items() if len(first.get(key, ())) > axis
    }
    inner, heads, channels, rows = (found.pop(name, 0) for name in ("inner", "heads", "channels", "rows"))
    if inner and "d_model" in found:
        found["expand"] = max(inner // found["d_model"], 1)
    if inner and heads:
        found["headdim"] = max(inner // heads, 1)
    if inner and channels > inner:
        found["d_state"] = (channels - inner) // 2  # assumes one group unless the config states more
    if rows and found.get("d_state"):  # rows of z, x, B, C, dt, A, trap and angle
        group = 2 * found["d_state"] * found.get("mimo_rank", 1)
        found["n_groups"], angles = divmod(rows - 2 * inner - 3 * heads, group)
        found |= {"rope_fraction": 2 * angles / found["d_state"], "outproj_norm": "mixer.norm.weight" in first}
    found |= {"n_layers": max(layers, default=0) + 1, "bias": "mixer.in_proj.bias" in first}
    if kind != "mamba3":
        found["conv_bias"] = "mixer.conv1d.bias" in first
    return found | {"tie_embeddings": dialect == "mamba_ssm" or HEAD not in shapes}


def _refuse_absurd(path: Path, stated: dict[str, Any], shapes: dict[str, Shape]) -> None:
    """Refuse sizes that no tensor here can have, before anything of such a size is built."""
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    bounds = {"n_layers": len(shapes), "pad_vocab_multiple": 1 << 16, "chunk_size": 1 << 31}
    for name, value in stated.items():
        if type(value) is int and value > bounds.get(name, max(largest, 1)):
            raise UserError(f"{path}: {name} = {value!r:.100}: more than the tensors next to it can have")


def _vocabulary(
    path: Path, rows: int, stated: dict[str, Any], dialect: str, tokenizer_vocab: int | None
) -> dict[str, int]:
    """Return `vocab_size` and a `pad_vocab_multiple` that pads it to `rows`.

    Where all rows of a Hugging Face file are in use, the multiple is the one that the file states for our padding.
    """
    if tokenizer_vocab is not None and tokenizer_vocab > rows:
        raise UserError(
            f"{path.parent}: its tokenizer has {tokenizer_vocab} ids, but the embedding only {rows} rows; "
            "the two do not belong together"
        )
    in_use, multiple = stated.get("vocab_size", rows), stated.get("pad_vocab_multiple", 0)
    if in_use < 1:
        raise UserError(f"{path}: vocab_size is {in_use}: must be at least 1")
    if in_use > rows:
        raise UserError(f"{path}: vocab_size is {in_use}, but the embedding has only {rows} rows")
    if dialect == "hf" and multiple and -(-in_use // multiple) * multiple != rows:
        in_use = rows  # resized in transformers since it was exported
    if tokenizer_vocab is not None:
        in_use = tokenizer_vocab
    elif in_use == rows:
        in_use = _KNOWN_PADDING.get(rows, rows)
    if in_use == rows and dialect == "hf" and multiple:
        return {"vocab_size": in_use, "pad_vocab_multiple": multiple}
    fits = (m for m in (multiple, *_USUAL_MULTIPLES, rows) if m and rows % m == 0 and rows - m < in_use)
    return {"vocab_size": in_use, "pad_vocab_multiple": next(fits)}


def compare(path: Path, config: ModelConfig, shapes: dict[str, Shape], dialect: str) -> None:
    """Raise a UserError with a table unless `shapes` are exactly those of `config`'s tensors."""
    wanted = {tensor.key: str(list(tensor.shape)) for tensor in expected_tensors(config, shapes, dialect)}
    found = {key: str(list(shape)) for key, shape in shapes.items()}
    groups: dict[tuple[str, str, str], list[int]] = {}
    for pattern, layer, key in sorted((*_pattern(key), key) for key in wanted.keys() | found.keys()):
        row = (pattern, wanted.get(key, "unexpected"), found.get(key, "missing"))
        if row[1] != row[2]:
            groups.setdefault(row, []).append(layer)
    if groups:
        rows = (f"{key.replace('*', _ranges(layers))}: {want}, {have}" for (key, want, have), layers in groups.items())
        raise UserError(
            f"{path}: {config.kind} of {config.n_layers} layers, d_model {config.d_model}, d_state {config.state_size}"
            f", expand {config.expand} does not fit the tensors (key: expected, found): {'; '.join(rows)}"
        )


def expected_tensors(config: ModelConfig, shapes: dict[str, Shape], dialect: str) -> list[Tensor]:
    """Return the tensors to read: those of the dialect, a tied head only if the file repeats it."""
    tensors = list(foreign_tensors(config, dialect, shapes.get(EMBEDDINGS[dialect], (0,))[0]))
    if config.tie_embeddings:
        tensors = [tensor for tensor in tensors if tensor.key != HEAD]
        if HEAD in shapes:
            embedding = next(tensor for tensor in tensors if tensor.key == EMBEDDINGS[dialect])
            tensors.append(dataclasses.replace(embedding, key=HEAD))
    return tensors


def _pattern(key: str) -> tuple[str, int]:
    """Return ("backbone.layers.*.NAME", layer), or (key, -1) of a tensor outside the layers."""
    return (f"backbone.layers.*.{match[2]}", int(match[1])) if (match := _LAYER.match(key)) else (key, -1)


def _ranges(layers: list[int]) -> str:
    """Return "{0-2,5}" for [0, 1, 2, 5], and a single number without braces."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"{{{text}}}" if len(layers) > 1 else text
