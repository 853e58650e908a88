"""Forward kernel of the selective scan on Mosaic GPU: softplus, recurrence, skip and gate in one pass.

Two slots of shared memory are double-buffered: while one chunk is computed, the TMA engine copies the next one.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from biomamba_jax.ops import mosaic_gpu
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import float32, struct_like
from biomamba_jax.ops.selective_scan import pallas_gpu_blocks as common
from biomamba_jax.ops.selective_scan.pallas_arrays import Parameters, Tokens
from biomamba_jax.ops.selective_scan.pallas_gpu_blocks import CHUNK, Blocks

_UNROLL = 4
_SLOTS = 2


class Inputs(NamedTuple):
    """Inputs of the kernel."""

    tokens: Tokens
    """Padded."""
    parameters: Parameters
    """A_log2e as [E Q 4]."""
    initial: Any
    """[B E Q 4]."""


class Outputs(NamedTuple):
    """Outputs of the kernel."""

    y: Any
    """[B L E]."""
    final: Any
    """[B E Q 4]."""
    boundary: Any | None
    """[B chunks E Q 4]: the state before each chunk."""


class _Scratch(NamedTuple):
    tokens: Tokens  # two slots
    arrived: Any  # a barrier per slot
    delta: Any  # [T C]
    exponent_step: Any | None  # [T C]: delta + reset; None without segments: delta
    u: Any  # [T C]: delta x
    B: Any  # [T Q 4]
    C: Any  # [T Q 4]
    partial: Any  # [T C Q]: sums of C h over a thread's states
    y: Any  # [T C]


def forward(inputs: Inputs, blocks: Blocks, for_backward: bool, interpret: Any) -> Outputs:
    """Return all outputs, the final state and, with `for_backward`, the states before each chunk."""
    x = inputs.tokens.x
    state = (blocks.channels, blocks.quarters, common.VECTOR)
    outputs = Outputs(
        y=struct_like(x),
        final=float32(blocks.rows, *state),
        boundary=float32(blocks.rows, blocks.chunks, *state) if for_backward else None,
    )
    steps = common.smem(CHUNK, blocks.width)
    per_state = common.smem(CHUNK, blocks.quarters, common.VECTOR)
    scratch = _Scratch(
        tokens=common.token_buffers(inputs.tokens, blocks, _SLOTS),
        arrived=plgpu.Barrier(num_arrivals=common.copies(inputs.tokens), num_barriers=_SLOTS),
        delta=steps,
        exponent_step=steps if blocks.segmented else None,
        u=steps,
        B=per_state,
        C=per_state,
        partial=common.smem(CHUNK, blocks.width, blocks.quarters),
        y=common.smem(CHUNK, blocks.width, dtype=x.dtype),
    )
    kernel = functools.partial(_kernel, blocks)
    return mosaic_gpu.call(
        kernel, inputs, outputs, scratch, blocks.grid, name="selective_scan_forward", interpret=interpret
    )


def _kernel(blocks: Blocks, inputs: Inputs, outputs: Outputs, scratch: _Scratch) -> None:
    row, tile = lax.axis_index("row"), lax.axis_index("tile")
    first = tile * blocks.width
    A_log2e, bias, skip = common.read_parameters(inputs.parameters, first, blocks)

    def fetch(chunk: Any, slot: Any) -> None:
        buffers, arrived = mosaic_gpu.slot(scratch.tokens, slot), scratch.arrived.at[slot]
        common.fetch(inputs.tokens, buffers, arrived, row, chunk, pl.ds(first, blocks.width))

    fetch(0, 0)

    def chunk_body(chunk: Any, state: list[Array]) -> list[Array]:
        slot = lax.rem(chunk, _SLOTS)

        @pl.when(chunk + 1 < blocks.chunks)
        def _() -> None:
            fetch(chunk + 1, 1 - slot)

        if outputs.boundary is not None:
            common.write_states(outputs.boundary.at[row, chunk], first, state)
        plgpu.barrier_wait(scratch.arrived.at[slot])
        tokens = mosaic_gpu.slot(scratch.tokens, slot)
        common.prepare(tokens, bias, scratch, blocks)
        plgpu.commit_smem()
        state = _steps(blocks, A_log2e, state, scratch)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous chunk's y
        plgpu.commit_smem()

        x = common.read_tokens(tokens.x)
        y = common.sum_partials(scratch.partial) + common.over_steps(skip, CHUNK) * x
        if tokens.z is not None:
            z = common.read_tokens(tokens.z)
            y = y * z * mosaic_gpu.sigmoid(z)
        scratch.y[...] = y.astype(scratch.y.dtype)
        plgpu.commit_smem()
        here = outputs.y.at[row, mosaic_gpu.ds(chunk, CHUNK), pl.ds(first, blocks.width)]
        plgpu.copy_smem_to_gmem(scratch.y, here)
        return state

    state = lax.fori_loop(0, blocks.chunks, chunk_body, common.read_states(inputs.initial.at[row], first, blocks))
    common.write_states(outputs.final.at[row], first, state)
    plgpu.wait_smem_to_gmem(0)


def _steps(blocks: Blocks, A_log2e: list[Array], state: list[Array], scratch: _Scratch) -> list[Array]:
    """Step through the chunk."""

    def step(t: Any, state: list[Array]) -> list[Array]:
        B, C = common.read_per_state(scratch.B, t, blocks), common.read_per_state(scratch.C, t, blocks)
        after = []
        for j in range(blocks.groups):
            delta, u = (common.read_channels(ref, t, j, blocks) for ref in (common.exponent_step(scratch), scratch.u))
            # h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t;  y_t = C_t h_t  (Mamba, arXiv 2312.00752, eq. 2)
            h = jnp.exp2(delta * A_log2e[j]) * state[j] + u * B
            scratch.partial[t, common.group(j)] = jnp.sum(C * h, axis=2)
            after.append(h)
        return after

    return common.unrolled(CHUNK, _UNROLL, step, state)
