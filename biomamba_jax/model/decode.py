"""A language model for inference, with unstacked parameters and unrolled layers.

Decoding is bound by reading the weights once per token. The scan over stacked layers of `LanguageModel` copies each
layer's weights before using them, at every token: 1.9 times slower on CPU. Here each layer has its own arrays and the
layers are unrolled, at the cost of a compile time that grows with their number. Modules, and so logits, are the same.

XLA's CPU backend multiplies few rows fast in some forms only. It takes bfloat16 weights directly (by YNNPACK) only if
the result is float32 and there are at least two rows; otherwise it converts the weights to float32 first, at every
token: 2.4 times slower. See `_bfloat16_product`. In float32, one row times a large matrix is faster as two halves: 64
tokens of the 130m models take 7 % less time on 2 cores. See `_product_by_halves`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike

from biomamba_jax.config import ModelConfig
from biomamba_jax.model.language_model import Block, compute_dtype
from biomamba_jax.model.layers import RMSNorm
from biomamba_jax.model.state import MixerState
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.numerics import accumulator_dtype, project

LayerStates = tuple[MixerState, ...]

_LARGE = 1 << 18
"""Smallest kernel, in elements, that is split into halves: 1.2 M gained 10 %, 0.12 M and 0.07 M nothing; no size in
between was measured."""

_MATRICES = {"kernel", "embedding", "lm_head"}
"""Parameters that are cast to the compute dtype wherever they are used, and so are stored in it."""


@struct.dataclass
class InferenceModel:
    """A model's parameters and methods; a pytree, which `jax.jit` takes as an argument. See `from_params`.

    Matrices are stored in the compute dtype, everything else in float32. For bfloat16 on CPU, kernels are [out in].
    """

    embedding: Float[Array, "V D"]
    """Embedding of each token."""
    layers: tuple[Any, ...]
    """Parameters of each layer."""
    norm_f: Any
    """Parameters of the final norm."""
    lm_head: Float[Array, "V D"] | None
    """Output head; None for the embedding."""
    config: ModelConfig = struct.field(pytree_node=False)
    """The model."""
    dtype: jnp.dtype = struct.field(pytree_node=False)
    """Compute dtype."""

    @classmethod
    def from_params(
        cls, config: ModelConfig, params: Mapping[str, Any], dtype: DTypeLike | None = None
    ) -> "InferenceModel":
        """Return the model with the parameters of a `LanguageModel`.

        Args:
          config: the model.
          params: nested dict of NumPy or JAX arrays, as `nnx.to_pure_dict(nnx.state(LanguageModel(config)))`.
          dtype: compute dtype; left out, that of the config.
        """
        dtype = jnp.dtype(dtype) if dtype is not None else compute_dtype(config)

        def place(path: tuple[Any, ...], x: Any) -> Array:
            if path[-1].key not in _MATRICES:
                return jnp.asarray(x, accumulator_dtype(dtype))
            return jnp.asarray(x.T if path[-1].key == "kernel" and _is_cpu_bfloat16(dtype) else x, dtype)

        layers = (jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(config.n_layers))
        unstacked = {**params, "layers": tuple(layers)}
        placed = jax.tree_util.tree_map_with_path(place, unstacked)
        return cls(**{"lm_head": None} | placed, config=config, dtype=dtype)

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        states: LayerStates | None = None,
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], LayerStates]:
        """Return hidden vectors and states as `LanguageModel.hidden` does, with one state per layer.

        Args:
          tokens: token ids.
          states: from the previous call, for rows that continue the same segment; None before the first token.
          segment_ids: document of each token.
        """
        block, norm_f = _graphs(self.config, self.dtype)
        h = self.embedding[tokens].astype(accumulator_dtype(self.dtype))
        after = []
        for parameters, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            h, state = nnx.merge(block, parameters)(h, state, segment_ids)
            after.append(state)
        return nnx.merge(norm_f, self.norm_f)(h), tuple(after)

    @property
    def head(self) -> Float[Array, "V D"]:
        """The output head."""
        return self.embedding if self.lm_head is None else self.lm_head

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return logits of the next token over the padded vocabulary, in float32."""
        if _is_cpu_bfloat16(self.dtype):
            return _bfloat16_product(hidden, self.head)
        dtype = accumulator_dtype(self.dtype)
        return jnp.einsum("...d,vd->...v", hidden, self.head, preferred_element_type=dtype)


def _is_cpu_bfloat16(dtype: jnp.dtype) -> bool:
    """Return True if products of `dtype` need `_bfloat16_product`."""
    return dtype == jnp.bfloat16 and dispatch.platform() == "cpu"


def _bfloat16_product(x: Float[Array, "*batch I"], weight: Float[Array, "O I"]) -> Float[Array, "*batch O"]:
    """Return x weight^T in float32, in the one form that XLA's CPU backend computes without converting the weights."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1:
        rows = jnp.concatenate([rows, jnp.zeros_like(rows)])
    y = jnp.einsum("bi,oi->bo", rows, weight, preferred_element_type=jnp.float32)
    return y[: x.size // x.shape[-1]].reshape(*x.shape[:-1], -1)


def _linear_product(x: Array, weight: Array, *_: Any, **__: Any) -> Array:
    """Return `_bfloat16_product`, as the `dot_general` of `nnx.Linear`."""
    return _bfloat16_product(x, weight).astype(x.dtype)


def _product_by_halves(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """Return x kernel, as the `dot_general` of `nnx.Linear`.

    For one row and a large kernel, in two products over half of its rows each, which XLA's CPU backend runs in
    parallel.
    """
    inputs = x.shape[-1]
    if x.size > inputs or inputs % 2 or kernel.size < _LARGE:
        return project(x, kernel)
    y = jnp.einsum("hi,hio->ho", x.reshape(2, -1), kernel.reshape(2, inputs // 2, -1))
    return y.sum(0).reshape(*x.shape[:-1], -1)


def _graphs(config: ModelConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.GraphDef]:
    """Return the graph definitions of a block and of the final norm."""
    block = nnx.eval_shape(lambda: Block(config, dtype=dtype, rngs=nnx.Rngs(0)))
    for _, module in nnx.iter_modules(block):
        if isinstance(module, nnx.Linear) and dispatch.platform() == "cpu":
            module.dot_general = _linear_product if _is_cpu_bfloat16(dtype) else _product_by_halves
    norm = nnx.eval_shape(lambda: RMSNorm(config.d_model, eps=config.norm_eps, dtype=dtype))
    return nnx.split(block)[0], nnx.split(norm)[0]
