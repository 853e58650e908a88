"""Forward kernel of SSD on Mosaic GPU: one warpgroup per head of a row, chunk after chunk.

With s_t the sum of log2(e) d A up to token t of the chunk and g_t = s_t - log2 d_t:

    y_t = sum_{j<=t} (C_t . B_j) 2^(s_t - g_j) x_j  +  2^(s_t) C_t . S  +  D x_t
    S' = 2^(s_last) S + sum_j 2^(s_last - g_j) B_j x_j^T

The state stays in registers. While a chunk is computed, the TMA engine copies the next one.
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
from biomamba_jax.ops.kernel_arrays import float32
from biomamba_jax.ops.ssd import pallas_gpu_tiles as tiles
from biomamba_jax.ops.ssd.pallas_common import HEADDIM
from biomamba_jax.ops.ssd.pallas_gpu_tiles import CHUNK, VECTORS, Product, Sizes

_SLOTS = 2


class Inputs(NamedTuple):
    """Inputs of the kernel."""

    x: Any
    """[B L H P] bfloat16."""
    B: Any
    """[B L G N] bfloat16."""
    C: Any
    """[B L G N] bfloat16."""
    vectors: Any
    """[B chunks H 4 l], see `tiles.Vectors`."""
    resets: Any | None
    """[B chunks l], resets in the chunk up to each token; None without segments."""
    D: Any
    """[H]."""
    initial_state: Any
    """[B H N P]."""


class Outputs(NamedTuple):
    """Outputs of the kernel."""

    y: Any
    """[B L H P]."""
    final_state: Any
    """[B H N P]."""
    states: Any | None
    """[B chunks H N P] bfloat16, before each chunk."""


class _Buffers(NamedTuple):
    """Double-buffered shared memory of the TMA copies."""

    x: Any  # overwritten by y if y is bfloat16
    B: Any
    C: Any
    vectors: Any
    resets: Any | None


class _Scratch(NamedTuple):
    buffers: _Buffers
    arrived: Any  # a barrier per slot
    state: Any  # [N P] bfloat16
    weighted: Any  # [l P] bfloat16: 2^(s_last - g) x
    y: Any | None  # [l P] if y is not bfloat16


def forward(inputs: Inputs, sizes: Sizes, y_dtype: Any, save_states: bool, interpret: Any) -> Outputs:
    """Run the kernel."""
    x = inputs.x
    state = (sizes.heads, sizes.d_state, HEADDIM)
    outputs = Outputs(
        y=jax.ShapeDtypeStruct(x.shape, y_dtype),
        final_state=float32(sizes.batch, *state),
        states=jax.ShapeDtypeStruct((sizes.batch, sizes.chunks, *state), jnp.bfloat16) if save_states else None,
    )
    per_state = tiles.tile(CHUNK, sizes.d_state, slots=_SLOTS)
    scratch = _Scratch(
        buffers=_Buffers(
            x=tiles.tile(CHUNK, HEADDIM, slots=_SLOTS),
            B=per_state,
            C=per_state,
            vectors=plgpu.SMEM((_SLOTS, len(VECTORS), CHUNK), jnp.float32),
            resets=plgpu.SMEM((_SLOTS, CHUNK), jnp.float32) if sizes.segmented else None,
        ),
        arrived=plgpu.Barrier(num_arrivals=5 if sizes.segmented else 4, num_barriers=_SLOTS),
        state=tiles.tile(sizes.d_state, HEADDIM),
        weighted=tiles.tile(CHUNK, HEADDIM),
        y=None if y_dtype == jnp.bfloat16 else tiles.tile(CHUNK, HEADDIM, y_dtype),
    )
    grid = {"row": sizes.batch, "head": sizes.heads}
    kernel = functools.partial(_kernel, sizes)
    return mosaic_gpu.call(kernel, inputs, outputs, scratch, grid, name="ssd_forward", interpret=interpret)


def _kernel(sizes: Sizes, inputs: Inputs, outputs: Outputs, scratch: _Scratch) -> None:
    row, head = lax.axis_index("row"), lax.axis_index("head")
    of_group = lax.div(head, jnp.int32(sizes.heads_of_group))
    skip = mosaic_gpu.read(inputs.D.at[head])

    def fetch(chunk: Any, slot: Any) -> None:
        time = mosaic_gpu.ds(chunk, CHUNK)
        sources = _Buffers(
            x=inputs.x.at[row, time, head],
            B=inputs.B.at[row, time, of_group],
            C=inputs.C.at[row, time, of_group],
            vectors=inputs.vectors.at[row, chunk, head],
            resets=None if inputs.resets is None else inputs.resets.at[row, chunk],
        )
        tiles.fetch(sources, scratch.buffers, slot, scratch.arrived)

    fetch(0, 0)

    def chunk_body(chunk: Any, state: list[Array]) -> list[Array]:
        slot = lax.rem(chunk, _SLOTS)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous chunk's y and state
        plgpu.commit_smem()

        @pl.when(chunk + 1 < sizes.chunks)
        def _() -> None:
            fetch(chunk + 1, 1 - slot)

        tiles.write_state(scratch.state, state)
        plgpu.barrier_wait(scratch.arrived.at[slot])
        here = mosaic_gpu.slot(scratch.buffers, slot)
        to_end = tiles.read_column(here.vectors.at[VECTORS.to_end])
        scratch.weighted[...] = (tiles.read(here.x) * to_end).astype(jnp.bfloat16)
        plgpu.commit_smem()
        if outputs.states is not None:
            plgpu.copy_smem_to_gmem(scratch.state, outputs.states.at[row, chunk, head])

        scores, from_state = tiles.products(Product(here.C, here.B, transpose_b=True), Product(here.C, scratch.state))
        exponent = tiles.read_column(here.vectors.at[VECTORS.s]) - tiles.read_row(here.vectors.at[VECTORS.g])
        kept = tiles.keep(here.resets, later_rows=True)
        mixing = jnp.where(kept, scores * jnp.exp2(exponent), 0.0).astype(jnp.bfloat16)
        y = from_state * tiles.read_column(here.vectors.at[VECTORS.from_start])
        y = y + tiles.product(mixing, here.x)
        y = y + skip * tiles.read(here.x)
        plgpu.commit_smem()  # all warps have read x
        to_store = here.x if scratch.y is None else scratch.y
        to_store[...] = y.astype(to_store.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(to_store, outputs.y.at[row, mosaic_gpu.ds(chunk, CHUNK), head])
        across = mosaic_gpu.read(here.vectors.at[VECTORS.from_start, CHUNK - 1])
        return tiles.advance(state, across, here.B, scratch.weighted)

    initial = tiles.read_state(inputs.initial_state.at[row, head], sizes)
    state = lax.fori_loop(0, sizes.chunks, chunk_body, initial)
    tiles.write_state(outputs.final_state.at[row, head], state)
    plgpu.wait_smem_to_gmem(0)
