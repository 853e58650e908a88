"""The causal convolution as K shifted products, with its own backward pass.

One elementwise pass beats a general convolution at K = 4, and the gradients of weight and bias become matrix products
with a row of ones (`numerics.sum_leading`), which automatic differentiation would not produce.
"""

import jax
import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.causal_conv1d.inputs import Inputs
from biomamba_jax.ops.kernel_arrays import differentiable
from biomamba_jax.ops.numerics import accumulator_dtype, sum_leading


def causal_conv1d(inputs: Inputs, activation: str | None) -> tuple[Float[Array, "B L C"], Float[Array, "B past C"]]:
    """Return all outputs and the last K-1 inputs; see `api.causal_conv1d`."""
    return _conv(inputs, activation)


def _run(inputs: Inputs, activation: str | None, save: bool):
    """Return the outputs; the residuals are the inputs alone."""
    x, weight, _, segment_ids, initial_state = inputs
    y = _linear(inputs)
    if activation == "silu":
        y = jax.nn.silu(y)
    return (y.astype(x.dtype), last_inputs(x, weight.shape[1] - 1, segment_ids, initial_state)), None


def _backward(inputs: Inputs, residuals: None, cotangents, activation: str | None) -> Inputs:
    x, weight, bias, segment_ids, initial_state = inputs
    dtype = accumulator_dtype(x.dtype)
    g = cotangents[0].astype(dtype)
    if activation == "silu":
        y = _linear(inputs)
        sigmoid = jax.nn.sigmoid(y)
        g = g * sigmoid * (1 + y * (1 - sigmoid))
    d_last = cotangents[1].astype(dtype)
    length, past = x.shape[1], weight.shape[1] - 1
    extended = _extended(inputs)
    within = reach(segment_ids, past)
    d_weight = []
    # The cotangent of [initial_state, x]: each input affects the K outputs from its own on, and the final state.
    d_extended = jnp.pad(_where(_at_end(within, past), d_last), ((0, 0), (length, 0), (0, 0)))
    for k in range(past + 1):
        tap = _where(_looks_back(within, past - k), g)
        d_weight.append(sum_leading(tap * extended[:, k : k + length]))
        d_extended = d_extended + jnp.pad(tap * weight[:, k].astype(dtype), ((0, 0), (k, past - k), (0, 0)))
    d_state = None if initial_state is None else d_extended[:, :past].astype(initial_state.dtype)
    return Inputs(
        x=d_extended[:, past:].astype(x.dtype),
        weight=jnp.stack(d_weight, axis=1).astype(weight.dtype),
        bias=None if bias is None else sum_leading(g).astype(bias.dtype),
        segment_ids=None,
        initial_state=d_state,
    )


_conv = differentiable(_run, _backward)


def _linear(inputs: Inputs) -> Float[Array, "B L C"]:
    """Return the convolution before its activation."""
    x, weight, bias, segment_ids, _ = inputs
    dtype = accumulator_dtype(x.dtype)
    length, past = x.shape[1], weight.shape[1] - 1
    extended = _extended(inputs)
    within = reach(segment_ids, past)
    y = jnp.zeros((), dtype) if bias is None else bias.astype(dtype)
    for k in range(past + 1):
        seen = _where(_looks_back(within, past - k), extended[:, k : k + length])
        y = y + weight[:, k].astype(dtype) * seen
    return y


def _extended(inputs: Inputs) -> Float[Array, "B past_plus_L C"]:
    """Prepend the K-1 inputs before the first token to x."""
    x, weight, _, _, initial_state = inputs
    dtype = accumulator_dtype(x.dtype)
    past = weight.shape[1] - 1
    if initial_state is None:
        return jnp.pad(x.astype(dtype), ((0, 0), (past, 0), (0, 0)))
    return jnp.concatenate([initial_state.astype(dtype), x.astype(dtype)], axis=1)


def reach(segment_ids: Int[Array, "B L"] | None, past: int) -> Int[Array, "B L"] | None:
    """Return how many steps back each token may look, at most `past`; None without segments: all of them.

    A token may not look across a change of segment. The inputs before the first token are of its segment.
    """
    if segment_ids is None:
        return None
    length = segment_ids.shape[1]
    same = jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (past, 0)), constant_values=True)
    unbroken = jnp.ones(segment_ids.shape, bool)
    steps = jnp.zeros(segment_ids.shape, jnp.int32)
    for j in range(1, past + 1):
        unbroken = unbroken & same[:, past - j : past - j + length]
        steps = steps + unbroken
    return steps


def _looks_back(within: Array | None, back: int) -> Array | None:
    """Return which tokens may look `back` steps back [B L]; None for all."""
    return None if within is None or back == 0 else within >= back


def _at_end(within: Array | None, past: int) -> Array | None:
    """Return which of the last K-1 inputs are of the last token's segment [B past]; None for all."""
    return None if within is None else within[:, -1:] >= jnp.arange(past)[::-1]


def last_inputs(
    x: Float[Array, "B L C"],
    past: int,
    segment_ids: Int[Array, "B L"] | None,
    initial_state: Float[Array, "B past C"] | None,
) -> Float[Array, "B past C"]:
    """Return the last K-1 = `past` inputs, zeros where they are not of the last token's segment."""
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], past, x.shape[2]), x.dtype)
    recent = x[:, max(x.shape[1] - past, 0) :]
    last = jnp.concatenate([initial_state.astype(x.dtype), recent], axis=1)[:, recent.shape[1] :]
    return _where(_at_end(reach(segment_ids, past), past), last)


def _where(mask: Array | None, v: Array) -> Array:
    return v if mask is None else jnp.where(mask[:, :, None], v, 0)
