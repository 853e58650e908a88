"""The selective scan on TPU: two Pallas kernels, their padding and layouts, and the rule that joins them.

In batch 8 x 1,024 of 1,536 channels the compiler's static profile gives them a ninth of the time of kernels that reduce
over d_state at every step; `python -m biomamba_jax.benchmark kernels` prints the figures.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float, Int
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
    round_up,
)
from biomamba_jax.ops.selective_scan.pallas_tpu_forward import forward

_CHUNK = 64
_STATE_REGISTERS = 8  # for the states of one tile; the backward kernel holds three times as many values


class _Inputs(NamedTuple):
    x: Float[Array, "B L E"]
    dt: Float[Array, "B L E"]
    A: Float[Array, "E N"]
    B: Float[Array, "B L N"]
    C: Float[Array, "B L N"]
    D: Float[Array, " E"]
    z: Float[Array, "B L E"] | None
    dt_bias: Float[Array, " E"]
    segment_ids: Int[Array, "B L"] | None
    initial_state: Float[Array, "B E N"]


def selective_scan(
    x: Float[Array, "B L E"],
    dt: Float[Array, "B L E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " E"] | None,
    z: Float[Array, "B L E"] | None,
    dt_bias: Float[Array, " E"] | None,
    segment_ids: Int[Array, "B L"] | None,
    initial_state: Float[Array, "B E N"] | None,
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """All outputs and the last state; see `api.selective_scan`.

    Args:
      interpret: run the kernels without a TPU, slowly; True, or `pltpu.InterpretParams`. For tests.

    Raises:
      UserError: this is no TPU program, or the inputs are float64.
    """
    if not interpret and dispatch.platform() != "tpu":
        raise UserError(
            f"selective_scan: implementation 'pallas_tpu' needs a TPU, and this program is for {dispatch.platform()};"
            " give implementation=None for the best one here"
        )
    if x.dtype == jnp.float64:
        raise UserError("selective_scan: the TPU kernels compute in float32; give implementation='xla' for float64")
    rows, _, channels = x.shape
    zeros = jnp.zeros(channels, jnp.float32)
    inputs = _Inputs(
        x,
        dt,
        A,
        B,
        C,
        zeros if D is None else D,
        z,
        zeros if dt_bias is None else dt_bias,
        segment_ids,
        jnp.zeros((rows, *A.shape), jnp.float32) if initial_state is None else initial_state,
    )
    return _scan(_vary_alike(inputs), interpret)


def _vary_alike(inputs: _Inputs) -> _Inputs:
    """Inside `shard_map`: all inputs vary over all the axes that any does, so that the gradients are summed outside."""
    axes = frozenset().union(*(jax.typeof(v).manual_axis_type.varying for v in jax.tree.leaves(inputs)))

    def vary(v: Array) -> Array:
        missing = tuple(axes - jax.typeof(v).manual_axis_type.varying)
        return jax.lax.pcast(v, missing, to="varying") if missing else v

    return jax.tree.map(vary, inputs)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scan(inputs: _Inputs, interpret: Any) -> tuple[Array, Array]:
    return _run(inputs, interpret, for_backward=False)[0]


def _forward(inputs: _Inputs, interpret: Any):
    (y, final), kept = _run(inputs, interpret, for_backward=True)
    return (y, final), (inputs, kept)


def _run(inputs: _Inputs, interpret: Any, for_backward: bool):
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
        _Inputs(
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


def _blocks(inputs: _Inputs, interpret: Any) -> Blocks:
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


def _pad(v: Array, shape: tuple[int, ...], fill: float = 0) -> Array:
    if v.shape == shape:
        return v
    return jnp.pad(v, [(0, want - have) for have, want in zip(v.shape, shape, strict=True)], constant_values=fill)


def _pad_tokens(v: Array, blocks: Blocks, fill: float = 0) -> Array:
    return _pad(v, (blocks.rows, blocks.length, blocks.channels), fill)


def _padded(inputs: _Inputs, blocks: Blocks) -> tuple[Tokens, Parameters]:
    """Tokens are filled up with steps of softplus(-infinity) = 0, which leave the state as it is."""
    narrow = (blocks.rows, blocks.length, blocks.d_state)
    A = inputs.A.astype(jnp.float32)
    reset = None
    if inputs.segment_ids is not None:
        A = jnp.minimum(A, WEAKEST_A)
        ids = inputs.segment_ids
        changed = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
        reset = _pad(jnp.where(changed, RESET_STEP, 0.0).astype(jnp.float32)[:, :, None], (*narrow[:2], 1))
    A = _pad(A, (blocks.channels, blocks.d_state), fill=-1)
    tokens = Tokens(
        x=_pad_tokens(inputs.x, blocks),
        dt=_pad_tokens(inputs.dt, blocks, fill=-jnp.inf),
        z=None if inputs.z is None else _pad_tokens(inputs.z, blocks),
        B=_pad(inputs.B, narrow),
        C=_pad(inputs.C, narrow),
        reset=reset,
    )
    tiles = (blocks.tiles, blocks.tile)
    vector = (blocks.channels,)
    parameters = Parameters(
        A_log2e=(A * LOG2_E).reshape(*tiles, -1).swapaxes(1, 2),
        D=_pad(inputs.D.astype(jnp.float32), vector).reshape(*tiles)[:, None],
        dt_bias=_pad(inputs.dt_bias.astype(jnp.float32), vector).reshape(*tiles)[:, None],
    )
    return tokens, parameters


def _tiled_state(state: Float[Array, "B E N"], blocks: Blocks) -> Float[Array, "B tiles N tile"]:
    padded = _pad(state.astype(jnp.float32), (blocks.rows, blocks.channels, blocks.d_state))
    return padded.reshape(blocks.rows, blocks.tiles, blocks.tile, blocks.d_state).swapaxes(2, 3)


def _plain_state(state: Float[Array, "B tiles N tile"], inputs: _Inputs) -> Float[Array, "B E N"]:
    plain = state.swapaxes(2, 3).reshape(state.shape[0], -1, state.shape[2])
    return plain[:, : inputs.A.shape[0], : inputs.A.shape[1]]
