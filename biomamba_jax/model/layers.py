"""The small parts that both mixers are built from."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from biomamba_jax.config import ModelConfig
from biomamba_jax.model import initializers
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.numerics import project
from biomamba_jax.parallel.collectives import UNSHARDED, Collectives


def dense(
    d_in: int, d_out: int, *, bias: bool = False, scale: float = 1.0, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    """A linear layer with float32 parameters that computes in `dtype`."""
    return nnx.Linear(
        d_in,
        d_out,
        use_bias=bias,
        dtype=dtype,
        kernel_init=initializers.linear(d_in, scale),
        bias_init=nnx.initializers.zeros,
        dot_general=_product,
        rngs=rngs,
    )


def _product(x: Array, kernel: Array, dimensions: object, **options: object) -> Array:
    """The product of `nnx.Linear`, which is always x @ kernel at default options."""
    del dimensions, options
    return project(x, kernel)


def row_parallel(linear: nnx.Linear, x: Float[Array, "*batch C"], collectives: Collectives) -> Float[Array, "*batch F"]:
    """linear(x) where x's channels, and the kernel's rows, are spread over devices; the bias is added once."""
    if collectives.tensor == 1:
        return linear(x)
    y = collectives.reduce_from_tensor_parallel(project(x, linear.kernel[...].astype(x.dtype)))
    return y if linear.bias is None else y + linear.bias[...].astype(y.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm with a weight; the output has the compute type. See `ops.rms_norm`."""

    def __init__(self, channels: int, *, eps: float, groups: int = 1, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones(channels))
        self.eps, self.groups, self.dtype = eps, groups, dtype

    def __call__(
        self, x: Float[Array, "B L C"], gate: Float[Array, "B L C"] | None = None, collectives: Collectives = UNSHARDED
    ) -> Float[Array, "B L C"]:
        """The norm of x, or of x * silu(gate).

        Args:
          collectives: where the channels are spread over devices.
        """
        return collectives.rms_norm(x, self.weight[...], gate, eps=self.eps, groups=self.groups).astype(self.dtype)


class CausalConv1d(nnx.Module):
    """Depthwise causal convolution with SiLU that resets at segment borders. See `ops.causal_conv1d`."""

    def __init__(self, channels: int, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.d_conv
        init = initializers.linear(width)
        self.weight = nnx.Param(init(rngs.params(), (channels, width)))
        self.bias = nnx.Param(init(rngs.params(), (channels,))) if config.conv_bias else None
        self.dtype, self.implementation = dtype, config.implementation

    def __call__(
        self,
        x: Float[Array, "B L C"],
        state: Float[Array, "B K-1 C"] | None,
        segment_ids: Int[Array, "B L"] | None,
        collectives: Collectives = UNSHARDED,
    ) -> tuple[Float[Array, "B L C"], Float[Array, "B K-1 C"]]:
        return collectives.causal_conv1d(
            x,
            self.weight[...].astype(self.dtype),
            None if self.bias is None else self.bias[...].astype(self.dtype),
            segment_ids=segment_ids,
            initial_state=state,
            implementation=self.implementation,
        )


def negative_exp(a_log: nnx.Param) -> jax.Array:
    """A = -exp(A_log): every mode decays."""
    return -jnp.exp(a_log[...])
