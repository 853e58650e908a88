"""Layers that the mixers and blocks are built from."""

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
    """Return a linear layer with float32 parameters that computes in `dtype`."""
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
    """Return x @ kernel, the only product that `nnx.Linear` computes."""
    del dimensions, options
    return project(x, kernel)


def row_parallel(linear: nnx.Linear, x: Float[Array, "*batch C"], collectives: Collectives) -> Float[Array, "*batch F"]:
    """Return linear(x) of channels sharded over tensor, as the kernel's rows are.

    The products are all-reduced; the bias is added once, after that.
    """
    if collectives.tensor == 1:
        return linear(x)
    y = collectives.reduce_from_tensor_parallel(project(x, linear.kernel[...].astype(x.dtype)))
    return y if linear.bias is None else y + linear.bias[...].astype(y.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm with a weight; the output has the compute dtype. See `ops.rms_norm`."""

    def __init__(self, channels: int, *, eps: float, groups: int = 1, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones(channels))
        self.eps, self.groups, self.dtype = eps, groups, dtype

    def __call__(
        self,
        x: Float[Array, "*batch C"],
        gate: Float[Array, "*batch C"] | None = None,
        collectives: Collectives = UNSHARDED,
    ) -> Float[Array, "*batch C"]:
        """Return the norm of x, or of x * silu(gate)."""
        return collectives.rms_norm(x, self.weight[...], gate, eps=self.eps, groups=self.groups).astype(self.dtype)


class CausalConv1d(nnx.Module):
    """Depthwise causal convolution with SiLU that resets at segment boundaries. See `ops.causal_conv1d`."""

    def __init__(self, channels: int, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = initializers.linear(config.d_conv)
        self.weight = nnx.Param(init(rngs.params(), (channels, config.d_conv)))
        self.bias = nnx.Param(init(rngs.params(), (channels,))) if config.conv_bias else None
        self.dtype, self.implementation = dtype, config.implementation

    def __call__(
        self,
        x: Float[Array, "B L C"],
        state: Float[Array, "B past C"] | None,
        segment_ids: Int[Array, "B L"] | None,
        collectives: Collectives = UNSHARDED,
    ) -> tuple[Float[Array, "B L C"], Float[Array, "B past C"]]:
        """Return the convolved x and its last K-1 inputs."""
        return collectives.causal_conv1d(
            x,
            self.weight[...].astype(self.dtype),
            None if self.bias is None else self.bias[...].astype(self.dtype),
            segment_ids=segment_ids,
            initial_state=state,
            implementation=self.implementation,
        )


class GatedMLP(nnx.Module):
    """down(up(x) * silu(gate(x))): SwiGLU, Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.up = dense(config.d_model, config.mlp_width, dtype=dtype, rngs=rngs)
        self.gate = dense(config.d_model, config.mlp_width, dtype=dtype, rngs=rngs)
        scale = config.n_layers**-0.5
        self.down = dense(config.mlp_width, config.d_model, scale=scale, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B L D"], collectives: Collectives = UNSHARDED) -> Float[Array, "B L D"]:
        """Return the MLP's output, its width sharded over tensor."""
        x = collectives.copy_to_tensor_parallel(x)
        return row_parallel(self.down, self.up(x) * jax.nn.silu(self.gate(x)), collectives)


def negative_exp(a_log: nnx.Param) -> jax.Array:
    """Return A = -exp(A_log), the negative decay rates."""
    return -jnp.exp(a_log[...])
