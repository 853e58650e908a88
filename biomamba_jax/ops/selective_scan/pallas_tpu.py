"""The selective scan on TPU: two Pallas kernels, their padding and layouts, and the rule that joins them.

In batch 8 x 1,024 of 1,536 channels the compiler's static profile gives them a ninth of the time of kernels that reduce
over d_state at every step; `python -m benchmarks kernels` prints the figures.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.kernel_arrays import pad, round_up, vary_alike
from biomamba_jax.ops.numerics import segment_starts
from biomamba_jax.ops.selective_scan.inputs import FilledInputs, Inputs
from biomamba_jax.ops.selective_scan.pallas_tpu_backward import Incoming, backward
from biomamba_jax.ops.selective_scan.pallas_tpu_blocks import (
    LANES,
    LOG2_E,
    RESET_STEP,
    SUBLANES,
    WEAKEST_A,
    Blocks,
    Parameters,
    Tokens,
)
from biomamba_jax.ops.selective_scan.pallas_tpu_forward import forward

_CHUNK = 64
# VMEM holds a row's state, and a chunk's states of one tile. Up to here gradients compile for v4, v5e, v5p and v6e, in
# float32 too; with a d_state of 64 no longer for v4, and of 80 for none.
_MOST_STATES = 48
_LARGEST_STATE = 16384 * 16  # values of a row's state
_STATE_REGISTERS = 8  # for the states of one tile; the backward kernel holds three times as many values


def selective_scan(
    inputs: Inputs,
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """All outputs and the last state; see `api.selective_scan`.

    Args:
      interpret: run the kernels without a TPU, slowly; True, or `pltpu.InterpretParams`. For tests.

    Raises:
      UserError: this is no TPU program.
    """
    if not interpret and dispatch.platform() != "tpu":
        raise UserError(
            f"selective_scan: implementation 'pallas_tpu' needs a TPU, and this program is for {dispatch.platform()};"
            " give implementation=None for the best one here"
        )
    return _scan(vary_alike(inputs.with_zeros()), interpret)


def why_not(x: Array, A: Array) -> str | None:
    """Why the kernels can't compute these arrays, if so."""
    channels, d_state = A.shape
    if x.dtype == jnp.float64:
        return "it computes in float32, and x is float64"
    if d_state > _MOST_STATES:
        return f"d_state is {d_state}, more than {_MOST_STATES}"
    if channels * d_state > _LARGEST_STATE:
        return f"a state of {channels} x {d_state} is of more than {_LARGEST_STATE:,} values, which VMEM may not hold"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scan(inputs: FilledInputs, interpret: Any) -> tuple[Array, Array]:
    return _run(inputs, interpret, for_backward=False)[0]


def _forward(inputs: FilledInputs, interpret: Any):
    (y, final), kept = _run(inputs, interpret, for_backward=True)
    return (y, final), (inputs, kept)


def _run(inputs: FilledInputs, interpret: Any, for_backward: bool):
    blocks = _blocks(inputs, interpret)
    _, length, channels = inputs.x.shape
    tokens, parameters = _padded(inputs, blocks)
    initial = _tiled_state(inputs.initial_state, blocks)
    out = forward(tokens, parameters, initial, blocks, for_backward, interpret)
    y = out.y[:, :length, :channels]
    return (y, _plain_state(out.final, inputs)), (out.boundary, out.ungated)


