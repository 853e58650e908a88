"""Rows whose tokens are spread over the devices along "sequence": the model's ops, with what they need from the left.

Each device holds as many tokens of every row, in order. The convolution takes the last K-1 inputs of its left
neighbour. The state enters by an associative scan over the devices: each sums its part up as (decay, state), what it
multiplies an entering state by and the state that it reaches from zero, and

    (a, s) then (b, t)  =  (b a, t + b s)

gives after log2 of them the state before every device's first token. Nothing else is exchanged, and never a token's
activations. A state that is returned is that after the device's own last token: on the last device, the row's.

All of it is differentiable, resets at segment borders included. Written for code that runs once on each device.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from biomamba_jax import ops
from biomamba_jax.errors import UserError
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.causal_conv1d.xla import last_inputs
from biomamba_jax.ops.dispatch import Implementation
from biomamba_jax.ops.numerics import accumulator_dtype

AXIS = "sequence"


def from_left(x: Array, size: int, distance: int = 1) -> Array:
    """`x` of the device so many places to the left; zeros where there is none."""
    return lax.ppermute(x, AXIS, [(i, i + distance) for i in range(size - distance)])


def continues(segment_ids: Int[Array, "B L"] | None, rows: int, size: int) -> Array:
    """[B]: whether a row's first token here is of the same segment as its last token on the device to the left."""
    inner = lax.axis_index(AXIS) > 0
    if segment_ids is None:
        return jnp.broadcast_to(inner, (rows,))
    return inner & (from_left(segment_ids[:, -1], size) == segment_ids[:, 0])


def entering_state(decay: Array, state: Array, continues: Array, size: int, initial_state: Array | None) -> Array:
    """The state before each device's first token.

    Args:
      decay: what the state before the device's first token is multiplied by until its last, in the shape of `state` or
        one that spreads over it; zero where a segment ends in between.
      state: after the device's last token, from zero before its first [B ...].
      continues: [B], see `continues`.
      size: devices along sequence.
      initial_state: the row's, the same on every device.
    """
    first = lax.axis_index(AXIS) == 0
    passes = (continues | first).reshape(-1, *[1] * (state.ndim - 1))
    decay, state = from_left(jnp.where(passes, decay, 0), size), from_left(state, size)
    if initial_state is not None:
        state = jnp.where(first, initial_state.astype(state.dtype), state)
    distance = 1
    while distance < size:
        state = state + decay * from_left(state, size, distance)
        if 2 * distance < size:
            decay = decay * from_left(decay, size, distance)
        distance *= 2
    return jnp.where(passes, state, 0)


