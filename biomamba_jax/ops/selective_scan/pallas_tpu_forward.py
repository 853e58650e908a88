"""Forward kernel of the selective scan on TPU: softplus, recurrence, skip and gate in one pass over the tokens."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl

from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import out_struct
from biomamba_jax.ops.selective_scan import pallas_tpu_blocks as common
from biomamba_jax.ops.selective_scan.pallas_arrays import Parameters, Tokens
from biomamba_jax.ops.selective_scan.pallas_tpu_blocks import STRIDE, SUBLANES, Blocks


class Outputs(NamedTuple):
    """Outputs of the kernel."""

    y: Any
    """[B L E]."""
    final: Any
    """[B tiles N tile] float32; carries the state from chunk to chunk."""
    boundary: Any | None
    """[B L/saved tiles N tile] float32: the state before each `saved` steps."""
    ungated: Any | None
    """[B L E]: y before the gate."""


class _Scratch(NamedTuple):
    delta: Any
    u: Any  # delta x
    B: Any
    C: Any
    partial: Any


def forward(
    tokens: Tokens, parameters: Parameters, initial: Array, blocks: Blocks, for_backward: bool, interpret: Any
) -> Outputs:
    """Return all outputs, the final state and, with `for_backward`, the residuals of the backward kernel."""
    rows, length, channels = tokens.x.shape
    state = (blocks.tiles, blocks.d_state, blocks.tile)
    x_like = out_struct(tokens.x.shape, tokens.x.dtype, tokens.x)
    final = out_struct((rows, *state), jnp.float32, tokens.x)
    boundary = out_struct((rows, length // blocks.saved, *state), jnp.float32, tokens.x) if for_backward else None
    boundary_spec = common.boundary_spec(blocks) if for_backward else None
    per_channel, row = common.token_spec(blocks), common.row_spec(blocks, blocks.d_state)
    ungated = for_backward and blocks.gated
    out_shape = Outputs(x_like, final, boundary, x_like if ungated else None)
    out_specs = Outputs(per_channel, row, boundary_spec, per_channel if ungated else None)
    step, projection = common.step_scratch(blocks), common.broadcast_scratch(blocks)
    steps = rows * length * channels * blocks.d_state
    return pl.pallas_call(
        functools.partial(_kernel, blocks),
        grid=blocks.grid,
        in_specs=[common.token_specs(tokens, blocks), common.parameter_specs(blocks), row],
        out_specs=[out_specs],
        out_shape=[out_shape],
        scratch_shapes=[_Scratch(step, step, projection, projection, common.partial_scratch(blocks))],
        compiler_params=common.compiler_params(),
        cost_estimate=pl.CostEstimate(
            flops=6 * steps, transcendentals=steps, bytes_accessed=4 * tokens.x.size * tokens.x.dtype.itemsize
        ),
        interpret=interpret,
        name="selective_scan_forward",
    )(tokens, parameters, initial)[0]


def _kernel(blocks: Blocks, tokens: Tokens, parameters: Parameters, initial, outputs: Outputs, scratch: _Scratch):
    chunk, tile = pl.program_id(1), pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        outputs.final[tile] = initial[tile]

    @pl.when(tile == 0)
    def _():
        common.broadcast_columns(tokens.B, scratch.B, blocks)
        common.broadcast_columns(tokens.C, scratch.C, blocks)

    for r, lanes in common.lane_slices(blocks):
        delta = common.softplus(tokens.dt[:, lanes].astype(jnp.float32) + parameters.dt_bias[tile, :, lanes])
        scratch.u[r] = delta * tokens.x[:, lanes].astype(jnp.float32)
        scratch.delta[r] = delta if tokens.reset is None else delta + tokens.reset[...]
    A_log2e = common.split_state(parameters.A_log2e, tile, blocks)

    def step(t, state):
        B, C = common.read_broadcast(scratch.B, t, blocks), common.read_broadcast(scratch.C, t, blocks)
        new_state = []
        for r in range(blocks.lane_groups):
            delta, u = common.read_step(scratch.delta, t, r), common.read_step(scratch.u, t, r)
            # h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t  (Mamba, arXiv 2312.00752, eq. 2)
            h = [jnp.exp2(delta * A) * before + u * b for A, before, b in zip(A_log2e[r], state[r], B, strict=True)]
            # y_t = C_t h_t: the sum over the eight sublanes is deferred, to be done for many steps at once.
            scratch.partial[r, pl.ds(t * STRIDE, SUBLANES), :] = sum(c * v for c, v in zip(C, h, strict=True))
            new_state.append(h)
        return new_state

    def save(i, state):
        if outputs.boundary is not None:
            common.join_state(outputs.boundary, i, state, blocks)

    before = common.split_state(outputs.final, tile, blocks)
    state = common.unrolled(blocks, blocks.saved, step, before, begin=save)
    common.join_state(outputs.final, tile, state, blocks)
    for r, lanes in common.lane_slices(blocks):
        y = common.sum_partials(scratch.partial, r, blocks)
        y = y + parameters.D[tile, :, lanes] * tokens.x[:, lanes].astype(jnp.float32)
        if outputs.ungated is not None:
            outputs.ungated[:, lanes] = y.astype(outputs.ungated.dtype)
        if tokens.z is not None:
            z = tokens.z[:, lanes].astype(jnp.float32)
            y = y * z * common.sigmoid(z)
        outputs.y[:, lanes] = y.astype(outputs.y.dtype)
