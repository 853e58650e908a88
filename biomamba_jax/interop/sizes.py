"""Sizes of a model from its tensors, and their comparison with its config."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from biomamba_jax.config import ModelConfig
from biomamba_jax.errors import UserError
from biomamba_jax.interop.names import EMBEDDINGS, HEAD, Shape, Tensor, foreign_tensors

_LAYER = re.compile(r"^backbone\.layers\.(\d+)\.(.*)$")
# Padded GPT-NeoX vocabularies of the released models, with 50,277 ids in use.
_KNOWN_PADDING = {50280: 50277, 50288: 50277}
_USUAL_MULTIPLES = (16, 8, 4, 2, 1)


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
    rows = shapes.get(EMBEDDINGS[dialect], (0, 0))[0]
    fields = {"n_groups": 1} | _from_tensors(stated["kind"], shapes, dialect) | stated
    vocabulary = _vocabulary(path, rows, stated, tokenizer_vocab) if rows else {}
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
    found: dict[str, Any] = {"n_layers": max(layers, default=0) + 1, "bias": "mixer.in_proj.bias" in first}
    found |= {"conv_bias": "mixer.conv1d.bias" in first, "tie_embeddings": dialect == "mamba_ssm" or HEAD not in shapes}

    def size(field: str, key: str, axis: int) -> None:
        if key in first and len(first[key]) > axis:
            found[field] = first[key][axis]

    size("d_model", "norm.weight", 0)
    size("d_conv", "mixer.conv1d.weight", 2)
    size("inner", "mixer.out_proj.weight", 1)
    if kind == "mamba1":
        size("d_state", "mixer.A_log", 1)
        size("dt_rank", "mixer.dt_proj.weight", 1)
    else:
        size("heads", "mixer.A_log", 0)
        size("channels", "mixer.conv1d.weight", 0)
    inner, heads, channels = (found.pop(name, None) for name in ("inner", "heads", "channels"))
    if inner and "d_model" in found:
        found["expand"] = max(inner // found["d_model"], 1)
    if inner and heads:
        found["headdim"] = max(inner // heads, 1)
    if inner and channels and channels > inner:
        found["d_state"] = (channels - inner) // 2  # assumes one group unless the config states more
    return found


def _vocabulary(path: Path, rows: int, stated: dict[str, Any], tokenizer_vocab: int | None) -> dict[str, int]:
    """Return `vocab_size` and a `pad_vocab_multiple` that pads it to exactly `rows`."""
    if tokenizer_vocab is not None and tokenizer_vocab > rows:
        raise UserError(
            f"{path.parent}: its tokenizer has {tokenizer_vocab} ids, but the embedding only {rows} rows; "
            "the two do not belong together"
        )
    in_use = stated.get("vocab_size", rows)
    if in_use < 1:
        raise UserError(f"{path}: vocab_size is {in_use}: must be at least 1")
    if in_use > rows:
        raise UserError(f"{path}: vocab_size is {in_use}, but the embedding has only {rows} rows")
    in_use = min(in_use, tokenizer_vocab or rows)
    if in_use == rows and tokenizer_vocab is None:
        in_use = _KNOWN_PADDING.get(rows, rows)
    candidates = (stated.get("pad_vocab_multiple", 0), *_USUAL_MULTIPLES, rows)
    fits = (m for m in candidates if m and rows % m == 0 and rows - m < in_use)
    return {"vocab_size": in_use, "pad_vocab_multiple": next(fits)}


def compare(path: Path, config: ModelConfig, shapes: dict[str, Shape], dialect: str) -> None:
    """Raise a UserError with a table unless `shapes` are exactly those of `config`'s tensors."""
    expected = {tensor.key: tensor.shape for tensor in expected_tensors(config, shapes, dialect)}
    keys = sorted(expected.keys() | shapes.keys(), key=lambda key: (_pattern(key), _layer(key)))
    groups: dict[tuple[str, str, str], list[int]] = {}
    for key in keys:
        want, have = expected.get(key), shapes.get(key)
        if want != have:
            row = (
                _pattern(key),
                "unexpected" if want is None else f"{list(want)}",
                "missing" if have is None else f"{list(have)}",
            )
            groups.setdefault(row, []).append(_layer(key))
    if groups:
        table = "; ".join(
            f"{key.replace('*', _ranges(layers))}: {want}, {have}" for (key, want, have), layers in groups.items()
        )
        sizes = (
            f"{config.n_layers} layers, d_model {config.d_model}, d_state {config.state_size}, expand {config.expand}"
        )
        raise UserError(f"{path}: {config.kind} of {sizes} does not fit the tensors (key: expected, found): {table}")


def expected_tensors(config: ModelConfig, shapes: dict[str, Shape], dialect: str) -> list[Tensor]:
    """Return the tensors to read: those of the dialect, a tied head only if the file repeats it."""
    tensors = list(foreign_tensors(config, dialect))
    if config.tie_embeddings:
        tensors = [tensor for tensor in tensors if tensor.key != HEAD]
        if HEAD in shapes:
            embedding = next(tensor for tensor in tensors if tensor.key == EMBEDDINGS[dialect])
            tensors.append(dataclasses.replace(embedding, key=HEAD))
    return tensors


def _pattern(key: str) -> str:
    return f"backbone.layers.*.{match[2]}" if (match := _LAYER.match(key)) else key


def _layer(key: str) -> int:
    return int(match[1]) if (match := _LAYER.match(key)) else -1


def _ranges(layers: list[int]) -> str:
    """Return "{0-2,5}" for [0, 1, 2, 5], and a single number without braces."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs)
    return f"{{{text}}}" if len(layers) > 1 else text
