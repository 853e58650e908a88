"""Backward kernels of SSD on Mosaic GPU: one for the gradients of the states, one for everything else.

The first is the forward recurrence in reverse, one warpgroup per head. The second processes each chunk independently:
one warpgroup has the tokens t that read, the other the tokens j that are read, and the same code serves both. In the
notation of the forward kernel, with E_tj = 2^(s_t - g_j), M = E o C B^T where t >= j in one segment:

    dS = 2^(s_last) dS' + C^T (2^s dy)
    reading:     M x + 2^s (C S)                    d(C B^T) = sum over heads of (dy x^T) o E
                                                    dC = d(C B^T) B + (2^s dy) S^T
    being read:  dx = M^T dy + 2^(s_last - g) (B dS') + D dy
                                                    dB = d(C B^T)^T C + (2^(s_last - g) x) dS'^T
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
from biomamba_jax.ops.ssd.pallas_common import HEADDIM, LARGEST_EXPONENT
from biomamba_jax.ops.ssd.pallas_gpu_tiles import CHUNK, SUMS, VECTORS, Product, Sizes

_SLOTS = 2


class StateInputs(NamedTuple):
    """Inputs of the state kernel."""

    dy: Any
    """[B L H P] bfloat16."""
    C: Any
    """[B L G N] bfloat16."""
    vectors: Any
    """[B chunks H 4 l], see `tiles.Vectors`."""
    d_final_state: Any
    """[B H N P]."""


class StateGradients(NamedTuple):
    """Outputs of the state kernel."""

    after: Any
    """[B chunks H N P] bfloat16, with respect to the state after each chunk."""
    initial_state: Any
    """[B H N P]."""


class _StateBuffers(NamedTuple):
    dy: Any
    C: Any
    vectors: Any


class _StateScratch(NamedTuple):
    buffers: _StateBuffers  # in two slots
    arrived: Any
    d_state: Any  # [N P] bfloat16
    weighted: Any  # [l P] bfloat16: 2^s dy


def state_gradients(inputs: StateInputs, sizes: Sizes, interpret: Any) -> StateGradients:
    """Run the state kernel."""
    state = (sizes.heads, sizes.d_state, HEADDIM)
    outputs = StateGradients(
        after=jax.ShapeDtypeStruct((sizes.batch, sizes.chunks, *state), jnp.bfloat16),
        initial_state=float32(sizes.batch, *state),
    )
    scratch = _StateScratch(
        buffers=_StateBuffers(
            dy=tiles.tile(CHUNK, HEADDIM, slots=_SLOTS),
            C=tiles.tile(CHUNK, sizes.d_state, slots=_SLOTS),
            vectors=plgpu.SMEM((_SLOTS, len(VECTORS), CHUNK), jnp.float32),
        ),
        arrived=plgpu.Barrier(num_arrivals=len(_StateBuffers._fields), num_barriers=_SLOTS),
        d_state=tiles.tile(sizes.d_state, HEADDIM),
        weighted=tiles.tile(CHUNK, HEADDIM),
    )
    grid = {"row": sizes.batch, "head": sizes.heads}
    kernel = functools.partial(_states_kernel, sizes)
    return mosaic_gpu.call(kernel, inputs, outputs, scratch, grid, name="ssd_backward_states", interpret=interpret)


def _states_kernel(sizes: Sizes, inputs: StateInputs, outputs: StateGradients, scratch: _StateScratch) -> None:
    row, head = lax.axis_index("row"), lax.axis_index("head")
    of_group = lax.div(head, jnp.int32(sizes.heads_of_group))

    def fetch(chunk: Any, slot: Any) -> None:
        time = mosaic_gpu.ds(chunk, CHUNK)
        sources = _StateBuffers(
            dy=inputs.dy.at[row, time, head],
            C=inputs.C.at[row, time, of_group],
            vectors=inputs.vectors.at[row, chunk, head],
        )
        tiles.fetch(sources, scratch.buffers, slot, scratch.arrived)

    fetch(sizes.chunks - 1, 0)

    def chunk_body(i: Any, d_state: list[Array]) -> list[Array]:
        chunk, slot = sizes.chunks - 1 - i, lax.rem(i, _SLOTS)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()

        @pl.when(chunk > 0)
        def _() -> None:
            fetch(chunk - 1, 1 - slot)

        tiles.write_state(scratch.d_state, d_state)
        plgpu.barrier_wait(scratch.arrived.at[slot])
        here = mosaic_gpu.slot(scratch.buffers, slot)
        from_start = here.vectors.at[VECTORS.from_start]
        scratch.weighted[...] = (tiles.read(here.dy) * tiles.read_column(from_start)).astype(jnp.bfloat16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.d_state, outputs.after.at[row, chunk, head])
        across = mosaic_gpu.read(from_start.at[CHUNK - 1])
        return tiles.advance(d_state, across, here.C, scratch.weighted)

    d_final = tiles.read_state(inputs.d_final_state.at[row, head], sizes)
    d_state = lax.fori_loop(0, sizes.chunks, chunk_body, d_final)
    tiles.write_state(outputs.initial_state.at[row, head], d_state)
    plgpu.wait_smem_to_gmem(0)


class Inputs(NamedTuple):
    """Inputs of the gradient kernel."""

    x: Any
    """[B L H P] bfloat16."""
    dy: Any
    """[B L H P] bfloat16."""
    B: Any
    """[B L G N] bfloat16."""
    C: Any
    """[B L G N] bfloat16."""
    states: Any
    """[B chunks H N P] bfloat16, before each chunk."""
    d_states: Any
    """[B chunks H N P] bfloat16, gradient of the state after each chunk."""
    vectors: Any
    """[B chunks H 4 l], see `tiles.Vectors`."""
    resets: Any | None
    """[B chunks l], resets in the chunk up to each token; None without segments."""
    D: Any
    """[H]."""


class Gradients(NamedTuple):
    """Outputs of the gradient kernel; those of B and C are to be summed over the blocks of a group."""

    x: Any
    """[B L H P]."""
    B: Any
    """[B blocks L N] float32."""
    C: Any
    """[B blocks L N] float32."""
    sums: Any
    """[B chunks H 4 l], see `tiles.Sums`."""
    through: Any
    """[B chunks H N]: sum over P of S dS'."""


