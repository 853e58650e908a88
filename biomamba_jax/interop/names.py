"""Names and layouts of tensors: Hugging Face and mamba_ssm to and from native parameters.

One table for each kind of model, read in both directions. PyTorch stores linear weights as (out, in), the convolution
as (C, 1, K), and joins projections that are separate here; native parameters are stacked over layers along axis 0.
Sources: `mamba_ssm.modules` of state-spaces/mamba at e9594ce, `transformers.models.{mamba,mamba2}`.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import jax
import numpy as np
from flax import nnx

from biomamba_jax.config import ModelConfig
from biomamba_jax.model import init_params
from biomamba_jax.parallel.sharding import leaves_by_path

Shape = tuple[int, ...]
Params = dict[str, Any]


@dataclass(frozen=True)
class TensorLayout:
    """Layout of one native parameter of one layer in a foreign tensor; concatenation is along rows, axis 0."""

    to_foreign: Callable[[np.ndarray], np.ndarray]
    """Returns the foreign view of a native parameter."""
    to_native: Callable[[np.ndarray], np.ndarray]
    """Inverse of `to_foreign`."""
    shape: Callable[[Shape], Shape]
    """Returns the foreign shape of a native shape."""


SAME = TensorLayout(lambda x: x, lambda x: x, lambda s: s)
LINEAR = TensorLayout(lambda x: x.T, lambda x: x.T, lambda s: s[::-1])  # (in, out) <-> (out, in)
CONV = TensorLayout(lambda x: x[:, None, :], lambda x: x[:, 0, :], lambda s: (s[0], 1, s[1]))  # [C K] <-> (C, 1, K)


def neighbours(layout: TensorLayout, d_state: int) -> TensorLayout:
    """Return `layout` after a reordering of the state's dimensions, axis -1 of the native parameter.

    Dimensions n and n + d_state / 2, a rotating pair in native parameters, are neighbours in foreign ones.
    """

    def interleave(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:-1], -1, 2, d_state // 2).swapaxes(-1, -2).reshape(x.shape)

    def separate(x: np.ndarray) -> np.ndarray:
        return x.reshape(*x.shape[:-1], -1, d_state // 2, 2).swapaxes(-1, -2).reshape(x.shape)

    return TensorLayout(
        lambda x: layout.to_foreign(interleave(x)), lambda x: separate(layout.to_native(x)), shape=layout.shape
    )


Row = tuple[str, tuple[str, ...], TensorLayout]

MIXERS: dict[str, tuple[Row, ...]] = {
    "mamba1": (
        ("in_proj.weight", ("in_x/kernel", "in_z/kernel"), LINEAR),
        ("in_proj.bias", ("in_x/bias", "in_z/bias"), SAME),
        ("conv1d.weight", ("conv/weight",), CONV),
        ("conv1d.bias", ("conv/bias",), SAME),
        ("x_proj.weight", ("x_proj/kernel",), LINEAR),
        ("dt_proj.weight", ("dt_proj/kernel",), LINEAR),
        ("dt_proj.bias", ("dt_bias",), SAME),
        ("A_log", ("A_log",), SAME),
        ("D", ("D",), SAME),
        ("out_proj.weight", ("out/kernel",), LINEAR),
        ("out_proj.bias", ("out/bias",), SAME),
    ),
    "mamba2": (
        ("in_proj.weight", ("in_z/kernel", "in_x/kernel", "in_bc/kernel", "in_dt/kernel"), LINEAR),
        ("in_proj.bias", ("in_z/bias", "in_x/bias", "in_bc/bias", "in_dt/bias"), SAME),
        ("conv1d.weight", ("conv_x/weight", "conv_bc/weight"), CONV),
        ("conv1d.bias", ("conv_x/bias", "conv_bc/bias"), SAME),
        ("dt_bias", ("dt_bias",), SAME),
        ("A_log", ("A_log",), SAME),
        ("D", ("D",), SAME),
        ("norm.weight", ("norm/weight",), SAME),
        ("out_proj.weight", ("out/kernel",), LINEAR),
        ("out_proj.bias", ("out/bias",), SAME),
    ),
    "mamba3": (
        ("in_proj.weight", tuple(f"in_{part}/kernel" for part in ("z", "x", "bc", "dt", "A", "trap", "angle")), LINEAR),
        ("B_norm.weight", ("norm_B/weight",), SAME),
        ("C_norm.weight", ("norm_C/weight",), SAME),
        *((name, (name,), SAME) for name in ("dt_bias", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o", "D")),
        ("norm.weight", ("norm/weight",), SAME),
        ("out_proj.weight", ("out/kernel",), LINEAR),
    ),
}
"""Foreign name below `mixer.`, the native parameters below `layers/mixer/` that it concatenates, and their layout."""
MLP: tuple[Row, ...] = (
    ("norm2.weight", ("norm2/weight",), SAME),
    ("mlp.fc1.weight", ("mlp/up/kernel", "mlp/gate/kernel"), LINEAR),
    ("mlp.fc2.weight", ("mlp/down/kernel",), LINEAR),
)
"""Foreign name of a block's MLP, the native parameters below `layers/`, and their layout."""
_ROTATING = re.compile(r"layers/mixer/(in_bc/kernel|norm_[BC]/weight|[BC]_bias)")
"""Parameters along the state, whose rotating pairs are neighbours in SISO weights of Mamba-3."""

