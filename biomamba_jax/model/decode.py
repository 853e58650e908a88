"""A language model laid out for inference: the arrays of each layer apart, the layers one after the other.

Decoding is bound by reading the weights once a token. The scan over stacked layers of `LanguageModel` copies each
layer's weights before it uses them, at every token: 1.9 times slower on CPU. Here each layer has arrays of its own and
the layers are unrolled, which costs compile time that grows with their number. Modules, and so logits, are the same.

XLA's CPU backend multiplies a few rows well in some forms only. bfloat16 as it is (by YNNPACK) only where the result is
float32 and there are two rows at least; otherwise it converts the weights to float32 first, at every token: 2.4 times
slower. See `_product`. In float32, one row takes a large matrix faster as two halves: 64 tokens of the 130m models in
7 % less time on 2 cores. See `_product_by_halves`.
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
from biomamba_jax.ops.numerics import project

LayerStates = tuple[MixerState, ...]

_LARGE = 1 << 18
"""Elements of a kernel from which it is taken as halves: 1.2 M gained 10 %, 0.12 M and 0.07 M nothing; none between was
measured."""

_MATRICES = {"kernel", "embedding", "lm_head"}
"""Parameters that are cast to the compute type wherever they are used, and so can be kept in it."""


@struct.dataclass
class InferenceModel:
    """Parameters and what to do with them; a pytree, so that it goes into `jax.jit` as an argument. See `from_params`.

    Matrices are kept in the compute type, everything else in float32. Where `_narrow`, kernels are [out in].
    """

    embedding: Float[Array, "V D"]
    layers: tuple[Any, ...]
    norm_f: Any
    lm_head: Float[Array, "V D"] | None
    """None: the embedding."""
    config: ModelConfig = struct.field(pytree_node=False)
    dtype: jnp.dtype = struct.field(pytree_node=False)

    @classmethod
    def from_params(
        cls, config: ModelConfig, params: Mapping[str, Any], dtype: DTypeLike | None = None
    ) -> "InferenceModel":
        """Lays out the parameters of a `LanguageModel`.

        Args:
          params: nested dict of arrays of numpy or JAX, as `nnx.to_pure_dict(nnx.state(LanguageModel(config)))`.
          dtype: compute type; left out, that of the config.
        """
        dtype = jnp.dtype(dtype) if dtype is not None else compute_dtype(config)

        def place(path: tuple[Any, ...], x: Any) -> Array:
            if path[-1].key not in _MATRICES:
                return jnp.asarray(x, jnp.promote_types(dtype, jnp.float32))
            return jnp.asarray(x.T if path[-1].key == "kernel" and _narrow(dtype) else x, dtype)

        def take(name: str) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, x: place((jax.tree_util.DictKey(name), *path), x), params[name]
            )

        layers = []
        for index in range(config.n_layers):
            one = jax.tree.map(lambda x, index=index: x[index], params["layers"])
            layers.append(jax.tree_util.tree_map_with_path(place, one))
        return cls(
            embedding=take("embedding"),
            layers=tuple(layers),
            norm_f=take("norm_f"),
            lm_head=None if config.tie_embeddings else take("lm_head"),
            config=config,
            dtype=dtype,
        )

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        states: LayerStates | None = None,
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], LayerStates]:
        """As `LanguageModel.hidden`, with one state a layer.

        Args:
          states: what a call before returned, for rows that go on with the same segment; None before the first token.
        """
        block, norm_f = _graphs(self.config, self.dtype)
        h = self.embedding[tokens].astype(jnp.promote_types(self.dtype, jnp.float32))
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
        """Logits of the next token, in float32, over the padded vocabulary."""
        if _narrow(self.dtype):
            return _product(hidden, self.head)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return jnp.einsum("...d,vd->...v", hidden, self.head, preferred_element_type=wide)


def _narrow(dtype: jnp.dtype) -> bool:
    """Whether products of `dtype` need `_product`."""
    return dtype == jnp.bfloat16 and dispatch.platform() == "cpu"


def _product(x: Float[Array, "*batch I"], weight: Float[Array, "O I"]) -> Float[Array, "*batch O"]:
    """x weight^T in float32, in the one form that XLA's CPU backend computes without converting the weights."""
    rows = x.reshape(-1, x.shape[-1])
    if rows.shape[0] == 1:
        rows = jnp.concatenate([rows, jnp.zeros_like(rows)])
    y = jnp.einsum("bi,oi->bo", rows, weight, preferred_element_type=jnp.float32)
    return y[: x.size // x.shape[-1]].reshape(*x.shape[:-1], -1)


def _linear_product(x: Array, weight: Array, *_: Any, **__: Any) -> Array:
    """`_product` as the `dot_general` of `nnx.Linear`."""
    return _product(x, weight).astype(x.dtype)


def _product_by_halves(x: Array, kernel: Array, *_: Any, **__: Any) -> Array:
    """x kernel, as the `dot_general` of `nnx.Linear`: for one row and a large kernel a product over half of its rows
    and one over the other half, which XLA's CPU backend has under way at the same time."""
    inputs = x.shape[-1]
    if x.size > inputs or inputs % 2 or kernel.size < _LARGE:
        return project(x, kernel)
    y = jnp.einsum("hi,hio->ho", x.reshape(2, -1), kernel.reshape(2, inputs // 2, -1))
    return y.sum(0).reshape(*x.shape[:-1], -1)


def _graphs(config: ModelConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.GraphDef]:
    """The structure of a block and of the last norm, without arrays."""
    block = nnx.eval_shape(lambda: Block(config, dtype=dtype, rngs=nnx.Rngs(0)))
    for _, module in nnx.iter_modules(block):
        if isinstance(module, nnx.Linear) and dispatch.platform() == "cpu":
            module.dot_general = _linear_product if _narrow(dtype) else _product_by_halves
    norm = nnx.eval_shape(lambda: RMSNorm(config.d_model, eps=config.norm_eps, dtype=dtype))
    return nnx.split(block)[0], nnx.split(norm)[0]
