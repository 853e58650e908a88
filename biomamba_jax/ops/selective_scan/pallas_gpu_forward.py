"""The forward kernel of the selective scan on Mosaic GPU: softplus, recurrence, skip and gate in one pass.

While a chunk is computed, the copy engine brings the next one: two slots of shared memory take turns.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from biomamba_jax.ops import mosaic_gpu
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.selective_scan import pallas_gpu_blocks as cut
from biomamba_jax.ops.selective_scan.pallas_gpu_blocks import CHUNK, Blocks, Parameters, Tokens

_UNROLL = 4
_SLOTS = 2


class Inputs(NamedTuple):
    tokens: Tokens
    parameters: Parameters
    initial: Any  # [B E Q 4]


class Outputs(NamedTuple):
    y: Any  # [B L E]
    final: Any  # [B E Q 4]
    boundary: Any | None  # [B chunks E Q 4]: the state before each chunk


class _Scratch(NamedTuple):
    tokens: Tokens  # two slots
    arrived: Any  # a barrier for each slot
    delta: Any  # [T C]
    exponent_step: Any | None  # [T C]: delta, or RESET_STEP at a reset; None where it is delta
    u: Any  # [T C]: delta x
    B: Any  # [T Q 4]
    C: Any  # [T Q 4]
    partial: Any  # [T C Q]: sums of C h over a thread's states
    y: Any  # [T C]


def forward(inputs: Inputs, blocks: Blocks, for_backward: bool, interpret: Any) -> Outputs:
    """All outputs, the last state and, `for_backward`, the states before each chunk."""
    x = inputs.tokens.x
    state = (blocks.channels, blocks.quarters, cut.VECTOR)
    outputs = Outputs(
        y=jax.ShapeDtypeStruct(x.shape, x.dtype),
        final=jax.ShapeDtypeStruct((blocks.rows, *state), jnp.float32),
        boundary=jax.ShapeDtypeStruct((blocks.rows, blocks.chunks, *state), jnp.float32) if for_backward else None,
    )
    steps = cut.smem(CHUNK, blocks.width)
    narrow = cut.smem(CHUNK, blocks.quarters, cut.VECTOR)
    scratch = _Scratch(
        tokens=cut.token_buffers(inputs.tokens, blocks, _SLOTS),
        arrived=plgpu.Barrier(num_arrivals=cut.copies(inputs.tokens), num_barriers=_SLOTS),
        delta=steps,
        exponent_step=steps if blocks.segmented else None,
        u=steps,
        B=narrow,
        C=narrow,
        partial=cut.smem(CHUNK, blocks.width, blocks.quarters),
        y=cut.smem(CHUNK, blocks.width, dtype=x.dtype),
    )
    kernel = functools.partial(_kernel, blocks)
    return mosaic_gpu.call(
        kernel, inputs, outputs, scratch, blocks.grid, name="selective_scan_forward", interpret=interpret
    )


def _kernel(blocks: Blocks, inputs: Inputs, outputs: Outputs, scratch: _Scratch) -> None:
    row, tile = lax.axis_index("row"), lax.axis_index("tile")
    first = tile * blocks.width
    parameters = inputs.parameters
    A_log2e = cut.read_states(parameters.A_log2e, first, blocks)
    bias, skip = (
        mosaic_gpu.read(v.at[pl.ds(first, blocks.width)], cut.VECTOR_OF_CHANNELS)
        for v in (parameters.dt_bias, parameters.D)
    )

    def fetch(chunk: Any, slot: Any) -> None:
        buffers, arrived = cut.of_slot(scratch.tokens, slot), scratch.arrived.at[slot]
        cut.fetch(inputs.tokens, buffers, arrived, row, chunk, pl.ds(first, blocks.width))

    fetch(0, 0)

    def chunk_body(chunk: Any, state: list[Array]) -> list[Array]:
        slot = lax.rem(chunk, _SLOTS)

        @pl.when(chunk + 1 < blocks.chunks)
        def _() -> None:
            fetch(chunk + 1, 1 - slot)

        if outputs.boundary is not None:
            cut.write_states(outputs.boundary.at[row, chunk], first, state)
        plgpu.barrier_wait(scratch.arrived.at[slot])
        tokens = cut.of_slot(scratch.tokens, slot)
        cut.prepare(tokens, bias, scratch, blocks)
        plgpu.commit_smem()
        state = _steps(blocks, A_log2e, state, scratch)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the y of the chunk before
        plgpu.commit_smem()

        x = cut.read_tokens(tokens.x)
        y = cut.sum_partials(scratch.partial) + cut.over_steps(skip, CHUNK) * x
        if tokens.z is not None:
            z = cut.read_tokens(tokens.z)
            y = y * z * mosaic_gpu.sigmoid(z)
        scratch.y[...] = y.astype(scratch.y.dtype)
        plgpu.commit_smem()
        here = outputs.y.at[row, mosaic_gpu.ds(chunk, CHUNK), pl.ds(first, blocks.width)]
        plgpu.copy_smem_to_gmem(scratch.y, here)
        return state

    state = lax.fori_loop(0, blocks.chunks, chunk_body, cut.read_states(inputs.initial.at[row], first, blocks))
    cut.write_states(outputs.final.at[row], first, state)
    plgpu.wait_smem_to_gmem(0)


def _steps(blocks: Blocks, A_log2e: list[Array], state: list[Array], scratch: _Scratch) -> list[Array]:
    """Through the chunk, step by step."""
    exponent_step = scratch.delta if scratch.exponent_step is None else scratch.exponent_step

    def step(t: Any, state: list[Array]) -> list[Array]:
        B, C = cut.read_narrow(scratch.B, t, blocks), cut.read_narrow(scratch.C, t, blocks)
        after = []
        for j in range(blocks.groups):
            delta, u = (cut.read_channels(ref, t, j, blocks) for ref in (exponent_step, scratch.u))
            # h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t;  y_t = C_t h_t  (Mamba, arXiv 2312.00752, eq. 2)
            h = jnp.exp2(delta * A_log2e[j]) * state[j] + u * B
            scratch.partial[t, cut.group(j)] = jnp.sum(C * h, axis=2)
            after.append(h)
        return after

    return cut.unrolled(CHUNK, _UNROLL, step, state)
