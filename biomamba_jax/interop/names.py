"""Names and layouts: which tensors of Hugging Face and mamba_ssm hold which native parameters, and how they lie.

One table for each kind of model, read in both directions. PyTorch keeps linear weights as (out, in), the convolution
as (C, 1, K), and joins projections that are apart here; native parameters are stacked over layers along a first axis.
Sources: `mamba_ssm.modules` of state-spaces/mamba at e9594ce, `transformers.models.{mamba,mamba2}`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from biomamba_jax.config import ModelConfig
from biomamba_jax.model import LanguageModel

Shape = tuple[int, ...]
Params = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How one native parameter of one layer lies in a foreign tensor; rows (axis 0) are what joined tensors share."""

    to_foreign: Callable[[np.ndarray], np.ndarray]
    to_native: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[Shape], Shape]


SAME = Layout(lambda x: x, lambda x: x, lambda s: s)
LINEAR = Layout(lambda x: x.T, lambda x: x.T, lambda s: s[::-1])  # (in, out) <-> (out, in)
CONV = Layout(lambda x: x[:, None, :], lambda x: x[:, 0, :], lambda s: (s[0], 1, s[1]))  # [C K] <-> (C, 1, K)

Row = tuple[str, tuple[str, ...], Layout]

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
}
"""Foreign name below `mixer.`, the native parameters below `layers/mixer/` whose rows it joins, and their layout."""

EMBEDDINGS = {"hf": "backbone.embeddings.weight", "mamba_ssm": "backbone.embedding.weight"}
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Tensor:
    """One foreign tensor: `parts` are paths of native parameters; `layer` is None outside the layers."""

    key: str
    parts: tuple[str, ...]
    part_shapes: tuple[Shape, ...]
    layout: Layout
    layer: int | None = None

    @property
    def shape(self) -> Shape:
        """Its shape in the foreign file."""
        shapes = [self.layout.shape(shape) for shape in self.part_shapes]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def read_into(self, params: dict[str, np.ndarray], tensor: np.ndarray) -> None:
        """Copies the foreign tensor into native parameters that are already there, flat by path."""
        row = 0
        for path, shape in zip(self.parts, self.part_shapes, strict=True):
            rows = self.layout.shape(shape)[0]
            target = params[path] if self.layer is None else params[path][self.layer]
            target[...] = self.layout.to_native(tensor[row : row + rows])
            row += rows

    def build(self, params: dict[str, np.ndarray]) -> np.ndarray:
        """The foreign tensor, from native parameters flat by path."""
        parts = [params[path] if self.layer is None else params[path][self.layer] for path in self.parts]
        foreign = [self.layout.to_foreign(part) for part in parts]
        return foreign[0] if len(foreign) == 1 else np.concatenate(foreign)


def native_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Shape of every native parameter, by path."""
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    return {path: leaf.shape for path, leaf in flatten(nnx.to_pure_dict(nnx.state(model))).items()}


def foreign_tensors(config: ModelConfig, dialect: str) -> Iterator[Tensor]:
    """Every tensor that a file of `dialect` ("hf" or "mamba_ssm") holds for this model.

    A tied head is the embedding once more in mamba_ssm and absent in Hugging Face.
    """
    shapes = native_shapes(config)

    def whole(key: str, path: str) -> Tensor:
        return Tensor(key, (path,), (shapes[path],), SAME)

    yield whole(EMBEDDINGS[dialect], "embedding")
    for layer in range(config.n_layers):
        prefix = f"backbone.layers.{layer}."
        rows = [
            (f"mixer.{key}", tuple(f"layers/mixer/{p}" for p in parts), lay) for key, parts, lay in MIXERS[config.kind]
        ]
        for key, parts, layout in [("norm.weight", ("layers/norm/weight",), SAME), *rows]:
            if parts[0] in shapes:  # biases that this model does not have
                yield Tensor(prefix + key, parts, tuple(shapes[part][1:] for part in parts), layout, layer)
    yield whole("backbone.norm_f.weight", "norm_f/weight")
    if not config.tie_embeddings:
        yield whole(HEAD, "lm_head")
    elif dialect == "mamba_ssm":
        yield whole(HEAD, "embedding")


def path_name(path: tuple[Any, ...]) -> str:
    """A path of `jax.tree_util` as "layers/norm/weight"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Params) -> dict[str, Any]:
    """{"layers/norm/weight": leaf, ...} of a nested dict."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in paths}


def unflatten(flat: dict[str, Any]) -> Params:
    """The nested dict that `flatten` came from."""
    tree: Params = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree
