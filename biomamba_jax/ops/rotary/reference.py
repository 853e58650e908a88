"""The definition: pairs of dimensions as complex numbers. Slow; the oracle of the tests."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.rotary.inputs import Inputs


def rotary_embedding(inputs: Inputs, dtype: DTypeLike) -> tuple[Array, Array]:
    """Return B and C of each head; see `api.rotary_embedding`."""
    B, C, B_bias, C_bias, angle = inputs
    unturned = B.shape[-1] // 2 - angle.shape[-1]
    turn = jnp.exp(1j * jnp.pad(angle, ((0, 0), (0, 0), (0, 0), (0, unturned))))[:, :, None]

    def of_heads(v: Array, bias: Array) -> Array:
        left, right = jnp.split(jnp.repeat(v, angle.shape[2] // v.shape[3], axis=3) + bias, 2, axis=-1)
        turned = (left + 1j * right) * turn
        return jnp.concatenate([turned.real, turned.imag], axis=-1).astype(dtype)

    return of_heads(B, B_bias), of_heads(C, C_bias)
