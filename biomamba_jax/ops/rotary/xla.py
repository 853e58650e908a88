"""The rotary embedding as elementwise XLA operations, differentiated automatically."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.rotary.inputs import Inputs


def rotary_embedding(inputs: Inputs, dtype: DTypeLike) -> tuple[Array, Array]:
    """Return B and C of each head; see `api.rotary_embedding`."""
    B, C, B_bias, C_bias, angle = inputs
    heads, rotating = angle.shape[2:]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]

    def of_heads(v: Array, bias: Array) -> Array:
        batch, groups, d_state = v.shape[:3], v.shape[3], v.shape[4]
        v = jnp.broadcast_to(v[..., None, :], (*batch, groups, heads // groups, d_state))
        v = v.reshape(*batch, heads, d_state) + bias
        pairs = d_state // 2
        left, right = v[..., :rotating], v[..., pairs : pairs + rotating]
        fixed = v[..., rotating:pairs], v[..., pairs + rotating :]
        turned = [left * cos - right * sin, fixed[0], left * sin + right * cos, fixed[1]]
        return jnp.concatenate(turned, axis=-1).astype(dtype)

    return of_heads(B, B_bias), of_heads(C, C_bias)