class _Buffers(NamedTuple):
    """Double-buffered shared memory of a head's TMA copies."""

    x: Any
    dy: Any
    state: Any
    d_state: Any
    vectors: Any


class _Scratch(NamedTuple):
    buffers: _Buffers
    arrived: Any  # a barrier per slot
    consumed: Any  # a barrier per slot: both warpgroups have read it
    B: Any
    C: Any
    resets: Any  # or None
    shared_arrived: Any
    scores: tuple[Any, Any]  # of the two sides; with their gradients they would not fit into registers
    d_scores: tuple[Any, Any]
    dx: Any  # [l P]


class _Side(NamedTuple):
    """The operands of one warpgroup, whose rows are tokens t that read (columns j), or tokens j that are read."""

    reading: bool
    rows: Any  # C or B
    columns: Any  # B or C
    scores: Any  # [l l], masked; as in d_scores, each thread reads only what it wrote
    d_scores: Any  # [l l], not masked


def gradients(inputs: Inputs, sizes: Sizes, x_dtype: Any, interpret: Any) -> Gradients:
    """Run the gradient kernel."""
    x = inputs.x

    of_head = (sizes.batch, sizes.chunks, sizes.heads)
    d_per_state = float32(sizes.batch, sizes.blocks, sizes.chunks * CHUNK, sizes.d_state)
    outputs = Gradients(
        x=jax.ShapeDtypeStruct(x.shape, x_dtype),
        B=d_per_state,
        C=d_per_state,
        sums=float32(*of_head, len(SUMS), CHUNK),
        through=float32(*of_head, sizes.d_state),
    )
    per_channel, state = tiles.tile(CHUNK, HEADDIM, slots=_SLOTS), tiles.tile(sizes.d_state, HEADDIM, slots=_SLOTS)
    per_state, square = tiles.tile(CHUNK, sizes.d_state), tiles.tile(CHUNK, CHUNK, jnp.float32)
    scratch = _Scratch(
        buffers=_Buffers(
            per_channel, per_channel, state, state, plgpu.SMEM((_SLOTS, len(VECTORS), CHUNK), jnp.float32)
        ),
        arrived=plgpu.Barrier(num_arrivals=len(_Buffers._fields), num_barriers=_SLOTS),
        consumed=plgpu.Barrier(num_arrivals=2, num_barriers=_SLOTS),
        B=per_state,
        C=per_state,
        resets=plgpu.SMEM((CHUNK,), jnp.float32) if sizes.segmented else None,
        shared_arrived=plgpu.Barrier(num_arrivals=3 if sizes.segmented else 2),
        scores=(square, square),
        d_scores=(square, square),
        dx=tiles.tile(CHUNK, HEADDIM, x_dtype),
    )
    grid = {"row": sizes.batch, "chunk": sizes.chunks, "block": sizes.blocks}
    kernel = functools.partial(_kernel, sizes)
    return mosaic_gpu.call(
        kernel, inputs, outputs, scratch, grid, name="ssd_backward", interpret=interpret, warpgroups=2
    )