def causal_conv1d(
    x: Float[Array, "B L C"],
    weight: Float[Array, "C K"],
    bias: Float[Array, " C"] | None,
    continues: Array,
    size: int,
    *,
    segment_ids: Int[Array, "B L"] | None = None,
    initial_state: Float[Array, "B K-1 C"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B L C"], Float[Array, "B K-1 C"]]:
    """`ops.causal_conv1d` of a row over `size` devices, with the state after the device's last token.

    Raises:
      UserError: a device has fewer tokens of a row than the convolution looks back.
    """
    past = weight.shape[1] - 1
    if x.shape[1] < past:
        raise UserError(
            f"mesh.sequence = {size}: leaves {x.shape[1]} tokens of a row to a device; the convolution needs {past}"
        )
    halo = from_left(last_inputs(x, past, segment_ids, None), size)
    halo = jnp.where(continues[:, None, None], halo, 0)
    if initial_state is not None:
        halo = jnp.where(lax.axis_index(AXIS) == 0, initial_state.astype(halo.dtype), halo)
    return ops.causal_conv1d(  # type: ignore[return-value]
        x,
        weight,
        bias,
        segment_ids=segment_ids,
        initial_state=halo,
        return_final_state=True,
        implementation=implementation,
    )


def selective_scan(
    x: Float[Array, "B L E"],
    dt: Float[Array, "B L E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " E"] | None = None,
    z: Float[Array, "B L E"] | None = None,
    *,
    continues: Array,
    size: int,
    dt_bias: Float[Array, " E"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    initial_state: Float[Array, "B E N"] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """`ops.selective_scan` of a row over `size` devices, with the state after the device's last token.

    Runs the scan twice: from zero for the state that it reaches, then from the state that enters.
    """
    options: dict[str, Any] = {"dt_bias": dt_bias, "segment_ids": segment_ids, "implementation": implementation}
    options["return_final_state"] = True
    _, state = ops.selective_scan(x, dt, A, B, C, **options)
    total = jnp.sum(_step_sizes(x, dt, dt_bias), axis=1)
    exponent = jnp.where(_unbroken(segment_ids, x)[:, None, None], total[:, :, None] * A.astype(total.dtype), -jnp.inf)
    entering = entering_state(jnp.exp(exponent), state, continues, size, initial_state)
    return ops.selective_scan(x, dt, A, B, C, D, z, initial_state=entering, **options)  # type: ignore[return-value]


def ssd(
    x: Float[Array, "B L H P"],
    dt: Float[Array, "B L H"],
    A: Float[Array, " H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    D: Float[Array, " H"] | None = None,
    *,
    continues: Array,
    size: int,
    dt_bias: Float[Array, " H"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    initial_state: Float[Array, "B H P N"] | None = None,
    chunk_size: int | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """`ops.ssd` of a row over `size` devices, with the state after the device's last token.

    The state that a device reaches from zero is one product of all its tokens:

        S = sum_t exp(sum_{k > t} d_k A) d_t x_t B_t^T, over the tokens of the last segment
    """
    rows, _, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    step = _step_sizes(x, dt, dt_bias)
    exponent = step * A.astype(step.dtype)
    # Exponents are added up from the end, never subtracted: beside huge steps a difference has no digits left.
    after = jnp.pad(lax.cumsum(exponent[:, 1:], axis=1, reverse=True), ((0, 0), (0, 1), (0, 0)))
    unbroken = _unbroken(segment_ids, x)
    if segment_ids is not None:
        starts = jnp.pad(
            segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1))
        )  # of the segment behind each token
        ended = lax.cumsum(starts.astype(jnp.int32), axis=1, reverse=True) > 0
        after = jnp.where(ended[:, :, None], -jnp.inf, after)
    weighted = (x * (jnp.exp(after) * step)[..., None]).astype(x.dtype)
    state = jnp.einsum(
        "blghp,blgn->bghpn",
        weighted.reshape(rows, -1, groups, heads // groups, headdim),
        B.astype(x.dtype),
        preferred_element_type=step.dtype,
    ).reshape(rows, heads, headdim, d_state)
    across = jnp.where(unbroken[:, None], jnp.sum(exponent, axis=1), -jnp.inf)
    entering = entering_state(jnp.exp(across)[:, :, None, None], state, continues, size, initial_state)
    return ops.ssd(  # type: ignore[return-value]
        x,
        dt,
        A,
        B,
        C,
        D,
        dt_bias=dt_bias,
        segment_ids=segment_ids,
        initial_state=entering,
        return_final_state=True,
        chunk_size=chunk_size,
        implementation=implementation,
    )


def _step_sizes(x: Array, dt: Array, dt_bias: Array | None) -> Array:
    """softplus(dt + dt_bias), in at least float32."""
    wide = accumulator_dtype(x.dtype)
    dt = dt.astype(wide)
    return jax.nn.softplus(dt if dt_bias is None else dt + dt_bias.astype(wide))


def _unbroken(segment_ids: Int[Array, "B L"] | None, x: Array) -> Array:
    """[B]: whether all tokens here are of one segment."""
    if segment_ids is None:
        return jnp.ones(x.shape[0], bool)
    return jnp.all(segment_ids[:, 1:] == segment_ids[:, :-1], axis=1)
