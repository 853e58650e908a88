"""The selective scan as a plain loop over time: the oracle that every implementation is tested against."""

import jax
import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.numerics import accumulator_dtype
from biomamba_jax.ops.selective_scan.inputs import Inputs


def selective_scan(inputs: Inputs) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """Step through time, one token after the other; return all outputs and the final state."""
    x, dt, A, B, C, D, z, dt_bias, segment_ids, initial_state = inputs
    dtype = accumulator_dtype(x.dtype)
    u, dt, A, B, C = (v.astype(dtype) for v in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.astype(dtype)
    delta = jax.nn.softplus(dt)
    rows, length, channels = x.shape
    if initial_state is None:
        initial_state = jnp.zeros((rows, channels, A.shape[1]))
    if segment_ids is None:
        segment_ids = jnp.zeros((rows, length), jnp.int32)

    def step(carry, token):
        state, segment = carry
        x_t, delta_t, B_t, C_t, segment_t = token
        state = jnp.where((segment_t == segment)[:, None, None], state, 0)
        # h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t;  y_t = C_t h_t  (Mamba, arXiv 2312.00752, eq. 2)
        state = jnp.exp(delta_t[:, :, None] * A) * state + (delta_t * x_t)[:, :, None] * B_t[:, None, :]
        return (state, segment_t), jnp.sum(state * C_t[:, None, :], -1)

    time_major = [v.swapaxes(0, 1) for v in (u, delta, B, C, segment_ids)]
    (state, _), y = jax.lax.scan(step, (initial_state.astype(dtype), segment_ids[:, 0]), time_major)
    y = y.swapaxes(0, 1)
    if D is not None:
        y = y + D.astype(dtype) * u
    if z is not None:
        y = y * jax.nn.silu(z.astype(dtype))
    return y.astype(x.dtype), state
