"""A language model for inference, with unstacked parameters and unrolled layers.

Decoding is bound by reading the weights once per token. The scan over stacked layers of `LanguageModel` copies each
layer's weights before using them, at every token: 1.9 times slower on CPU. Here each layer has its own arrays and the
layers are unrolled, at the cost of a compile time that grows with their number. Modules are the same but for their
matrices, which have the dtype that they are read in: float32, bfloat16, or int8 with a scale for each output.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import ArrayLike, DTypeLike

from biomamba_jax.config import ModelConfig
from biomamba_jax.model.language_model import Block, compute_dtype
from biomamba_jax.model.layers import RMSNorm
from biomamba_jax.model.state import MixerState
from biomamba_jax.ops import dispatch, mixed_matmul
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.mixed_matmul import quantize
from biomamba_jax.ops.numerics import accumulator_dtype

LayerStates = tuple[MixerState, ...]

_MATRICES = {"kernel", "embedding", "lm_head"}
"""Parameters that are stored as a `WeightMatrix`."""


@struct.dataclass
class WeightMatrix:
    """A matrix [out in] of the compute dtype, or of int8 with the scale of each output."""

    values: Array
    """[F C]."""
    scales: Array | None = None
    """[F], of int8 values."""

    @classmethod
    def of(cls, weight: ArrayLike, dtype: DTypeLike) -> "WeightMatrix":
        """Return a weight [F C] in `dtype`."""
        return cls(*quantize(jnp.asarray(weight))) if dtype == jnp.int8 else cls(jnp.asarray(weight, dtype))

    def dense(self, dtype: DTypeLike, outputs: Array | slice = slice(None)) -> Float[Array, "*outputs C"]:
        """Return the weights of all or some outputs in a floating-point dtype: those of tokens are their embeddings."""
        dense = self.values[outputs].astype(dtype)
        return dense if self.scales is None else (dense * self.scales[outputs][..., None]).astype(dtype)

    def product(
        self, x: Float[Array, "*batch C"], implementation: dispatch.Implementation | None
    ) -> Float[Array, "*batch F"]:
        """Return x values^T * scales in float32; see `ops.mixed_matmul`."""
        return mixed_matmul(x, self.values, self.scales, implementation=implementation)


@struct.dataclass
class InferenceModel:
    """A model's parameters and methods; a pytree, which `jax.jit` takes as an argument. See `from_params`.

    Matrices are stored in `weight_dtype`, everything else in float32.
    """

    embedding: WeightMatrix
    """Embedding of each token [V D]."""
    layers: tuple[Any, ...]
    """Parameters of each layer."""
    norm_f: Any
    """Parameters of the final norm."""
    lm_head: WeightMatrix | None
    """Output head [V D]; None for the embedding."""
    config: ModelConfig = struct.field(pytree_node=False)
    """The model."""
    weight_dtype: jnp.dtype = struct.field(pytree_node=False)
    """Dtype of the matrices."""

    @classmethod
    def from_params(
        cls, config: ModelConfig, params: Mapping[str, Any], dtype: DTypeLike | None = None
    ) -> "InferenceModel":
        """Return the model with the parameters of a `LanguageModel`.

        Args:
          config: the model.
          params: nested dict of NumPy or JAX arrays, as of `init_params`.
          dtype: compute dtype, or int8 for int8 matrices and the config's compute dtype; left out, that of the config.
        """
        weight_dtype = jnp.dtype(dtype) if dtype is not None else compute_dtype(config)
        other_dtype = accumulator_dtype(_compute_dtype(config, weight_dtype))

        def place(path: tuple[Any, ...], x: Any) -> Array | WeightMatrix:
            if path[-1].key not in _MATRICES:
                return jnp.asarray(x, other_dtype)
            return WeightMatrix.of(x.T if path[-1].key == "kernel" else x, weight_dtype)

        layers = (jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(config.n_layers))
        unstacked = {**params, "layers": tuple(layers)}
        placed = jax.tree_util.tree_map_with_path(place, unstacked)
        return cls(**{"lm_head": None} | placed, config=config, weight_dtype=weight_dtype)

    @property
    def dtype(self) -> jnp.dtype:
        """Compute dtype."""
        return _compute_dtype(self.config, self.weight_dtype)

    @property
    def parameters(self) -> int:
        """Number of parameters, padding of the vocabulary included."""
        leaves = jax.tree.leaves(self, is_leaf=lambda x: isinstance(x, WeightMatrix))
        return sum((x.values if isinstance(x, WeightMatrix) else x).size for x in leaves)

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
        h = self.embedding.dense(accumulator_dtype(self.dtype), tokens)
        after = []
        for parameters, state in zip(self.layers, states or [None] * len(self.layers), strict=True):
            h, state = nnx.merge(block, parameters)(h, state, segment_ids)
            after.append(state)
        return nnx.merge(norm_f, self.norm_f)(h), tuple(after)

    @property
    def head(self) -> WeightMatrix:
        """The output head."""
        return self.embedding if self.lm_head is None else self.lm_head

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
        """Return logits of the next token over the padded vocabulary, in float32."""
        return self.head.product(hidden, self.config.implementation)


class _Linear(nnx.Linear):
    """A linear layer whose kernel is a `WeightMatrix`."""

    def __init__(self, linear: nnx.Linear, implementation: dispatch.Implementation | None):
        self.kernel, self.bias, self.dtype = linear.kernel, linear.bias, linear.dtype
        self.implementation = implementation

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Return the layer's outputs in the compute dtype."""
        y = self.kernel.get_value().product(inputs.astype(self.dtype), self.implementation).astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


def _compute_dtype(config: ModelConfig, weight_dtype: jnp.dtype) -> jnp.dtype:
    return compute_dtype(config) if weight_dtype == jnp.int8 else weight_dtype


@functools.lru_cache(maxsize=32)
def _graphs(config: ModelConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef, nnx.GraphDef]:
    """Return the graph definitions of a block and of the final norm."""
    block = nnx.eval_shape(lambda: Block(config, dtype=dtype, rngs=nnx.Rngs(0)))
    for _, module in list(nnx.iter_modules(block)):
        for name, child in list(vars(module).items()):
            if isinstance(child, nnx.Linear):
                setattr(module, name, _Linear(child, config.implementation))
    norm = nnx.eval_shape(lambda: RMSNorm(config.d_model, eps=config.norm_eps, dtype=dtype))
    return nnx.split(block)[0], nnx.split(norm)[0]