def _kernel(sizes: Sizes, inputs: Inputs, outputs: Gradients, scratch: _Scratch) -> None:
    row, chunk, block = (lax.axis_index(name) for name in ("row", "chunk", "block"))
    first_head = block * sizes.heads_of_block
    of_group = lax.div(first_head, jnp.int32(sizes.heads_of_group))
    time = mosaic_gpu.ds(chunk, CHUNK)

    def fetch(i: Any, slot: Any) -> None:
        head = first_head + i
        sources = _Buffers(
            x=inputs.x.at[row, time, head],
            dy=inputs.dy.at[row, time, head],
            state=inputs.states.at[row, chunk, head],
            d_state=inputs.d_states.at[row, chunk, head],
            vectors=inputs.vectors.at[row, chunk, head],
        )
        tiles.fetch(sources, scratch.buffers, slot, scratch.arrived)

    def run(side: _Side) -> None:
        if side.reading:
            for source, buffer in ((inputs.B, scratch.B), (inputs.C, scratch.C)):
                plgpu.copy_gmem_to_smem(source.at[row, time, of_group], buffer, scratch.shared_arrived)
            if inputs.resets is not None:
                plgpu.copy_gmem_to_smem(inputs.resets.at[row, chunk], scratch.resets, scratch.shared_arrived)
            fetch(0, 0)
        plgpu.barrier_wait(scratch.shared_arrived)
        scores = tiles.product(side.rows, side.columns, transpose_b=True)
        side.scores[...] = jnp.where(tiles.keep(scratch.resets, later_rows=side.reading), scores, 0.0)

        zeros = mosaic_gpu.zeros((CHUNK, CHUNK), tiles.MATRIX)
        side.d_scores[...] = zeros

        def head_body(i: Any, d_rows: list[Array]) -> list[Array]:
            slot = lax.rem(i, _SLOTS)
            if side.reading:

                @pl.when(i + 1 < sizes.heads_of_block)
                def _() -> None:
                    @pl.when(i > 0)
                    def _() -> None:
                        plgpu.barrier_wait(scratch.consumed.at[1 - slot])

                    fetch(i + 1, 1 - slot)

            plgpu.barrier_wait(scratch.arrived.at[slot])
            here = mosaic_gpu.slot(scratch.buffers, slot)
            d_rows = _head(sizes, side, (row, chunk, first_head + i), inputs, here, d_rows, outputs, scratch)
            plgpu.barrier_arrive(scratch.consumed.at[slot])
            return d_rows

        d_rows = lax.fori_loop(0, sizes.heads_of_block, head_body, [zeros for _ in range(sizes.state_tiles)])
        kept = tiles.keep(scratch.resets, later_rows=side.reading)
        d_scores = jnp.where(kept, tiles.read(side.d_scores), 0.0).astype(jnp.bfloat16)
        target = outputs.C if side.reading else outputs.B
        for k, part in enumerate(d_rows):
            part = part + tiles.product(d_scores, side.columns.at[tiles.columns(k)])
            target[row, block, time, pl.ds(k * tiles.TILE, tiles.TILE)] = part
        plgpu.wait_smem_to_gmem(0)

    sides = ((True, scratch.C, scratch.B), (False, scratch.B, scratch.C))
    for i, (side, scores, d_scores) in enumerate(zip(sides, scratch.scores, scratch.d_scores, strict=True)):
        pl.when(lax.axis_index("warpgroup") == i)(functools.partial(run, _Side(*side, scores, d_scores)))


