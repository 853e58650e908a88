"""Padding of the selective scan's inputs and encoding of segment resets, for the Pallas kernels of both platforms."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from biomamba_jax.ops.kernel_arrays import LOG2_E, pad
from biomamba_jax.ops.numerics import segment_starts
from biomamba_jax.ops.selective_scan.inputs import FilledInputs

# The exponent delta A of a step into a new segment becomes so negative that its decay is exactly 0: the reset costs
# nothing inside the loop. Infinity would make the gradient of A NaN, by 0 * delta.
RESET_STEP = 1e33
WEAKEST_A = -1e-30  # upper bound of A with segments: no step could reset a decay rate of 0


class Tokens(NamedTuple):
    """Per-token inputs: arrays, or the block specs, refs or buffers of them."""

    x: Any
    """[B L E]."""
    dt: Any
    """[B L E]."""
    z: Any
    """[B L E], or None without a gate."""
    B: Any
    """[B L N]."""
    C: Any
    """[B L N]."""
    reset: Any
    """[B L] float32 (on TPU [B L 1]): 0 or RESET_STEP, added to delta in the exponent; None without segments."""


class Parameters(NamedTuple):
    """Parameters in float32, in the layout of a kernel; here as `padded` returns them."""

    A_log2e: Any
    """[E N]: exp(delta A) = exp2(delta A_log2e)."""
    D: Any
    """[E]."""
    dt_bias: Any
    """[E]."""


def padded(inputs: FilledInputs, length: int, channels: int, d_state: int) -> tuple[Tokens, Parameters]:
    """Pad all inputs. Padded steps have delta = softplus(-inf) = 0, which leaves the state unchanged."""
    rows = inputs.x.shape[0]
    per_channel, per_state = (rows, length, channels), (rows, length, d_state)
    A = inputs.A.astype(jnp.float32)
    reset = None
    if inputs.segment_ids is not None:
        A = jnp.minimum(A, WEAKEST_A)
        steps = jnp.where(segment_starts(inputs.segment_ids), RESET_STEP, 0.0)
        reset = pad(steps.astype(jnp.float32), per_state[:2])
    tokens = Tokens(
        x=pad(inputs.x, per_channel),
        dt=pad(inputs.dt, per_channel, fill=-jnp.inf),
        z=None if inputs.z is None else pad(inputs.z, per_channel),
        B=pad(inputs.B, per_state),
        C=pad(inputs.C, per_state),
        reset=reset,
    )
    parameters = Parameters(
        A_log2e=pad(A, (channels, d_state), fill=-1.0) * LOG2_E,
        D=pad(inputs.D.astype(jnp.float32), (channels,)),
        dt_bias=pad(inputs.dt_bias.astype(jnp.float32), (channels,)),
    )
    return tokens, parameters
