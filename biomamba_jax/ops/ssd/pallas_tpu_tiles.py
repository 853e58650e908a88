"""What the forward and the backward SSD kernel for TPU share: sizes, layouts and small operations on vector tiles.

A tile is 128 lanes wide, a head 64 channels: two heads, a *pair*, lie side by side in a tile. In a block of heads,
values of single heads are kept in rows [R l] or columns [l 128]: first the left head of each pair, then the right ones,
each half padded to R / 2, a multiple of 8. The log-decays are in base 2 (exp2 is what the hardware has).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from biomamba_jax.ops.array_typing import Array

LANES = 128
HEADDIM = 64
CHUNK = 128
"""Tokens of a chunk. 256 gains nothing in the forward pass on v5e and spills in the backward pass."""

LOG2_E = 1.4426950408889634
LOWEST_EXPONENT = -127.0
"""A step that decays to less than the smallest normal float counts as this one: zero, but a sum of exponents with it
keeps the small steps beside it."""
LARGEST_EXPONENT = 60.0
"""Entries that the mask makes zero are cut to this exponent, so that they are finite when the mask multiplies them."""
TINY = 2.0**-126
MAX_HEADS_IN_BLOCK = 32
"""All heads of a block are unrolled (a loop over pairs costs 1.4 to 2 times as much); their states are in VMEM."""

AS_ROWS = ((1,), (1,))  # a product with the transpose of the second factor
AS_COLUMNS = ((0,), (0,))  # a product with the transpose of the first factor

Ref = Any


class Sizes(NamedTuple):
    """Static sizes of one call."""

    batch: int
    chunks: int
    blocks: int
    """Blocks of heads in a row of the batch; a block's heads share B and C."""
    groups: int
    pairs: int
    """Pairs of heads in a block."""
    d_state: int
    """A multiple of 128."""

    @property
    def half_rows(self) -> int:
        return -(-self.pairs // 8) * 8

    @property
    def rows(self) -> int:
        return 2 * self.half_rows

    @property
    def width(self) -> int:
        """Channels of a block."""
        return self.pairs * LANES

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """(halves, rows of a half, blocks, chunks). The halves are independent: where two cores share one kernel, each
        takes one."""
        halves = 2 if self.batch % 2 == 0 else 1
        return halves, self.batch // halves, self.blocks, self.chunks

    def place(self, half: Any, row: Any, block: Any, chunk: Any) -> tuple[Any, Any, Any]:
        """(row, block, chunk) of a step of the grid."""
        return half * self.grid[1] + row, block, chunk

    def place_ahead(self, half: Any, row: Any, block: Any, chunk: Any) -> tuple[Any, Any, Any]:
        """(row, block, chunk) of the step after the given one; after the last one, any that exists."""
        chunk, carry = _increment(chunk, self.chunks)
        block, carry = _increment(block, self.blocks, carry)
        return jnp.minimum(half * self.grid[1] + row + carry, self.batch - 1), block, chunk


def _increment(digit: Any, base: int, by: Any = 1) -> tuple[Any, Any]:
    """A digit plus 0 or 1, and the carry."""
    if base == 1:
        return digit, by
    overflow = digit + by == base
    return jnp.where(overflow, 0, digit + by), overflow.astype(jnp.int32)


def softplus(v: Array) -> Array:
    return jnp.maximum(v, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(v)))


def dot(a: Array, b: Array, contract: tuple[Sequence[int], Sequence[int]] = ((1,), (0,))) -> Array:
    """A product of bfloat16 matrices, accumulated in float32."""
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def iota(shape: tuple[int, ...], axis: int) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _truncate(v: Array) -> Array:
    """float32 cut to the bits of a bfloat16 (as bits: a round trip through bfloat16 could be optimised away)."""
    return pltpu.bitcast(pltpu.bitcast(v, jnp.int32) & jnp.int32(-65536), jnp.float32)


def exact_sum_over(v: Array, matrix: Array) -> Array:
    """v [R l] times a 0/1 matrix [l l], exact but for float32 addition: v is the sum of three bfloat16 pieces."""
    high = _truncate(v)
    middle = _truncate(v - high)
    pieces = jnp.concatenate([high, middle, v - high - middle], 0).astype(jnp.bfloat16)
    products = dot(pieces, matrix.astype(jnp.bfloat16))
    n = v.shape[0]
    return products[:n] + products[n : 2 * n] + products[2 * n :]


def to_columns(rows: Array) -> Array:
    """[R l] -> [l 128]."""
    return jnp.concatenate([rows, jnp.zeros((LANES - rows.shape[0], rows.shape[1]), rows.dtype)], 0).T


def to_column(row: Array) -> Array:
    """[1 l] -> [l 1]."""
    return to_columns(jnp.broadcast_to(row, (8, row.shape[1])))[:, :1]