def _head(
    sizes: Sizes,
    side: _Side,
    place: tuple[Any, Any, Any],
    inputs: Inputs,
    here: _Buffers,
    d_rows: list[Array],
    outputs: Gradients,
    scratch: _Scratch,
) -> list[Array]:
    """Process one head on one side; return `d_rows` plus the gradient of the rows through the states."""
    row, chunk, head = place
    vectors = here.vectors
    if side.reading:
        own, other, state, scale = here.dy, here.x, here.state, VECTORS.from_start
        exponent = tiles.read_column(vectors.at[VECTORS.s]) - tiles.read_row(vectors.at[VECTORS.g])
    else:
        own, other, state, scale = here.x, here.dy, here.d_state, VECTORS.to_end
        exponent = tiles.read_row(vectors.at[VECTORS.s]) - tiles.read_column(vectors.at[VECTORS.g])
    decay = jnp.exp2(jnp.minimum(exponent, LARGEST_EXPONENT))
    mixing = (tiles.read(side.scores) * decay).astype(jnp.bfloat16)
    d_mixing, through_state = tiles.products(Product(own, other, transpose_b=True), Product(side.rows, state))
    side.d_scores[...] = tiles.read(side.d_scores) + d_mixing * decay

    # Sums of paths use the rounded factors that entered the products, or else ends and begins would not cancel.
    # Tiles are reloaded for each use: registers are the bottleneck here.
    result = through_state * tiles.read_column(vectors.at[scale])
    sums = outputs.sums.at[row, chunk, head]
    if not side.reading:
        sums[SUMS.leave] = jnp.sum(tiles.read(own) * result, axis=1)
    result = result + tiles.product(mixing, other)
    sums[SUMS.ends if side.reading else SUMS.begins] = jnp.sum(tiles.read(own) * result, axis=1)
    if side.reading:
        for k in range(sizes.state_tiles):
            part = tiles.rows(k)
            states = tiles.read(here.state.at[part]) * tiles.read(here.d_state.at[part])
            outputs.through[row, chunk, head, part] = jnp.sum(states, axis=1)
    else:
        dy = tiles.read(here.dy)
        sums[SUMS.diagonal] = jnp.sum(tiles.read(own) * dy, axis=1)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the previous head's dx
        plgpu.commit_smem()
        scratch.dx[...] = (result + mosaic_gpu.read(inputs.D.at[head]) * dy).astype(scratch.dx.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(scratch.dx, outputs.x.at[row, mosaic_gpu.ds(chunk, CHUNK), head])
    weighted = (tiles.read(own) * tiles.read_column(vectors.at[scale])).astype(jnp.bfloat16)
    transposed = [Product(weighted, state.at[tiles.rows(k)], transpose_b=True) for k in range(sizes.state_tiles)]
    return [part + term for part, term in zip(d_rows, tiles.products(*transposed), strict=True)]