def _backward(interpret: Any, residuals, cotangents):
    inputs, (boundary, ungated) = residuals
    blocks = _blocks(inputs, interpret)
    _, length, channels = inputs.x.shape
    tokens, parameters = _padded(inputs, blocks)
    dy = _pad_tokens(cotangents[0].astype(inputs.x.dtype), blocks)
    incoming = Incoming(dy, _tiled_state(cotangents[1], blocks), boundary, ungated)
    g = backward(tokens, parameters, incoming, blocks, interpret)

    def wide(v: Array, like: Array) -> Array:
        return v[:, :length, :channels].astype(like.dtype)

    def narrow(v: Array, like: Array) -> Array:
        return v[:, :length, : like.shape[2]].astype(like.dtype)

    def vector(v: Array, like: Array) -> Array:
        return jnp.sum(v, axis=0).reshape(-1)[:channels].astype(like.dtype)

    return (
        FilledInputs(
            x=wide(g.x, inputs.x),
            dt=wide(g.dt, inputs.dt),
            A=jnp.sum(_plain_state(g.A, inputs), axis=0).astype(inputs.A.dtype),
            B=narrow(g.B, inputs.B),
            C=narrow(g.C, inputs.C),
            D=vector(g.D, inputs.D),
            z=None if inputs.z is None else wide(g.z, inputs.z),
            dt_bias=vector(g.dt_bias, inputs.dt_bias),
            segment_ids=None,
            initial_state=_plain_state(g.initial, inputs).astype(inputs.initial_state.dtype),
        ),
    )


_scan.defvjp(_forward, _backward)


def _blocks(inputs: FilledInputs, interpret: Any) -> Blocks:
    rows, length, channels = inputs.x.shape
    d_state = round_up(inputs.A.shape[1], SUBLANES)
    widest = max(1, _STATE_REGISTERS * SUBLANES // d_state) * LANES
    tile = min(widest, round_up(channels, LANES))
    chunk = min(_CHUNK, round_up(length, SUBLANES))
    return Blocks(
        rows=rows,
        length=round_up(length, chunk),
        channels=round_up(channels, tile),
        d_state=d_state,
        chunk=chunk,
        tile=tile,
        most_unrolled=1 if interpret else chunk,  # the interpreter is slow to compile, and its answer is the same
        gated=inputs.z is not None,
        segmented=inputs.segment_ids is not None,
    )


def _pad_tokens(v: Array, blocks: Blocks, fill: float = 0) -> Array:
    return pad(v, (blocks.rows, blocks.length, blocks.channels), fill)


def _padded(inputs: FilledInputs, blocks: Blocks) -> tuple[Tokens, Parameters]:
    """Tokens are filled up with steps of softplus(-infinity) = 0, which leave the state as it is."""
    narrow = (blocks.rows, blocks.length, blocks.d_state)
    A = inputs.A.astype(jnp.float32)
    reset = None
    if inputs.segment_ids is not None:
        A = jnp.minimum(A, WEAKEST_A)
        steps = jnp.where(segment_starts(inputs.segment_ids), RESET_STEP, 0.0).astype(jnp.float32)
        reset = pad(steps[:, :, None], (*narrow[:2], 1))
    A = pad(A, (blocks.channels, blocks.d_state), fill=-1)
    tokens = Tokens(
        x=_pad_tokens(inputs.x, blocks),
        dt=_pad_tokens(inputs.dt, blocks, fill=-jnp.inf),
        z=None if inputs.z is None else _pad_tokens(inputs.z, blocks),
        B=pad(inputs.B, narrow),
        C=pad(inputs.C, narrow),
        reset=reset,
    )
    tiles = (blocks.tiles, blocks.tile)
    vector = (blocks.channels,)
    parameters = Parameters(
        A_log2e=(A * LOG2_E).reshape(*tiles, -1).swapaxes(1, 2),
        D=pad(inputs.D.astype(jnp.float32), vector).reshape(*tiles)[:, None],
        dt_bias=pad(inputs.dt_bias.astype(jnp.float32), vector).reshape(*tiles)[:, None],
    )
    return tokens, parameters


def _tiled_state(state: Float[Array, "B E N"], blocks: Blocks) -> Float[Array, "B tiles N tile"]:
    padded = pad(state.astype(jnp.float32), (blocks.rows, blocks.channels, blocks.d_state))
    return padded.reshape(blocks.rows, blocks.tiles, blocks.tile, blocks.d_state).swapaxes(2, 3)


def _plain_state(state: Float[Array, "B tiles N tile"], inputs: FilledInputs) -> Float[Array, "B E N"]:
    plain = state.swapaxes(2, 3).reshape(state.shape[0], -1, state.shape[2])
    return plain[:, : inputs.A.shape[0], : inputs.A.shape[1]]
