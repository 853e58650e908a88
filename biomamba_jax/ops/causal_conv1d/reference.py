"""The causal convolution as a plain loop over time and taps: the oracle that the fast form is tested against."""

import jax
import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.causal_conv1d.inputs import Inputs


def causal_conv1d(inputs: Inputs, activation: str | None) -> tuple[Float[Array, "B L C"], Float[Array, "B K-1 C"]]:
    """Steps through time with the window of the last K inputs, emptied at each change of segment."""
    x, weight, bias, segment_ids, initial_state = inputs
    wide = jnp.promote_types(x.dtype, jnp.float32)
    rows, length, channels = x.shape
    past = weight.shape[1] - 1
    window = jnp.zeros((rows, past, channels), wide) if initial_state is None else initial_state.astype(wide)
    outputs = []
    for t in range(length):
        if segment_ids is not None and t > 0:
            same = segment_ids[:, t] == segment_ids[:, t - 1]
            window = jnp.where(same[:, None, None], window, 0)
        window = jnp.concatenate([window, x[:, t : t + 1].astype(wide)], axis=1)
        y = jnp.zeros((rows, channels), wide) if bias is None else jnp.broadcast_to(bias, (rows, channels))
        for k in range(past + 1):
            y = y + weight[:, k].astype(wide) * window[:, k]
        outputs.append(jax.nn.silu(y) if activation == "silu" else y)
        window = window[:, 1:]
    return jnp.stack(outputs, axis=1).astype(x.dtype), window.astype(x.dtype)
