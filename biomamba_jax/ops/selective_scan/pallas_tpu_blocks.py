"""How the TPU kernels of the selective scan cut up the work, and the steps that both directions share.

The state of 128 channels is d_state / 8 vector registers: d_state along sublanes, channels along lanes. A tile of up to
512 channels keeps its state in registers through a chunk of time steps, so that the steps of four independent groups of
128 channels hide each other's latency. The grid is (rows, chunks, tiles): B and C are spread over the lanes once a
chunk and serve all tiles.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from biomamba_jax.ops.array_typing import Array

LANES = 128
SUBLANES = 8
# Eight rows that are read with a stride of 8 lie in the same memory bank and take two loads; with a stride of 9, one.
STRIDE = SUBLANES + 1
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
# The exponent delta A of a step into a new segment becomes -infinity in all but name, and its decay exactly 0: the
# reset costs nothing inside the loop. Infinity itself would make NaN of 0 * delta in the gradient by A.
RESET_STEP = 1e33
WEAKEST_A = -1e-30  # with segments: a decay rate of 0 could not be overcome by any step


class Blocks(NamedTuple):
    """Sizes of padded arrays and of their blocks; static."""

    rows: int
    length: int  # a multiple of chunk
    channels: int  # a multiple of tile
    d_state: int  # a multiple of 8
    chunk: int  # time steps between two states that are kept, a multiple of 8
    tile: int  # channels, a multiple of 128
    most_unrolled: int  # time steps in one turn of an inner loop, at most
    gated: bool
    segmented: bool

    @property
    def tiles(self) -> int:
        return self.channels // self.tile

    @property
    def lane_groups(self) -> int:
        return self.tile // LANES

    @property
    def state_groups(self) -> int:
        return self.d_state // SUBLANES

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.rows, self.length // self.chunk, self.tiles


class Tokens(NamedTuple):
    """Padded inputs that differ from token to token."""

    x: Array  # [B L E]
    dt: Array  # [B L E]
    z: Array | None  # [B L E]
    B: Array  # [B L N]
    C: Array  # [B L N]
    reset: Array | None  # [B L 1] float32: what is added to delta in the exponent, 0 or RESET_STEP


class Parameters(NamedTuple):
    """Padded parameters, float32."""

    A_log2e: Array  # [tiles N tile]: exp(delta A) = exp2(delta A_log2e)
    D: Array  # [tiles 1 tile]
    dt_bias: Array  # [tiles 1 tile]


def token_spec(blocks: Blocks, width: int | None = None, reverse: bool = False) -> pl.BlockSpec:
    """Block of an array [B L E], or of [B L width] shared by all tiles; `reverse` takes the last chunk first."""
    last = blocks.grid[1] - 1

    def index(row, chunk, tile):
        return row, last - chunk if reverse else chunk, tile if width is None else 0

    return pl.BlockSpec((None, blocks.chunk, width or blocks.tile), index)


def boundary_spec(blocks: Blocks, reverse: bool = False) -> pl.BlockSpec:
    """Block of the states before each chunk [B chunks tiles N tile]."""
    last = blocks.grid[1] - 1
    shape = (None, None, None, blocks.d_state, blocks.tile)
    return pl.BlockSpec(shape, lambda row, chunk, tile: (row, last - chunk if reverse else chunk, tile, 0, 0))


def row_spec(blocks: Blocks, height: int) -> pl.BlockSpec:
    """All tiles of one row of an array [B tiles height tile], in VMEM as long as the row lasts."""
    shape = (None, blocks.tiles, height, blocks.tile)
    return pl.BlockSpec(shape, lambda row, chunk, tile: (row, 0, 0, 0))


def parameter_spec(blocks: Blocks, height: int) -> pl.BlockSpec:
    """All of an array [tiles height tile], in VMEM throughout."""
    return pl.BlockSpec((blocks.tiles, height, blocks.tile), lambda row, chunk, tile: (0, 0, 0))


def token_specs(blocks: Blocks, reverse: bool = False) -> Tokens:
    wide, narrow = token_spec(blocks, reverse=reverse), token_spec(blocks, blocks.d_state, reverse)
    reset = token_spec(blocks, 1, reverse) if blocks.segmented else None
    return Tokens(wide, wide, wide if blocks.gated else None, narrow, narrow, reset)


def parameter_specs(blocks: Blocks) -> Parameters:
    vector = parameter_spec(blocks, 1)
    return Parameters(parameter_spec(blocks, blocks.d_state), vector, vector)


def vmem(*shape: int) -> pl.MemoryRef:
    return pltpu.VMEM(shape, jnp.float32)


def spread_scratch(blocks: Blocks) -> pl.MemoryRef:
    """For one value per time step and state, each in its own row of lanes."""
    return vmem(blocks.state_groups, blocks.chunk * STRIDE, LANES)


def partial_scratch(blocks: Blocks) -> pl.MemoryRef:
    """For sums over d_state that still have 8 terms, in sublanes, for each time step of each lane group."""
    return vmem(blocks.lane_groups, blocks.chunk * STRIDE, LANES)


def step_scratch(blocks: Blocks) -> pl.MemoryRef:
    """For one value per time step and channel."""
    return vmem(blocks.lane_groups, blocks.chunk, LANES)


def lane_slices(blocks: Blocks) -> list[tuple[int, slice]]:
    return [(r, slice(r * LANES, (r + 1) * LANES)) for r in range(blocks.lane_groups)]


def softplus(raw: Array) -> Array:
    """log(1 + exp(raw)), to 3e-6 relative: steps of 1e-4 and less are common, where log(1 + e) alone has 3 digits."""
    e = jnp.exp2(jnp.abs(raw) * -LOG2_E)
    series = e * (1 + e * (-0.5 + e * (1 / 3)))
    return jnp.maximum(raw, 0) + jnp.where(e < 0.02, series, jnp.log(1 + e))


def sigmoid(z: Array) -> Array:
    """One tanh, which has its own hardware unit, in place of an exponential and a division."""
    return 0.5 + 0.5 * jnp.tanh(0.5 * z)


def spread(column_ref, spread_ref, blocks: Blocks) -> None:
    """Copies each value of B or C [T N] over the 128 lanes of its own row."""
    columns = column_ref[...].astype(jnp.float32)
    for n in range(blocks.d_state):
        group, sublane = divmod(n, SUBLANES)
        over_lanes = jnp.broadcast_to(columns[:, n : n + 1], (blocks.chunk, LANES))
        spread_ref.at[group][pl.ds(sublane, blocks.chunk, stride=STRIDE), :] = over_lanes


def read_spread(spread_ref, t, blocks: Blocks) -> list[Array]:
    """The d_state values of step t, eight in sublanes for each group."""
    return [spread_ref[g, pl.ds(t * STRIDE, SUBLANES), :] for g in range(blocks.state_groups)]


def read_step(step_ref, t, lane_group: int) -> Array:
    """The value of each channel at step t, copied to all sublanes by the load itself."""
    return jnp.broadcast_to(step_ref[lane_group, pl.ds(t, 1), :], (SUBLANES, LANES))


def sum_partials(partial_ref, lane_group: int, blocks: Blocks) -> Array:
    """The put-off last part of the sum over d_state, for all steps of the chunk: [T 128]."""
    terms = [partial_ref.at[lane_group][pl.ds(s, blocks.chunk, stride=STRIDE), :] for s in range(SUBLANES)]
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def split_state(state_ref, tile, blocks: Blocks) -> list[list[Array]]:
    """State registers [lane group][state group] of one tile, from [tiles N tile], or with tile None from [N tile]."""
    ref = state_ref if tile is None else state_ref.at[tile]
    return [
        [ref[g * SUBLANES : (g + 1) * SUBLANES, lanes] for g in range(blocks.state_groups)]
        for _, lanes in lane_slices(blocks)
    ]


def join_state(state_ref, tile, state: list[list[Array]], blocks: Blocks) -> None:
    for r, lanes in lane_slices(blocks):
        for g in range(blocks.state_groups):
            state_ref[tile, g * SUBLANES : (g + 1) * SUBLANES, lanes] = state[r][g]


def unrolled(blocks: Blocks, steps: int, step, carry, reverse: bool = False):
    """step(t, carry) for all time steps of the chunk, up to `steps` of them (a power of two) in one turn of the loop.

    A turn costs about 24 cycles besides its steps, of which each takes 15 (forward) to 29 (backward).
    """
    steps = math.gcd(blocks.chunk, min(steps, blocks.most_unrolled))

    def turn(i, carry):
        for k in range(steps):
            t = i * steps + k
            carry = step(blocks.chunk - 1 - t if reverse else t, carry)
        return carry

    return jax.lax.fori_loop(0, blocks.chunk // steps, turn, carry)


def out_struct(shape: tuple[int, ...], dtype, like: Array) -> jax.ShapeDtypeStruct:
    """Inside `shard_map`, an output varies over the same mesh axes as the inputs."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


compiler_params = functools.partial(
    # Rows are independent, so a chip of two cores may share them out; chunks carry the state, tiles share B and C.
    pltpu.CompilerParams,
    dimension_semantics=("parallel", "arbitrary", "arbitrary"),
)
