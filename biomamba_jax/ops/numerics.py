"""Small numerical idioms that several ops and the model share."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float


def accumulator_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The type for statistics, states and sums of `dtype` values: float32, or float64 for float64 values."""
    return jnp.promote_types(dtype, jnp.float32)


def sum_leading(x: Float[Array, "*batch C"]) -> Float[Array, " C"]:
    """Sum over all axes but the last, accumulated in at least float32: the gradient of a per-channel parameter.

    XLA's CPU backend is slow to reduce an axis that is not the last (92 ms against 8 ms in one Mamba-1 layer), but has
    a fast matrix product; other backends reduce columns well.
    """
    rows = x.reshape(-1, x.shape[-1])
    dtype = accumulator_dtype(x.dtype)
    if dispatch.platform() != "cpu":
        return jnp.sum(rows, axis=0, dtype=dtype)
    return jnp.dot(jnp.ones((1, rows.shape[0]), dtype), rows.astype(dtype))[0]
