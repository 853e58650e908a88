"""Backward kernel of the selective scan on Mosaic GPU: all gradients in one pass over the tokens, last chunk first.

Its residuals are the states before each chunk. It steps forward through a chunk, saving every eighth state, and then
processes the chunk eight steps at a time, last ones first: forward, with all eight states in registers, and backward.
Gradients overwrite the inputs in shared memory, so that two blocks fit on a multiprocessor.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from biomamba_jax.ops import mosaic_gpu
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import LN_2, LOG2_E, float32, struct_like
from biomamba_jax.ops.selective_scan import pallas_gpu_blocks as common
from biomamba_jax.ops.selective_scan.inputs import Gradients
from biomamba_jax.ops.selective_scan.pallas_arrays import Parameters, Tokens
from biomamba_jax.ops.selective_scan.pallas_gpu_blocks import CHUNK, GROUP, VECTOR, Blocks

_STEPS = 8  # time steps whose states are in registers at once
_PARTS = CHUNK // _STEPS
# [8 32 Q 4]: a warp has two steps, a lane a quarter of the states and every fourth channel.
_OF_CHANNELS = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 32, 4, 4), (2, 4, 4, 4))), warp_dims=(-8,), lane_dims=(-4, -3, -2), vector_dim=-1
)


class Inputs(NamedTuple):
    """Inputs of the kernel."""

    tokens: Tokens
    """Padded."""
    parameters: Parameters
    """A_log2e as [E Q 4]."""
    dy: Any
    """[B L E]."""
    d_final: Any
    """[B E Q 4]."""
    boundary: Any
    """[B chunks E Q 4]: the state before each chunk."""


class _Scratch(NamedTuple):
    tokens: Tokens  # one slot; x, dt and z are overwritten by their gradients
    dy: Any  # [T C]
    arrived: Any
    delta: Any  # [T C]
    exponent_step: Any | None  # [T C]: delta + reset; None without segments: delta
    u: Any  # [T C]: delta x
    g: Any  # [T C]: cotangent of y before the gate
    B: Any  # [T Q 4]
    C: Any  # [T Q 4]
    saved: Any  # [parts C Q 4]: the state before each part of the chunk
    terms: Any  # [8 32 Q 4]: terms of dC, then of dB, to be summed over channels
    partial: Any  # [8 C Q]: sums over a thread's states of C h, then of B dh
    d_delta: Any  # [8 C Q]: the same of d(delta A) A
    dB: Any  # [T Q 4]
    dC: Any  # [T Q 4]


class _Carry(NamedTuple):
    later: list[Array]  # the cotangent of the state from all later steps
    dA: list[Array]
    dD: Array  # [8 C], to be summed over the first axis
    dt_bias: Array  # [8 C], likewise


def backward(inputs: Inputs, blocks: Blocks, interpret: Any) -> Gradients:
    """Return the gradients of all inputs, those of parameters per row, those of B and C per tile."""
    x, dt, z = inputs.tokens.x, inputs.tokens.dt, inputs.tokens.z

    state = float32(blocks.rows, blocks.channels, blocks.quarters, VECTOR)
    d_per_state = float32(blocks.rows, blocks.tiles, blocks.length, blocks.quarters, VECTOR)
    vector = float32(blocks.rows, blocks.channels)
    outputs = Gradients(
        x=struct_like(x),
        dt=struct_like(dt),
        z=None if z is None else struct_like(z),
        B=d_per_state,
        C=d_per_state,
        A=state,
        D=vector,
        dt_bias=vector,
        initial=state,
    )
    steps, per_state = common.smem(CHUNK, blocks.width), common.smem(CHUNK, blocks.quarters, VECTOR)
    partial = common.smem(_STEPS, blocks.width, blocks.quarters)
    scratch = _Scratch(
        tokens=common.token_buffers(inputs.tokens, blocks, 1),
        dy=common.smem(CHUNK, blocks.width, dtype=inputs.dy.dtype),
        arrived=plgpu.Barrier(num_arrivals=common.copies(inputs.tokens) + 1),
        delta=steps,
        exponent_step=steps if blocks.segmented else None,
        u=steps,
        g=steps,
        B=per_state,
        C=per_state,
        saved=common.smem(_PARTS, blocks.width, blocks.quarters, VECTOR),
        terms=common.smem(_STEPS, GROUP, blocks.quarters, VECTOR),
        partial=partial,
        d_delta=partial,
        dB=per_state,
        dC=per_state,
    )
    kernel = functools.partial(_kernel, blocks)
    return mosaic_gpu.call(
        kernel, inputs, outputs, scratch, blocks.grid, name="selective_scan_backward", interpret=interpret
    )


def _kernel(blocks: Blocks, inputs: Inputs, gradients: Gradients, scratch: _Scratch) -> None:
    row, tile = lax.axis_index("row"), lax.axis_index("tile")
    first = tile * blocks.width
    channels = pl.ds(first, blocks.width)
    A_log2e, bias, skip = common.read_parameters(inputs.parameters, first, blocks)
    tokens = mosaic_gpu.slot(scratch.tokens, 0)

    def chunk_body(i: Any, carry: _Carry) -> _Carry:
        chunk = blocks.chunks - 1 - i
        time = mosaic_gpu.ds(chunk, CHUNK)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        common.fetch(inputs.tokens, tokens, scratch.arrived, row, chunk, channels)
        plgpu.copy_gmem_to_smem(inputs.dy.at[row, time, channels], scratch.dy, scratch.arrived)
        plgpu.barrier_wait(scratch.arrived)
        common.prepare(tokens, bias, scratch, blocks)
        g = common.read_tokens(scratch.dy)
        if tokens.z is not None:
            z = common.read_tokens(tokens.z)
            g = g * z * mosaic_gpu.sigmoid(z)
        scratch.g[...] = g
        plgpu.commit_smem()
        _save_states(blocks, A_log2e, common.read_states(inputs.boundary.at[row, chunk], first, blocks), scratch)

        def part_body(i: Any, carry: _Carry) -> _Carry:
            return _part(blocks, _PARTS - 1 - i, A_log2e, bias, skip, tokens, scratch, carry)

        carry = lax.fori_loop(0, _PARTS, part_body, carry)
        here = (row, time, channels)
        plgpu.copy_smem_to_gmem(tokens.x, gradients.x.at[here])
        plgpu.copy_smem_to_gmem(tokens.dt, gradients.dt.at[here])
        if tokens.z is not None:
            plgpu.copy_smem_to_gmem(tokens.z, gradients.z.at[here])
        plgpu.copy_smem_to_gmem(scratch.dB, gradients.B.at[row, tile, time])
        plgpu.copy_smem_to_gmem(scratch.dC, gradients.C.at[row, tile, time])
        return carry

    no_sum = mosaic_gpu.zeros((_STEPS, blocks.width), common.TOKEN)
    carry = _Carry(
        later=common.read_states(inputs.d_final.at[row], first, blocks),
        dA=[mosaic_gpu.zeros(blocks.state, common.STATE) for _ in range(blocks.groups)],
        dD=no_sum,
        dt_bias=no_sum,
    )
    carry = lax.fori_loop(0, blocks.chunks, chunk_body, carry)
    common.write_states(gradients.initial.at[row], first, carry.later)
    common.write_states(gradients.A.at[row], first, carry.dA)
    gradients.D[row, channels] = jnp.sum(carry.dD, axis=0)
    gradients.dt_bias[row, channels] = jnp.sum(carry.dt_bias, axis=0)
    plgpu.wait_smem_to_gmem(0)


def _save_states(blocks: Blocks, A_log2e: list[Array], state: list[Array], scratch: _Scratch) -> None:
    """Step through the chunk up to its last part. Each thread reads only what it saved: no barrier is needed."""

    def part(i: Any, state: list[Array]) -> list[Array]:
        _save(i, state)
        for k in range(_STEPS):
            t = i * _STEPS + k
            B = common.read_per_state(scratch.B, t, blocks)
            state = [_next(blocks, A_log2e[j], state[j], B, t, j, scratch) for j in range(blocks.groups)]
        return state

    def _save(i: Any, state: list[Array]) -> None:
        for j in range(blocks.groups):
            scratch.saved[i, common.group(j)] = state[j]

    _save(_PARTS - 1, lax.fori_loop(0, _PARTS - 1, part, state))


def _next(blocks: Blocks, A_log2e: Array, h: Array, B: Array, t: Any, j: int, scratch: _Scratch) -> Array:
    """Return the state of group j after step t."""
    delta, u = (common.read_channels(ref, t, j, blocks) for ref in (common.exponent_step(scratch), scratch.u))
    return jnp.exp2(delta * A_log2e) * h + u * B


def _part(
    blocks: Blocks,
    part: Any,
    A_log2e: list[Array],
    bias: Array,
    skip: Array,
    tokens: Tokens,
    scratch: _Scratch,
    carry: _Carry,
) -> _Carry:
    """Compute the gradients of eight steps."""
    start = part * _STEPS
    rows = pl.ds(start, _STEPS)
    groups = range(blocks.groups)

    states = [[mosaic_gpu.to_layout(scratch.saved[part, common.group(j)], common.STATE) for j in groups]]
    for k in range(_STEPS):
        t = start + k
        B, C = common.read_per_state(scratch.B, t, blocks), common.read_per_state(scratch.C, t, blocks)
        after = [_next(blocks, A_log2e[j], states[k][j], B, t, j, scratch) for j in groups]
        # dC_t = sum over channels of h_t g_t
        scratch.terms[k] = sum(h * common.read_channels(scratch.g, t, j, blocks) for j, h in enumerate(after))
        if tokens.z is not None:
            for j, h in enumerate(after):
                scratch.partial[k, common.group(j)] = jnp.sum(C * h, axis=2)
        states.append(after)
    plgpu.commit_smem()
    scratch.dC[rows] = _sum_channels(scratch.terms)
    x = common.read_tokens(tokens.x.at[rows])
    skipped = common.over_steps(skip, _STEPS)
    if tokens.z is not None:
        z, dy = common.read_tokens(tokens.z.at[rows]), common.read_tokens(scratch.dy.at[rows])
        y = common.sum_partials(scratch.partial) + skipped * x
        gate = mosaic_gpu.sigmoid(z)
        tokens.z[rows] = (dy * y * (gate + z * gate * (1 - gate))).astype(tokens.z.dtype)
    plgpu.commit_smem()

    later, dA = list(carry.later), list(carry.dA)
    for k in reversed(range(_STEPS)):
        t = start + k
        B, C = common.read_per_state(scratch.B, t, blocks), common.read_per_state(scratch.C, t, blocks)
        dB = []
        for j in groups:
            refs = (common.exponent_step(scratch), scratch.u, scratch.g)
            delta, u, g = (common.read_channels(ref, t, j, blocks) for ref in refs)
            # dh_t = C_t g_t + a_{t+1} dh_{t+1}, where a_t = exp(delta_t A)
            dh = later[j] + C * g
            dB.append(dh * u)
            scratch.partial[k, common.group(j)] = jnp.sum(dh * B, axis=2)
            later[j] = dh * jnp.exp2(delta * A_log2e[j])
            d_exponent = later[j] * states[k][j]
            scratch.d_delta[k, common.group(j)] = jnp.sum(d_exponent * A_log2e[j], axis=2)
            dA[j] = dA[j] + d_exponent * delta
        scratch.terms[k] = sum(dB)
    plgpu.commit_smem()
    scratch.dB[rows] = _sum_channels(scratch.terms)
    delta, g = common.read_tokens(scratch.delta.at[rows]), common.read_tokens(scratch.g.at[rows])
    du = common.sum_partials(scratch.partial)
    d_delta = common.sum_partials(scratch.d_delta) * LN_2 + du * x
    raw = common.read_tokens(tokens.dt.at[rows]) + common.over_steps(bias, _STEPS)
    # softplus' = sigmoid(raw) = exp(raw - softplus(raw)), which is accurate for small steps.
    d_raw = d_delta * jnp.exp2((raw - delta) * LOG2_E)
    tokens.x[rows] = (du * delta + g * skipped).astype(tokens.x.dtype)
    tokens.dt[rows] = d_raw.astype(tokens.dt.dtype)
    plgpu.commit_smem()
    return _Carry(later, dA, carry.dD + g * x, carry.dt_bias + d_raw)


def _sum_channels(terms: Any) -> Array:
    """Reduce [8 32 Q 4] -> [8 Q 4]."""
    return jnp.sum(mosaic_gpu.read(terms, _OF_CHANNELS), axis=1)
