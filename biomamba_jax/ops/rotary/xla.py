"""The rotary embedding as elementwise XLA operations, differentiated automatically."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import pad
from biomamba_jax.ops.rotary.inputs import Inputs


def rotary_embedding(inputs: Inputs, dtype: DTypeLike) -> tuple[Array, Array]:
    """Return B and C of each head; see `api.rotary_embedding`."""
    B, C, B_bias, C_bias, angle = inputs
    pairs = *angle.shape[:3], B.shape[4] // 2
    # A pair that does not rotate has an angle of zero.
    cos, sin = pad(jnp.cos(angle), pairs, 1.0)[:, :, None], pad(jnp.sin(angle), pairs)[:, :, None]

    def of_heads(v: Array, bias: Array) -> Array:
        left, right = jnp.split(jnp.repeat(v, angle.shape[2] // v.shape[3], axis=3) + bias, 2, axis=-1)
        return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1).astype(dtype)

    return of_heads(B, B_bias), of_heads(C, C_bias)
