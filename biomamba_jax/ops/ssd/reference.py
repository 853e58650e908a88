"""The recurrence of `ssd` as a plain loop over time: the oracle that every implementation is tested against."""

import jax
import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.numerics import accumulator_dtype
from biomamba_jax.ops.ssd.inputs import Inputs


def ssd(inputs: Inputs, chunk_size: int | None) -> tuple[Array, Array]:
    """Step through time; see `api.ssd`. All in float32, or float64 for float64 x; `chunk_size` is ignored."""
    x, dt, A, B, C, D, dt_bias, segment_ids, initial_state = inputs
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    dtype = accumulator_dtype(x.dtype)
    u, A, B, C = (v.astype(dtype) for v in (x, A, B, C))
    weight, log_decay = jnp.ones_like(A), A
    if dt is not None:
        dt = dt.astype(dtype)
        weight = jax.nn.softplus(dt if dt_bias is None else dt + dt_bias.astype(dtype))
        log_decay = weight * A
    B, C = (jnp.repeat(v, heads // groups, axis=2) for v in (B, C))
    starts = jnp.zeros((batch, length), bool)
    if segment_ids is not None:
        starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, headdim, d_state), dtype)

    def step(state: Array, token: tuple[Array, ...]) -> tuple[Array, Array]:
        u_t, w_t, a_t, b_t, c_t, start = token
        state = jnp.where(start[:, None, None, None], 0, state)
        decay = jnp.exp(a_t)[:, :, None, None]
        state = decay * state + (w_t[:, :, None] * u_t)[..., None] * b_t[:, :, None, :]
        return state, jnp.einsum("bhpn,bhn->bhp", state, c_t, precision="highest")

    over_time = tuple(jnp.moveaxis(v, 1, 0) for v in (u, weight, log_decay, B, C, starts))
    final_state, y = jax.lax.scan(step, initial_state.astype(dtype), over_time)
    y = jnp.moveaxis(y, 0, 1)
    if D is not None:
        y = y + D.astype(dtype)[:, None] * u
    return y.astype(x.dtype), final_state