EMBEDDINGS = {"hf": "backbone.embeddings.weight", "mamba_ssm": "backbone.embedding.weight"}
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Tensor:
    """A foreign tensor and the native parameters that it concatenates."""

    key: str
    """Name in the foreign file."""
    parts: tuple[str, ...]
    """Paths of the native parameters."""
    part_shapes: tuple[Shape, ...]
    """Native shape of each part, of one layer."""
    layouts: tuple[TensorLayout, ...]
    """Layout of each part."""
    index: int | slice | EllipsisType = ...
    """Layer, or rows of the vocabulary, of the native parameters."""

    @property
    def shape(self) -> Shape:
        """Shape in the foreign file."""
        shapes = [lay.shape(shape) for lay, shape in zip(self.layouts, self.part_shapes, strict=True)]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def read_into(self, params: dict[str, np.ndarray], tensor: np.ndarray) -> None:
        """Copy the foreign tensor into allocated native parameters, flat by path."""
        row = 0
        for path, shape, layout in zip(self.parts, self.part_shapes, self.layouts, strict=True):
            rows = layout.shape(shape)[0]
            params[path][self.index][...] = layout.to_native(tensor[row : row + rows])
            row += rows

    def build(self, params: dict[str, np.ndarray]) -> np.ndarray:
        """Return the foreign tensor of native parameters, flat by path."""
        parts = zip(self.parts, self.layouts, strict=True)
        foreign = [layout.to_foreign(params[path][self.index]) for path, layout in parts]
        return foreign[0] if len(foreign) == 1 else np.concatenate(foreign)


def native_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every native parameter, by path."""
    return dict(_traced_shapes(config))


@functools.lru_cache(maxsize=32)  # a tenth of a second; reading a folder asks four times
def _traced_shapes(config: ModelConfig) -> Mapping[str, Shape]:
    params = jax.eval_shape(lambda: init_params(config, nnx.Rngs(0)))
    return {path: leaf.shape for path, leaf in leaves_by_path(params).items()}


def foreign_tensors(config: ModelConfig, dialect: str, rows: int = 0) -> Iterator[Tensor]:
    """Yield every tensor of this model in a file of `dialect` ("hf" or "mamba_ssm").

    A tied head repeats the embedding in mamba_ssm and is absent in Hugging Face.

    Args:
      config: the model.
      dialect: format of the file.
      rows: rows of the embedding in the file; 0: padded in mamba_ssm, the tokens in use in Hugging Face, since
        transformers would give padding a share of the probability.
    """
    shapes = native_shapes(config)
    rows = rows or (config.known_vocab if dialect == "hf" else config.padded_vocab)

    def vocabulary(key: str, path: str) -> Tensor:
        return Tensor(key, (path,), ((rows, config.d_model),), (SAME,), slice(rows))

    def layout_of(path: str, layout: TensorLayout) -> TensorLayout:
        siso = config.kind == "mamba3" and config.mimo_rank is None
        return neighbours(layout, config.state_size) if siso and _ROTATING.fullmatch(path) else layout

    yield vocabulary(EMBEDDINGS[dialect], "embedding")
    for layer in range(config.n_layers):
        prefix = f"backbone.layers.{layer}."
        mixer = [(f"mixer.{key}", tuple(f"mixer/{p}" for p in parts), lay) for key, parts, lay in MIXERS[config.kind]]
        for key, names, layout in [("norm.weight", ("norm/weight",), SAME), *mixer, *MLP]:
            parts = tuple(f"layers/{name}" for name in names)
            if parts[0] in shapes:  # biases and others are optional
                layouts = tuple(layout_of(part, layout) for part in parts)
                yield Tensor(prefix + key, parts, tuple(shapes[part][1:] for part in parts), layouts, layer)
    yield Tensor("backbone.norm_f.weight", ("norm_f/weight",), (shapes["norm_f/weight"],), (SAME,))
    if not config.tie_embeddings or dialect == "mamba_ssm":
        yield vocabulary(HEAD, "embedding" if config.tie_embeddings else "lm_head")
