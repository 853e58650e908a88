"""The product as a plain loop over outputs: the oracle that every implementation is tested against."""

import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.numerics import accumulator_dtype


def mixed_matmul(
    x: Float[Array, "*batch C"], weight: Array, scale: Float[Array, " F"] | None
) -> Float[Array, "*batch F"]:
    """Sum the products of every output on its own; see `api.mixed_matmul`."""
    dtype = accumulator_dtype(x.dtype)
    outputs = []
    for index in range(weight.shape[0]):
        y = jnp.sum(x.astype(dtype) * weight[index].astype(dtype), axis=-1)
        outputs.append(y if scale is None else y * scale[index])
    return jnp.stack(outputs, axis=-1)
