"""The causal convolution as a plain loop over time and taps: the oracle that every implementation is tested against."""

import jax
import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.causal_conv1d.inputs import Inputs
from biomamba_jax.ops.numerics import accumulator_dtype


def causal_conv1d(inputs: Inputs, activation: str | None) -> tuple[Float[Array, "B L C"], Float[Array, "B past C"]]:
    """Step through time with the window of the last K inputs, cleared at each change of segment."""
    x, weight, bias, segment_ids, initial_state = inputs
    dtype = accumulator_dtype(x.dtype)
    rows, length, channels = x.shape
    past = weight.shape[1] - 1
    window = jnp.zeros((rows, past, channels), dtype) if initial_state is None else initial_state.astype(dtype)
    outputs = []
    for t in range(length):
        if segment_ids is not None and t > 0:
            same = segment_ids[:, t] == segment_ids[:, t - 1]
            window = jnp.where(same[:, None, None], window, 0)
        window = jnp.concatenate([window, x[:, t : t + 1].astype(dtype)], axis=1)
        y = jnp.zeros((rows, channels), dtype) if bias is None else jnp.broadcast_to(bias, (rows, channels))
        for k in range(past + 1):
            y = y + weight[:, k].astype(dtype) * window[:, k]
        outputs.append(jax.nn.silu(y) if activation == "silu" else y)
        window = window[:, 1:]
    return jnp.stack(outputs, axis=1).astype(x.dtype), window.astype(x.dtype)
