"""The product in XLA's own operations, for every platform and any number of rows.

int8 weights are converted to x's dtype, which holds them exactly; on TPU and GPU that is part of the product.
"""

import jax.numpy as jnp

from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.numerics import accumulator_dtype


def mixed_matmul(
    x: Float[Array, "*batch C"], weight: Array, scale: Float[Array, " F"] | None
) -> Float[Array, "*batch F"]:
    """Multiply in x's dtype and accumulate in float32; see `api.mixed_matmul`."""
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    # XLA's CPU backend takes bfloat16 as it is, by YNNPACK, only if the result is float32 and there are two rows or
    # more; otherwise it first converts the weights, at every token: 2.4 times slower.
    if count == 1 and x.dtype == weight.dtype == jnp.bfloat16 and dispatch.platform() == "cpu":
        rows = jnp.concatenate([rows, jnp.zeros_like(rows)])
    dtype = accumulator_dtype(x.dtype)
    y = jnp.einsum("rc,fc->rf", rows, weight.astype(x.dtype), preferred_element_type=dtype)[:count]
    y = y if scale is None else y * scale
    return y.reshape(*x.shape[:-1], -1)
