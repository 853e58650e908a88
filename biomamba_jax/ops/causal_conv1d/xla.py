"""The causal convolution as K shifted products, with its own backward pass.

One elementwise pass beats a general convolution at K = 4, and the gradients of weight and bias become matrix products
with a row of ones (`numerics.sum_leading`), which the automatic ones would not.
"""

from functools import partial

import jax
import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.causal_conv1d.inputs import Inputs
from biomamba_jax.ops.numerics import accumulator_dtype, sum_leading


def causal_conv1d(inputs: Inputs, activation: str | None) -> tuple[Float[Array, "B L C"], Float[Array, "B K-1 C"]]:
    """All outputs and the last K-1 inputs; see `api.causal_conv1d`."""
    return _conv(inputs, activation)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _conv(inputs: Inputs, activation: str | None):
    x, weight, _, segment_ids, initial_state = inputs
    y = _linear(inputs)
    if activation == "silu":
        y = jax.nn.silu(y)
    return y.astype(x.dtype), last_inputs(x, weight.shape[1] - 1, segment_ids, initial_state)


def _forward(inputs: Inputs, activation: str | None):
    return _conv(inputs, activation), inputs


def _backward(activation: str | None, inputs: Inputs, cotangents):
    x, weight, bias, segment_ids, initial_state = inputs
    wide = accumulator_dtype(x.dtype)
    g = cotangents[0].astype(wide)
    if activation == "silu":
        y = _linear(inputs)
        sigmoid = jax.nn.sigmoid(y)
        g = g * sigmoid * (1 + y * (1 - sigmoid))
    d_last = cotangents[1].astype(wide)
    length, past = x.shape[1], weight.shape[1] - 1
    extended = _extended(inputs)
    seen = _seen(segment_ids, past)
    d_weight = []
    # The gradient of [initial_state, x]: each input serves the K outputs from its own on, and the final state.
    d_extended = jnp.pad(_where(_at_end(seen, past), d_last), ((0, 0), (length, 0), (0, 0)))
    for k in range(past + 1):
        tap = _where(seen[past - k], g)
        d_weight.append(sum_leading(tap * extended[:, k : k + length]))
        d_extended = d_extended + jnp.pad(tap * weight[:, k].astype(wide), ((0, 0), (k, past - k), (0, 0)))
    d_state = None if initial_state is None else d_extended[:, :past].astype(initial_state.dtype)
    return (
        Inputs(
            x=d_extended[:, past:].astype(x.dtype),
            weight=jnp.stack(d_weight, axis=1).astype(weight.dtype),
            bias=None if bias is None else sum_leading(g).astype(bias.dtype),
            segment_ids=None,
            initial_state=d_state,
        ),
    )


_conv.defvjp(_forward, _backward)


def _linear(inputs: Inputs) -> Float[Array, "B L C"]:
    """The convolution before its activation."""
    x, weight, bias, segment_ids, _ = inputs
    wide = accumulator_dtype(x.dtype)
    length, past = x.shape[1], weight.shape[1] - 1
    extended = _extended(inputs)
    seen = _seen(segment_ids, past)
    y = jnp.zeros((), wide) if bias is None else bias.astype(wide)
    for k in range(past + 1):
        y = y + weight[:, k].astype(wide) * _where(seen[past - k], extended[:, k : k + length])
    return y


def _extended(inputs: Inputs) -> Float[Array, "B L+K-1 C"]:
    """x with the K-1 inputs before it in front."""
    x, weight, _, _, initial_state = inputs
    wide = accumulator_dtype(x.dtype)
    past = weight.shape[1] - 1
    if initial_state is None:
        return jnp.pad(x.astype(wide), ((0, 0), (past, 0), (0, 0)))
    return jnp.concatenate([initial_state.astype(wide), x.astype(wide)], axis=1)


def _seen(segment_ids: Int[Array, "B L"] | None, past: int) -> list[Array | None]:
    """For each distance j = 0..past: which tokens may look j steps back [B L]; None for all.

    A token may not if the segment changed on the way. What comes before the first token belongs to its segment.
    """
    seen: list[Array | None] = [None]
    if segment_ids is None:
        return seen * (past + 1)
    same = jnp.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (past, 0)), constant_values=True)
    length = segment_ids.shape[1]
    reach = jnp.ones(segment_ids.shape, bool)
    for j in range(1, past + 1):
        reach = reach & same[:, past - j : past - j + length]
        seen.append(reach)
    return seen


def _at_end(seen: list[Array | None], past: int) -> Array | None:
    """Which of the last K-1 inputs are of the last token's segment [B K-1]."""
    if past == 0 or seen[-1] is None:
        return seen[-1]
    last = [jnp.ones_like(seen[-1][:, -1]) if reach is None else reach[:, -1] for reach in seen[:past]]
    return jnp.stack(last[::-1], axis=1)


def last_inputs(
    x: Float[Array, "B L C"],
    past: int,
    segment_ids: Int[Array, "B L"] | None,
    initial_state: Float[Array, "B K-1 C"] | None,
) -> Float[Array, "B K-1 C"]:
    """The last K-1 = `past` inputs, zeros where they are not of the last token's segment."""
    if initial_state is None:
        initial_state = jnp.zeros((x.shape[0], past, x.shape[2]), x.dtype)
    recent = x[:, max(x.shape[1] - past, 0) :]
    last = jnp.concatenate([initial_state.astype(x.dtype), recent], axis=1)[:, recent.shape[1] :]
    return _where(_at_end(_seen(segment_ids, past), past), last)


def _where(mask: Array | None, v: Array) -> Array:
    return v if mask is None else jnp.where(mask[:, :, None], v, 0)
