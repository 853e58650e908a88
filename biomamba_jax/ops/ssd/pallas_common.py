"""Limits and numerical bounds that the Pallas kernels of SSD for both platforms share."""

import jax
import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array

HEADDIM = 64
LOWEST_EXPONENT = -127.0
"""Lower bound of a step's exponent in base 2. It decays to less than the smallest normal float, which counts as zero;
without the bound, a sum of exponents would lose the small steps next to a huge one."""
LARGEST_EXPONENT = 60.0
"""Upper bound of the exponents of masked entries, which must be finite to be multiplied by the mask."""
TINY = 2.0**-126
NO_STEP = -1e30
"""A raw step size whose softplus is zero, with any bias added: such a step leaves the state unchanged."""


def unsupported_reason(x: Array, chunk_size: int | None, kernel_chunk: int) -> str | None:
    """Return why no kernel with that chunk can compute these arrays, or None."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, not bfloat16 or float32"
    if x.shape[3] != HEADDIM:
        return f"headdim is {x.shape[3]}, not {HEADDIM}"
    if chunk_size not in (None, kernel_chunk):
        return f"chunk_size is {chunk_size}, not {kernel_chunk}"
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if x.dtype == jnp.float32 and precision not in (None, "default", "fastest", "bfloat16"):
        return f"its products are of bfloat16, and the matmul precision is set to {precision}"
    return None
