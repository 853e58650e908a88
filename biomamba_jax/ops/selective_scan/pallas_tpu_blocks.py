"""Blocking of the TPU kernels of the selective scan, and the operations that both directions share.

The state of 128 channels is d_state / 8 vector registers: d_state along sublanes, channels along lanes. A tile of up to
512 channels keeps its state in registers through a chunk of time steps, so that the steps of four independent groups of
128 channels hide each other's latency. The grid is (rows, chunks, tiles): B and C are broadcast over the lanes once per
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
from biomamba_jax.ops.kernel_arrays import LOG2_E
from biomamba_jax.ops.selective_scan.pallas_arrays import Parameters, Tokens

LANES = 128
SUBLANES = 8
# Eight rows read with a stride of 8 are in the same memory bank and take two loads; with a stride of 9, one.
STRIDE = SUBLANES + 1


class Blocks(NamedTuple):
    """Sizes of padded arrays and of their blocks; static."""

    rows: int
    """Rows of the batch."""
    length: int
    """A multiple of chunk."""
    channels: int
    """A multiple of tile."""
    d_state: int
    """A multiple of 8."""
    saved: int
    """Time steps between two saved states, a multiple of 8."""
    chunk: int
    """Time steps of a block, a multiple of `saved`."""
    tile: int
    """Channels of a block, a multiple of 128."""
    interpreted: bool
    """True without a TPU."""
    gated: bool
    """True if there is a gate z."""
    segmented: bool
    """True if there are segment ids."""

    @property
    def tiles(self) -> int:
        """Tiles of channels."""
        return self.channels // self.tile

    @property
    def lane_groups(self) -> int:
        """Groups of 128 channels in a tile."""
        return self.tile // LANES

    @property
    def state_groups(self) -> int:
        """Groups of 8 states."""
        return self.d_state // SUBLANES

    @property
    def grid(self) -> tuple[int, int, int]:
        """(rows, chunks, tiles)."""
        return self.rows, self.length // self.chunk, self.tiles


def token_spec(blocks: Blocks, width: int | None = None, reverse: bool = False) -> pl.BlockSpec:
    """Return the spec of [B L E], or of [B L width] shared by all tiles; `reverse` visits the last chunk first."""
    last = blocks.grid[1] - 1

    def index(row, chunk, tile):
        return row, last - chunk if reverse else chunk, tile if width is None else 0

    return pl.BlockSpec((None, blocks.chunk, width or blocks.tile), index)


def boundary_spec(blocks: Blocks, reverse: bool = False) -> pl.BlockSpec:
    """Return the spec of the saved states of a block [B L/saved tiles N tile]."""
    last = blocks.grid[1] - 1
    shape = (None, blocks.chunk // blocks.saved, None, blocks.d_state, blocks.tile)
    return pl.BlockSpec(shape, lambda row, chunk, tile: (row, last - chunk if reverse else chunk, tile, 0, 0))


def row_spec(blocks: Blocks, height: int) -> pl.BlockSpec:
    """Return the spec of [B tiles height tile]: all tiles of a row, resident in VMEM for the whole row."""
    shape = (None, blocks.tiles, height, blocks.tile)
    return pl.BlockSpec(shape, lambda row, chunk, tile: (row, 0, 0, 0))


def parameter_spec(blocks: Blocks, height: int) -> pl.BlockSpec:
    """Return the spec of [tiles height tile]: the whole array, resident in VMEM."""
    return pl.BlockSpec((blocks.tiles, height, blocks.tile), lambda row, chunk, tile: (0, 0, 0))


def token_specs(tokens: Tokens, blocks: Blocks, reverse: bool = False) -> Tokens:
    """Return the specs of all per-token inputs."""
    per_channel = token_spec(blocks, reverse=reverse)
    B, C = (token_spec(blocks, v.shape[2], reverse) for v in (tokens.B, tokens.C))
    reset = token_spec(blocks, 1, reverse) if blocks.segmented else None
    return Tokens(per_channel, per_channel, per_channel if blocks.gated else None, B, C, reset)


def parameter_specs(blocks: Blocks) -> Parameters:
    """Return the specs of all parameters."""
    vector = parameter_spec(blocks, 1)
    return Parameters(parameter_spec(blocks, blocks.d_state), vector, vector)


def vmem(*shape: int) -> pl.MemoryRef:
    """Return a float32 scratch buffer."""
    return pltpu.VMEM(shape, jnp.float32)


def broadcast_scratch(blocks: Blocks) -> pl.MemoryRef:
    """Return scratch for one value per time step and state, each broadcast over its own row of lanes."""
    return vmem(blocks.state_groups, blocks.chunk * STRIDE, LANES)


def partial_scratch(blocks: Blocks) -> pl.MemoryRef:
    """Return scratch for partial sums over d_state: 8 terms, in sublanes, per time step and lane group."""
    return vmem(blocks.lane_groups, blocks.chunk * STRIDE, LANES)


def step_scratch(blocks: Blocks) -> pl.MemoryRef:
    """Return scratch for one value per time step and channel."""
    return vmem(blocks.lane_groups, blocks.chunk, LANES)


def lane_slices(blocks: Blocks) -> list[tuple[int, slice]]:
    """Return (index, channels of the tile) of each group of 128 channels."""
    return [(r, slice(r * LANES, (r + 1) * LANES)) for r in range(blocks.lane_groups)]


def softplus(raw: Array) -> Array:
    """Return log(1 + exp(raw)) to 3e-6 relative: for common steps of 1e-4 and less, log(1 + e) alone has 3 digits."""
    e = jnp.exp2(jnp.abs(raw) * -LOG2_E)
    series = e * (1 + e * (-0.5 + e * (1 / 3)))
    return jnp.maximum(raw, 0) + jnp.where(e < 0.02, series, jnp.log(1 + e))


def sigmoid(z: Array) -> Array:
    """Return the sigmoid by one tanh, which the hardware has, instead of an exponential and a division."""
    return 0.5 + 0.5 * jnp.tanh(0.5 * z)


def words(v: Array) -> Array:
    """Return the bits of B or C [B L N] as int32: two states of bfloat16 in a word, or one as float32."""
    if v.dtype != jnp.bfloat16:
        return jax.lax.bitcast_convert_type(v.astype(jnp.float32), jnp.int32)
    return jax.lax.bitcast_convert_type(v.reshape(*v.shape[:2], -1, 2), jnp.int32)


def broadcast_columns(words_ref, broadcast_ref, blocks: Blocks) -> None:
    """Broadcast each value of B or C, as `words` [T N] or [T N/2], over the 128 lanes of its own row.

    The units that permute lanes take three cycles for each word, and are the bound here.
    """
    columns = words_ref[...]
    in_word = blocks.d_state // columns.shape[1]
    for n in range(blocks.d_state):
        group, sublane = divmod(n, SUBLANES)
        word, half = divmod(n, in_word)
        if half == 0:
            over_lanes = jnp.broadcast_to(columns[:, word : word + 1], (blocks.chunk, LANES))
        bits = over_lanes if in_word == 1 else over_lanes << 16 if half == 0 else over_lanes & -65536
        broadcast_ref.at[group][pl.ds(sublane, blocks.chunk, stride=STRIDE), :] = pltpu.bitcast(bits, jnp.float32)


def read_broadcast(broadcast_ref, t, blocks: Blocks) -> list[Array]:
    """Return the d_state values of step t, eight in sublanes per group."""
    return [broadcast_ref[g, pl.ds(t * STRIDE, SUBLANES), :] for g in range(blocks.state_groups)]


def read_step(step_ref, t, lane_group: int) -> Array:
    """Return the value of each channel at step t, broadcast to all sublanes by the load itself."""
    return jnp.broadcast_to(step_ref[lane_group, pl.ds(t, 1), :], (SUBLANES, LANES))


def sum_partials(partial_ref, lane_group: int, blocks: Blocks) -> Array:
    """Finish the sums over d_state for all steps of the chunk: [T 128]."""
    terms = [partial_ref.at[lane_group][pl.ds(s, blocks.chunk, stride=STRIDE), :] for s in range(SUBLANES)]
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def split_state(state_ref, tile, blocks: Blocks) -> list[list[Array]]:
    """Load a tile's state registers [lane group][state group] from [tiles N tile]."""
    return [
        [state_ref[tile, g * SUBLANES : (g + 1) * SUBLANES, lanes] for g in range(blocks.state_groups)]
        for _, lanes in lane_slices(blocks)
    ]