def spread(columns: Array, pair: int, half_rows: int) -> Array:
    """The two columns of a pair, each over the 64 lanes of its head: [l 128] -> [l 128]."""
    return jnp.take_along_axis(columns, pair + (iota(columns.shape, 1) >> 6) * half_rows, axis=1)


def spread_row(row: Array, pair: int, half_rows: int) -> Array:
    """`spread` of a single row: [1 128] -> [1 128]."""
    return spread(jnp.broadcast_to(row, (8, LANES)), pair, half_rows)[:1]


def pair_rows(rows: Array, half_rows: int, tokens: slice) -> Array:
    """64 tokens of per-head rows as one row a pair, left head in the left half of the lanes: [R l] -> [R/2 128]."""
    return jnp.concatenate([rows[:half_rows, tokens], rows[half_rows:, tokens]], 1)


def block_diagonal(v: Array) -> Array:
    """bfloat16 [64 128] -> [128 128]: left head above, right head below, zero elsewhere; two values at a time."""
    words = pltpu.bitcast(v, jnp.int32)
    left = iota(words.shape, 1) < HEADDIM
    halves = [pltpu.bitcast(jnp.where(where, words, 0), jnp.bfloat16) for where in (left, ~left)]
    return jnp.concatenate(halves, 0)


def twice(v: Array) -> Array:
    """The rows of v, and again: what both heads of a pair are multiplied with."""
    return jnp.concatenate([v, v], 0)


def halves(chunk: int) -> list[slice]:
    """The chunk in pieces of 64 tokens: two heads' pieces fill the contraction of one product."""
    return [slice(k, k + HEADDIM) for k in range(0, chunk, HEADDIM)]


def plus(a: Array | None, b: Array) -> Array:
    """The running sum a, None at first, with b added."""
    return b if a is None else a + b


def masked(v: Array, keep: Array) -> Array:
    """bfloat16 v where `keep` holds and zero elsewhere, by a product: selects of bfloat16 need another mask layout."""
    return (v.astype(jnp.float32) * keep.astype(jnp.float32)).astype(jnp.bfloat16)


class SharedInputs(NamedTuple):
    """Arrays, blocks of them or refs: what all heads of a block share, and values of single heads."""

    dt: Any  # [B blocks R L], raw
    B: Any  # [B L G*N]
    C: Any
    resets: Any  # [B chunks 1 l], resets in this chunk up to each token, as float32; None where no state resets
    A_and_bias: Any  # [blocks R 2], log2(e) A and dt_bias


def shared_specs(sizes: Sizes, like: SharedInputs, place: Callable[..., tuple[Any, Any, Any]]) -> SharedInputs:
    """Block specs for the step at `place`(grid indices) = (row, block, chunk)."""
    blocks_of_group = sizes.blocks // sizes.groups

    def spec(shape: tuple[int | None, ...], index: Callable[[Any, Any, Any], tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *grid: index(*place(*grid)))

    def of_group(row: Any, block: Any, chunk: Any) -> tuple[Any, Any, Any]:
        return row, chunk, 0 if sizes.groups == 1 else jax.lax.div(block, jnp.int32(blocks_of_group))

    return SharedInputs(
        dt=spec((None, None, sizes.rows, CHUNK), lambda row, block, chunk: (row, block, 0, chunk)),
        B=spec((None, CHUNK, sizes.d_state), of_group),
        C=spec((None, CHUNK, sizes.d_state), of_group),
        resets=None
        if like.resets is None
        else spec((None, None, 1, CHUNK), lambda row, block, chunk: (row, chunk, 0, 0)),
        A_and_bias=spec((None, sizes.rows, 2), lambda row, block, chunk: (block, 0, 0)),
    )


class Decays(NamedTuple):
    """Rows [R l] of one chunk."""

    dt: Array  # after the softplus
    s: Array  # the exponents' sum from the chunk's or segment's start up to each step
    g: Array  # s - log2 dt: exp2(s_t - g_j) is the decay from step j to t, times dt_j
    to_end: Array  # exp2(s_last - g), finite also in segments before the last


def decays(inputs: SharedInputs, segment: Array | None) -> Decays:
    """`segment`: the resets up to each token as a column [l 1]."""
    dt = softplus(inputs.dt[...] + inputs.A_and_bias[:, 1:])
    exponent = jnp.maximum(dt * inputs.A_and_bias[:, :1], LOWEST_EXPONENT)
    up_to = iota((CHUNK, CHUNK), 0) <= iota((CHUNK, CHUNK), 1)
    if inputs.resets is not None:
        # The sum starts anew with the segment: not even its rounding depends on the segment before.
        up_to &= segment == inputs.resets[...]
    s = exact_sum_over(exponent, up_to.astype(jnp.float32))
    g = s - jnp.log2(jnp.maximum(dt, TINY))
    to_end = jnp.exp2(jnp.minimum(s[:, CHUNK - 1 :] - g, LARGEST_EXPONENT))
    return Decays(dt, s, g, to_end)


def result(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """An output of a kernel: inside `shard_map` it varies over the same mesh axes as the input `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)
