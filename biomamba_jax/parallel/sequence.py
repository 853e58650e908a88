"""Sequence parallelism: the model's ops on rows whose tokens are sharded over the mesh axis "sequence".

Each device holds an equal share of every row's tokens, in order. The convolution receives the last K-1 inputs of its
left neighbour (a halo). The recurrent state is carried by an associative scan over devices: each reduces its shard to
(decay, state), the factor for an incoming state and the state reached from zero, and

    (a, s) then (b, t)  =  (b a, t + b s)

gives, in log2 steps, the state before every device's first token. No other activation is communicated. A returned state
is that after the device's own last token: on the last device, the row's.

All of it is differentiable, with resets at segment boundaries. The functions run once per device, under `shard_map`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from biomamba_jax import ops
from biomamba_jax.errors import UserError
from biomamba_jax.ops import numerics
from biomamba_jax.ops.array_typing import Array, Bool, Float, Int
from biomamba_jax.ops.causal_conv1d.xla import last_inputs
from biomamba_jax.ops.numerics import accumulator_dtype
from biomamba_jax.ops.ssd.xla import weights_and_exponents

AXIS = "sequence"


def receive_from_left(x: Array, size: int, distance: int = 1) -> Array:
    """Return `x` of the device `distance` places to the left; zeros where there is none."""
    return lax.ppermute(x, AXIS, [(i, i + distance) for i in range(size - distance)])


def receive_from_right(x: Array, size: int) -> Array:
    """Return `x` of the right neighbour; zeros on the last device."""
    return lax.ppermute(x, AXIS, [(i + 1, i) for i in range(size - 1)])


def continues_segment(segment_ids: Int[Array, "B L"] | None, rows: int, size: int) -> Bool[Array, " B"]:
    """Return True for rows whose first local token continues the segment of the left neighbour's last token."""
    inner = lax.axis_index(AXIS) > 0
    if segment_ids is None:
        return jnp.broadcast_to(inner, (rows,))
    return inner & (receive_from_left(segment_ids[:, -1], size) == segment_ids[:, 0])


def incoming_state(
    decay: Float[Array, "B ..."],
    state: Float[Array, "B ..."],
    continues: Bool[Array, " B"],
    size: int,
    initial_state: Array | None,
) -> Float[Array, "B ..."]:
    """Return the state before each device's first token.

    Args:
      decay: factor of an incoming state after the device's tokens, broadcastable to `state`; zero where a segment ends
        among them.
      state: state after the device's last token, from zero before its first.
      continues: see `continues_segment`.
      size: devices along sequence.
      initial_state: state before the row, replicated.
    """
    first = lax.axis_index(AXIS) == 0
    passes = (continues | first).reshape(-1, *[1] * (state.ndim - 1))
    decay, state = receive_from_left(jnp.where(passes, decay, 0), size), receive_from_left(state, size)
    if initial_state is not None:
        state = jnp.where(first, initial_state.astype(state.dtype), state)
    distance = 1
    while distance < size:
        state = state + decay * receive_from_left(state, size, distance)
        if 2 * distance < size:
            decay = decay * receive_from_left(decay, size, distance)
        distance *= 2
    return jnp.where(passes, state, 0)


def segment_cumsum(
    v: Float[Array, "B L C"],
    segment_ids: Int[Array, "B L"] | None = None,
    initial: Float[Array, "B C"] | None = None,
    *,
    continues: Bool[Array, " B"],
    size: int,
    period: float,
) -> Float[Array, "B L C"]:
    """Return `numerics.segment_cumsum` of a row sharded over `size` devices.

    `continues` and `size` as in `incoming_state`; everything else as in `numerics.segment_cumsum`, for local tokens.
    """
    last = numerics.segment_cumsum(v, segment_ids, period=period)[:, -1]
    unbroken = _single_segment(segment_ids, v)[:, None].astype(v.dtype)
    incoming = incoming_state(unbroken, last, continues, size, initial)
    return numerics.segment_cumsum(v, segment_ids, incoming, period=period)


def next_in_segment(
    v: Float[Array, "B L C"], segment_ids: Int[Array, "B L"] | None, *, continues: Bool[Array, " B"], size: int
) -> Float[Array, "B L C"]:
    """Return `numerics.next_in_segment` of a row sharded over `size` devices; see `segment_cumsum`."""
    first = jnp.where(continues[:, None], v[:, 0], 0)
    return numerics.next_in_segment(v, segment_ids, receive_from_right(first, size))