def join_state(state_ref, tile, state: list[list[Array]], blocks: Blocks) -> None:
    """Store a tile's state registers to [tiles N tile]."""
    for r, lanes in lane_slices(blocks):
        for g in range(blocks.state_groups):
            state_ref[tile, g * SUBLANES : (g + 1) * SUBLANES, lanes] = state[r][g]


def unrolled(blocks: Blocks, steps: int, step, carry, reverse: bool = False, begin=None):
    """Run step(t, carry) for all time steps of the chunk, up to `steps` of them (a power of two) per loop iteration.

    Iteration i starts with begin(i, carry), if given. It costs about 24 cycles on top of its steps, which take 13
    (forward) to 27 (backward) each.
    """
    steps = math.gcd(blocks.chunk, steps)

    def iteration(i, carry):
        if begin is not None:
            begin(i, carry)

        def one(k, carry):
            t = i * steps + k
            return step(blocks.chunk - 1 - t if reverse else t, carry)

        if blocks.interpreted:  # the interpreter compiles slowly, and its results are the same
            return jax.lax.fori_loop(0, steps, one, carry)
        for k in range(steps):
            carry = one(k, carry)
        return carry

    return jax.lax.fori_loop(0, blocks.chunk // steps, iteration, carry)


compiler_params = functools.partial(
    # Rows are independent, so the two cores of a megacore split them; chunks carry the state, tiles share B and C.
    pltpu.CompilerParams,
    dimension_semantics=("parallel", "arbitrary", "arbitrary"),
)
