"""Backward kernel of the selective scan on TPU: all gradients in one pass over the tokens, last chunk first.

Its residuals are the states before each chunk. In a chunk it recomputes the states forward in time, keeping them in
VMEM, and then steps backward.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import LN_2, LOG2_E, out_struct
from biomamba_jax.ops.selective_scan import pallas_tpu_blocks as common
from biomamba_jax.ops.selective_scan.inputs import Gradients
from biomamba_jax.ops.selective_scan.pallas_arrays import Parameters, Tokens
from biomamba_jax.ops.selective_scan.pallas_tpu_blocks import LANES, STRIDE, SUBLANES, Blocks

_UNROLL = 32


class Incoming(NamedTuple):
    """Cotangents of the results, and the residuals of the forward kernel."""

    dy: Any
    """[B L E]."""
    final: Any
    """[B tiles N tile]."""
    boundary: Any
    """[B chunks tiles N tile]: the state before each chunk."""
    ungated: Any | None
    """[B L E]: y before the gate."""


class _Scratch(NamedTuple):
    delta: Any
    exponent_step: Any | None  # delta + reset; None without segments: delta
    u: Any  # delta x
    g: Any  # cotangent of y before the gate
    B: Any
    C: Any
    dB: Any
    dC: Any
    before: Any  # the state before each step
    du: Any  # partial sums over d_state of dh B
    d_delta: Any  # partial sums over d_state of d(delta A) A


def backward(tokens: Tokens, parameters: Parameters, incoming: Incoming, blocks: Blocks, interpret: Any) -> Gradients:
    """Return the gradients of all inputs, those of parameters per row."""
    rows, length, channels = tokens.x.shape
    per_channel = common.token_spec(blocks, reverse=True)
    per_state = common.token_spec(blocks, blocks.d_state, reverse=True)
    state, vector = common.row_spec(blocks, blocks.d_state), common.row_spec(blocks, 1)
    x_like = out_struct(tokens.x.shape, tokens.x.dtype, tokens.x)

    def row_sums(height: int) -> jax.ShapeDtypeStruct:
        return out_struct((rows, blocks.tiles, height, blocks.tile), jnp.float32, tokens.x)

    d_per_state = out_struct((rows, length, blocks.d_state), jnp.float32, tokens.x)
    gated = blocks.gated
    out_shape = Gradients(
        x=x_like,
        dt=x_like,
        z=x_like if gated else None,
        B=d_per_state,
        C=d_per_state,
        A=row_sums(blocks.d_state),
        D=row_sums(1),
        dt_bias=row_sums(1),
        initial=row_sums(blocks.d_state),
    )
    step, projection, partial = (
        make(blocks) for make in (common.step_scratch, common.broadcast_scratch, common.partial_scratch)
    )
    scratch = _Scratch(
        delta=step,
        exponent_step=step if blocks.segmented else None,
        u=step,
        g=step,
        B=projection,
        C=projection,
        dB=projection,
        dC=projection,
        before=common.vmem(blocks.lane_groups, blocks.state_groups, blocks.chunk * SUBLANES, LANES),
        du=partial,
        d_delta=partial,
    )
    steps = rows * length * channels * blocks.d_state
    return pl.pallas_call(
        functools.partial(_kernel, blocks),
        grid=blocks.grid,
        in_specs=[
            common.token_specs(tokens, blocks, reverse=True),
            common.parameter_specs(blocks),
            Incoming(per_channel, state, common.boundary_spec(blocks, reverse=True), per_channel if gated else None),
        ],
        out_specs=[
            Gradients(
                x=per_channel,
                dt=per_channel,
                z=per_channel if gated else None,
                B=per_state,
                C=per_state,
                A=state,
                D=vector,
                dt_bias=vector,
                initial=state,
            )
        ],
        out_shape=[out_shape],
        scratch_shapes=[scratch],
        compiler_params=common.compiler_params(),
        cost_estimate=pl.CostEstimate(
            flops=24 * steps, transcendentals=2 * steps, bytes_accessed=8 * tokens.x.size * tokens.x.dtype.itemsize
        ),
        interpret=interpret,
        name="selective_scan_backward",
    )(tokens, parameters, incoming)[0]


def _kernel(
    blocks: Blocks, tokens: Tokens, parameters: Parameters, incoming: Incoming, gradients: Gradients, scratch: _Scratch
):
    chunk, tile = pl.program_id(1), pl.program_id(2)

    @pl.when(chunk == 0)
    def _():
        gradients.initial[tile] = incoming.final[tile]
        for total in (gradients.A, gradients.D, gradients.dt_bias):
            total[tile] = jnp.zeros(total.shape[1:], jnp.float32)

    @pl.when(tile == 0)
    def _():
        common.broadcast_columns(tokens.B, scratch.B, blocks)
        common.broadcast_columns(tokens.C, scratch.C, blocks)
        scratch.dB[...] = jnp.zeros_like(scratch.dB)
        scratch.dC[...] = jnp.zeros_like(scratch.dC)

    _prepare(blocks, tile, tokens, parameters, incoming, gradients, scratch)
    _step_forward(blocks, tile, parameters, incoming, scratch)
    _step_backward(blocks, tile, parameters, gradients, scratch)
    _finish(blocks, tile, tokens, parameters, gradients, scratch)

    @pl.when(tile == blocks.tiles - 1)
    def _():
        _sum_lanes(scratch.dB, gradients.B, blocks)
        _sum_lanes(scratch.dC, gradients.C, blocks)


def _prepare(blocks, tile, tokens, parameters, incoming, gradients, scratch) -> None:
    """Compute what needs no state: step sizes and the gradients of gate and skip."""
    for r, lanes in common.lane_slices(blocks):
        x = tokens.x[:, lanes].astype(jnp.float32)
        delta = common.softplus(tokens.dt[:, lanes].astype(jnp.float32) + parameters.dt_bias[tile, :, lanes])
        scratch.delta[r] = delta
        if scratch.exponent_step is not None:
            scratch.exponent_step[r] = delta + tokens.reset[...]
        scratch.u[r] = delta * x
        g = incoming.dy[:, lanes].astype(jnp.float32)
        if tokens.z is not None:
            z = tokens.z[:, lanes].astype(jnp.float32)
            gate = common.sigmoid(z)
            silu = z * gate
            d_gate = g * incoming.ungated[:, lanes].astype(jnp.float32)
            gradients.z[:, lanes] = (d_gate * (gate + silu * (1 - gate))).astype(gradients.z.dtype)
            g = g * silu
        scratch.g[r] = g
        gradients.D[tile, :, lanes] += jnp.sum(g * x, axis=0, keepdims=True)


def _step_forward(blocks, tile, parameters, incoming, scratch) -> None:
    """Recompute the states before each step, and dC_t = sum over channels of h_t g_t up to the sum over lanes."""
    A_log2e = common.split_state(parameters.A_log2e, tile, blocks)
    exponent_step = scratch.delta if scratch.exponent_step is None else scratch.exponent_step

    def step(t, state):
        B = common.read_broadcast(scratch.B, t, blocks)
        dC = [jnp.zeros((), jnp.float32)] * blocks.state_groups
        after = []
        for r in range(blocks.lane_groups):
            delta, u, g = (common.read_step(ref, t, r) for ref in (exponent_step, scratch.u, scratch.g))
            after.append([])
            for i, h in enumerate(state[r]):
                scratch.before[r, i, pl.ds(t * SUBLANES, SUBLANES), :] = h
                h = jnp.exp2(delta * A_log2e[r][i]) * h + u * B[i]
                dC[i] = h * g if r == 0 else dC[i] + h * g
                after[r].append(h)
        _add_broadcast(scratch.dC, t, dC)
        return after

    common.unrolled(blocks, _UNROLL, step, common.split_state(incoming.boundary, 0, blocks))


def _step_backward(blocks, tile, parameters, gradients, scratch) -> None:
    """Step backward in time with dh_t = C_t g_t + a_{t+1} dh_{t+1}, where a_t = exp(delta_t A)."""
    A_log2e = common.split_state(parameters.A_log2e, tile, blocks)
    exponent_step = scratch.delta if scratch.exponent_step is None else scratch.exponent_step

    def step(t, carry):
        B, C = common.read_broadcast(scratch.B, t, blocks), common.read_broadcast(scratch.C, t, blocks)
        rows = pl.ds(t * STRIDE, SUBLANES)
        dB = [jnp.zeros((), jnp.float32)] * blocks.state_groups
        new_carry = []
        for r, (later, dA) in enumerate(carry):
            delta, u, g = (common.read_step(ref, t, r) for ref in (exponent_step, scratch.u, scratch.g))
            du = d_delta = None
            new_later, new_dA = [], []
            for i in range(blocks.state_groups):
                dh = later[i] + C[i] * g
                dB[i] = dh * u if r == 0 else dB[i] + dh * u
                du = dh * B[i] if i == 0 else du + dh * B[i]
                decayed = dh * jnp.exp2(delta * A_log2e[r][i])
                d_exponent = decayed * scratch.before[r, i, pl.ds(t * SUBLANES, SUBLANES), :]
                d_step = d_exponent * A_log2e[r][i]
                d_delta = d_step if i == 0 else d_delta + d_step
                new_dA.append(dA[i] + d_exponent * delta)
                new_later.append(decayed)
            scratch.du[r, rows, :] = du
            scratch.d_delta[r, rows, :] = d_delta
            new_carry.append((new_later, new_dA))
        _add_broadcast(scratch.dB, t, dB)
        return new_carry

    zeros = [jnp.zeros((SUBLANES, LANES), jnp.float32)] * blocks.state_groups
    start = [(later, zeros) for later in common.split_state(gradients.initial, tile, blocks)]
    carry = common.unrolled(blocks, _UNROLL, step, start, reverse=True)
    common.join_state(gradients.initial, tile, [later for later, _ in carry], blocks)
    before = common.split_state(gradients.A, tile, blocks)
    dA = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(before, (dA for _, dA in carry), strict=True)]
    common.join_state(gradients.A, tile, dA, blocks)


def _finish(blocks, tile, tokens, parameters, gradients, scratch) -> None:
    """Compute the gradients of x, dt and dt_bias from the sums over d_state."""
    for r, lanes in common.lane_slices(blocks):
        x, delta, g = tokens.x[:, lanes].astype(jnp.float32), scratch.delta[r], scratch.g[r]
        du = common.sum_partials(scratch.du, r, blocks)
        dx = du * delta + g * parameters.D[tile, :, lanes]
        gradients.x[:, lanes] = dx.astype(gradients.x.dtype)
        d_delta = common.sum_partials(scratch.d_delta, r, blocks) * LN_2 + du * x
        raw = tokens.dt[:, lanes].astype(jnp.float32) + parameters.dt_bias[tile, :, lanes]
        # softplus' = sigmoid(raw) = exp(raw - softplus(raw)), which is accurate for small steps.
        d_raw = d_delta * jnp.exp2((raw - delta) * LOG2_E)
        gradients.dt[:, lanes] = d_raw.astype(gradients.dt.dtype)
        gradients.dt_bias[tile, :, lanes] += jnp.sum(d_raw, axis=0, keepdims=True)


def _add_broadcast(broadcast_ref, t, terms: list[Array]) -> None:
    for g, term in enumerate(terms):
        broadcast_ref[g, pl.ds(t * STRIDE, SUBLANES), :] += term


def _sum_lanes(broadcast_ref, column_ref, blocks: Blocks) -> None:
    """Sum the gradient of B or C over the 128 lanes: [T N]."""
    columns = jnp.zeros((blocks.chunk, blocks.d_state), jnp.float32)
    lane = jax.lax.broadcasted_iota(jnp.int32, columns.shape, 1)
    for n in range(blocks.d_state):
        group, sublane = divmod(n, SUBLANES)
        terms = broadcast_ref.at[group][pl.ds(sublane, blocks.chunk, stride=STRIDE), :]
        columns = jnp.where(lane == n, jnp.sum(terms, axis=1, keepdims=True), columns)
    column_ref[...] = columns
