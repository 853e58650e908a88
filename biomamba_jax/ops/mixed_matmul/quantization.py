"""int8 weights with a scale for each output."""

import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float, Int

_LARGEST = 127


def quantize(weight: Float[Array, "F C"]) -> tuple[Int[Array, "F C"], Float[Array, " F"]]:
    """Round each output's weights to 127 steps on either side of zero, up to its largest magnitude.

    Args:
      weight: [F C], any float dtype.

    Returns:
      int8 values [F C] and float32 scales [F], with |weight - values * scales| <= scales / 2. An output whose weights
      are not all finite has a scale that is not finite, and so has NaN results.
    """
    weight = weight.astype(jnp.float32)
    scales = jnp.max(jnp.abs(weight), axis=1) / _LARGEST
    values = jnp.round(weight / jnp.where(scales > 0, scales, 1)[:, None])
    return values.astype(jnp.int8), scales