def causal_conv1d(
    x: Float[Array, "B L C"],
    weight: Float[Array, "C K"],
    bias: Float[Array, " C"] | None,
    *,
    continues: Bool[Array, " B"],
    size: int,
    segment_ids: Int[Array, "B L"] | None = None,
    initial_state: Array | None = None,
    **options: Any,
) -> tuple[Array, Array]:
    """Return `ops.causal_conv1d` of a row sharded over `size` devices, and the state after the device's last token.

    `continues` and `size` as in `incoming_state`; everything else as in `ops.causal_conv1d`, for the local tokens.

    Raises:
      UserError: a device has fewer tokens of a row than the convolution reaches back.
    """
    past = weight.shape[1] - 1
    if x.shape[1] < past:
        raise UserError(
            f"mesh.sequence = {size}: leaves {x.shape[1]} tokens of a row to a device; the convolution needs {past}"
        )
    halo = receive_from_left(last_inputs(x, past, segment_ids, None), size)
    halo = jnp.where(continues[:, None, None], halo, 0)
    if initial_state is not None:
        halo = jnp.where(lax.axis_index(AXIS) == 0, initial_state.astype(halo.dtype), halo)
    options |= {"segment_ids": segment_ids, "return_final_state": True}
    return ops.causal_conv1d(x, weight, bias, initial_state=halo, **options)  # type: ignore[return-value]


def selective_scan(
    x: Float[Array, "B L E"],
    dt: Float[Array, "B L E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " E"] | None = None,
    z: Float[Array, "B L E"] | None = None,
    *,
    continues: Bool[Array, " B"],
    size: int,
    initial_state: Float[Array, "B E N"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """Return `ops.selective_scan` of a row sharded over `size` devices, and the state after the device's last token.

    Runs the scan twice: from zero for the state that it reaches, then from the incoming state.

    `continues` and `size` as in `incoming_state`; everything else as in `ops.selective_scan`, for the local tokens.
    """
    options["return_final_state"] = True
    _, state = ops.selective_scan(x, dt, A, B, C, **options)
    total = jnp.sum(_step_sizes(x, dt, options.get("dt_bias")), axis=1)
    unbroken = _single_segment(options.get("segment_ids"), x)
    exponent = jnp.where(unbroken[:, None, None], total[:, :, None] * A.astype(total.dtype), -jnp.inf)
    incoming = incoming_state(jnp.exp(exponent), state, continues, size, initial_state)
    return ops.selective_scan(x, dt, A, B, C, D, z, initial_state=incoming, **options)  # type: ignore[return-value]


def ssd(
    x: Float[Array, "B L H P"],
    dt: Float[Array, "B L H"] | None,
    A: Float[Array, " H"] | Float[Array, "B L H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    D: Float[Array, " H"] | None = None,
    *,
    continues: Bool[Array, " B"],
    size: int,
    initial_state: Float[Array, "B H P N"] | None = None,
    **options: Any,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """Return `ops.ssd` of a row sharded over `size` devices, and the state after the device's last token.

    The state that a device reaches from zero is one matrix product over its tokens:

        S = sum_t exp(sum_{k > t} d_k A) d_t x_t B_t^T, over the tokens of the last segment

    (without dt, A_k is in place of d_k A and one in place of d_t).

    `continues` and `size` as in `incoming_state`; everything else as in `ops.ssd`, for the local tokens.
    """
    rows, _, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    segment_ids = options.get("segment_ids")
    weight, exponent = weights_and_exponents(x, dt, A, options.get("dt_bias"))
    # Exponents are summed from the end, never subtracted: next to huge steps a difference has no digits left.
    after = jnp.pad(lax.cumsum(exponent[:, 1:], axis=1, reverse=True), ((0, 0), (0, 1), (0, 0)))
    if segment_ids is not None:  # a token counts unless a segment starts after it
        starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1)))
        ended = lax.cumsum(starts.astype(jnp.int32), axis=1, reverse=True) > 0
        after = jnp.where(ended[:, :, None], -jnp.inf, after)
    weighted = (x * (jnp.exp(after) * weight)[..., None]).astype(x.dtype)
    state = jnp.einsum(
        "blghp,blgn->bghpn",
        weighted.reshape(rows, -1, groups, heads // groups, headdim),
        B.astype(x.dtype),
        preferred_element_type=weight.dtype,
    ).reshape(rows, heads, headdim, d_state)
    decay = jnp.exp(jnp.where(_single_segment(segment_ids, x)[:, None], jnp.sum(exponent, axis=1), -jnp.inf))
    incoming = incoming_state(decay[:, :, None, None], state, continues, size, initial_state)
    options["return_final_state"] = True
    return ops.ssd(x, dt, A, B, C, D, initial_state=incoming, **options)  # type: ignore[return-value]


def _step_sizes(x: Array, dt: Array, dt_bias: Array | None) -> Array:
    """Return softplus(dt + dt_bias) in the accumulator dtype."""
    dtype = accumulator_dtype(x.dtype)
    dt = dt.astype(dtype)
    return jax.nn.softplus(dt if dt_bias is None else dt + dt_bias.astype(dtype))


def _single_segment(segment_ids: Int[Array, "B L"] | None, x: Array) -> Bool[Array, " B"]:
    """Return True for rows whose local tokens are all of one segment."""
    if segment_ids is None:
        return jnp.ones(x.shape[0], bool)
    return jnp.all(segment_ids[:, 1:] == segment_ids[:, :-1], axis=1)
