"""The selective scan on TPU: padding and layouts of the two Pallas kernels, and the custom_vjp that pairs them.

For a batch of 8 x 1,024 of 1,536 channels the compiler's static profile gives them a ninth of the time of kernels that
reduce over d_state at every step; `python -m benchmarks kernels` prints the figures.
"""

from typing import Any

import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.kernel_arrays import differentiable, float64_reason, pad, round_up, vary_alike
from biomamba_jax.ops.selective_scan.inputs import FilledInputs, Inputs
from biomamba_jax.ops.selective_scan.pallas_arrays import Parameters, Tokens, padded
from biomamba_jax.ops.selective_scan.pallas_tpu_backward import Incoming, backward
from biomamba_jax.ops.selective_scan.pallas_tpu_blocks import LANES, SUBLANES, Blocks, words
from biomamba_jax.ops.selective_scan.pallas_tpu_forward import forward

_SAVED = 64  # time steps between two saved states
# VMEM holds a row's state and a chunk's states of one tile. Up to this d_state, gradients compile for v4, v5e, v5p and
# v6e, in float32 too; with 64 not for v4, and with 80 for none.
_MAX_STATES = 48
_MAX_STATE_SIZE = 16384 * 16  # values of a row's state
_STATE_REGISTERS = 8  # for the states of one tile; the backward kernel holds three times as many values


def selective_scan(
    inputs: Inputs,
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """Return all outputs and the final state; see `api.selective_scan`.

    Args:
      inputs: the arrays.
      interpret: run the kernels without a TPU, slowly; True, or `pltpu.InterpretParams`. For tests.
    """
    return _scan(vary_alike(inputs.with_zeros()), interpret)


def unsupported_reason(x: Array, A: Array) -> str | None:
    """Return why the kernels cannot compute these arrays, or None if they can."""
    channels, d_state = A.shape
    if reason := float64_reason(x):
        return reason
    if d_state > _MAX_STATES:
        return f"d_state is {d_state}, more than {_MAX_STATES}"
    if channels * d_state > _MAX_STATE_SIZE:
        return f"a state of {channels} x {d_state} has more than {_MAX_STATE_SIZE:,} values, which VMEM may not hold"
    return None


def _run(inputs: FilledInputs, interpret: Any, save: bool):
    blocks = _blocks(inputs, interpret)
    _, length, channels = inputs.x.shape
    tokens, parameters = _arrays(inputs, blocks)
    initial = _tiled_state(inputs.initial_state, blocks)
    # Twice the time steps pay a grid step's fixed cost half as often; the backward kernel has no VMEM for them.
    chunk = blocks.saved * (1 if blocks.grid[1] % 2 else 2)
    out = forward(tokens, parameters, initial, blocks._replace(chunk=chunk), save, interpret)
    final = _untiled_state(out.final)[:, : inputs.A.shape[0], : inputs.A.shape[1]]
    return (out.y[:, :length, :channels], final), (out.boundary, out.ungated)


def _backward(inputs: FilledInputs, residuals, cotangents, interpret: Any) -> FilledInputs:
    boundary, ungated = residuals
    blocks = _blocks(inputs, interpret)
    tokens, parameters = _arrays(inputs, blocks)
    dy = pad(cotangents[0].astype(inputs.x.dtype), tokens.x.shape)
    incoming = Incoming(dy, _tiled_state(cotangents[1], blocks), boundary, ungated)
    g = backward(tokens, parameters, incoming, blocks, interpret)
    return inputs.crop(g._replace(A=_untiled_state(g.A), initial=_untiled_state(g.initial)))


_scan = differentiable(_run, _backward)


def _blocks(inputs: FilledInputs, interpret: Any) -> Blocks:
    rows, length, channels = inputs.x.shape
    d_state = round_up(inputs.A.shape[1], SUBLANES)
    widest = max(1, _STATE_REGISTERS * SUBLANES // d_state) * LANES
    tile = min(widest, round_up(channels, LANES))
    saved = min(_SAVED, round_up(length, SUBLANES))
    return Blocks(
        rows=rows,
        length=round_up(length, saved),
        channels=round_up(channels, tile),
        d_state=d_state,
        saved=saved,
        chunk=saved,
        tile=tile,
        interpreted=bool(interpret),
        gated=inputs.z is not None,
        segmented=inputs.segment_ids is not None,
    )


def _arrays(inputs: FilledInputs, blocks: Blocks) -> tuple[Tokens, Parameters]:
    """Pad the inputs; B and C become words, reset [B L 1], and parameters [tiles height tile]."""
    tokens, parameters = padded(inputs, blocks.length, blocks.channels, blocks.d_state)
    tokens = tokens._replace(B=words(tokens.B), C=words(tokens.C))
    if tokens.reset is not None:
        tokens = tokens._replace(reset=tokens.reset[:, :, None])
    tiles = (blocks.tiles, blocks.tile)
    return tokens, Parameters(
        A_log2e=parameters.A_log2e.reshape(*tiles, -1).swapaxes(1, 2),
        D=parameters.D.reshape(tiles)[:, None],
        dt_bias=parameters.dt_bias.reshape(tiles)[:, None],
    )


def _tiled_state(state: Float[Array, "B E N"], blocks: Blocks) -> Float[Array, "B tiles padded_N tile"]:
    state = pad(state.astype(jnp.float32), (blocks.rows, blocks.channels, blocks.d_state))
    return state.reshape(blocks.rows, blocks.tiles, blocks.tile, blocks.d_state).swapaxes(2, 3)


def _untiled_state(state: Float[Array, "B tiles padded_N tile"]) -> Float[Array, "B padded_E padded_N"]:
    return state.swapaxes(2, 3).reshape(state.shape[0], -1, state.shape[2])
