"""Sizes, layouts and vector-tile operations that the SSD kernels for TPU share.

A tile is 128 lanes wide, a head 64 channels: two heads, a *pair*, share a tile. In a block of heads, per-head values
are stored in rows [R l] or columns [l 128]: first the left head of each pair, then the right ones, each half padded to
R / 2, a multiple of 8. The log-decays are in base 2 (the hardware has exp2).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import round_up
from biomamba_jax.ops.numerics import softplus
from biomamba_jax.ops.ssd.pallas_common import HEADDIM, LARGEST_EXPONENT, LOWEST_EXPONENT, TINY

LANES = 128
CHUNK = 128
"""Tokens of a chunk. 256 is no faster in the forward pass on v5e and spills in the backward pass."""

MAX_HEADS_IN_BLOCK = 32
"""All heads of a block are unrolled (a loop over pairs takes 1.4 to 2 times as long); their states are in VMEM."""

MAX_OWN_HEADS_IN_BLOCK = 8
"""The same where each head has B and C of its own, which are in VMEM too."""

AS_ROWS = ((1,), (1,))  # a b^T
AS_COLUMNS = ((0,), (0,))  # a^T b

Ref = Any


class Sizes(NamedTuple):
    """Static sizes of one call."""

    batch: int
    """Rows of the batch."""
    chunks: int
    """Chunks of a row."""
    blocks: int
    """Blocks of heads in a row of the batch; a block's heads share B and C unless `own`."""
    groups: int
    """Groups of heads that share B and C."""
    pairs: int
    """Pairs of heads in a block."""
    d_state: int
    """A multiple of 128."""
    own: bool
    """True if each head has B and C of its own, and log-decays are given in place of step sizes."""

    @property
    def bc_width(self) -> int:
        """Columns of a block's B or C."""
        return self.d_state * (2 * self.pairs if self.own else 1)

    @property
    def half_rows(self) -> int:
        """R / 2, the rows of the left heads of a block."""
        return round_up(self.pairs, 8)

    @property
    def rows(self) -> int:
        """R."""
        return 2 * self.half_rows

    @property
    def width(self) -> int:
        """Channels of a block."""
        return self.pairs * LANES

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """(halves, rows of a half, blocks, chunks). The halves are independent: on a megacore each core takes one."""
        halves = 2 if self.batch % 2 == 0 else 1
        return halves, self.batch // halves, self.blocks, self.chunks

    def place(self, half: Any, row: Any, block: Any, chunk: Any) -> tuple[Any, Any, Any]:
        """Return (row, block, chunk) of a grid step."""
        return half * self.grid[1] + row, block, chunk

    def place_ahead(self, half: Any, row: Any, block: Any, chunk: Any) -> tuple[Any, Any, Any]:
        """Return (row, block, chunk) of the next grid step; after the last one, any valid one."""
        chunk, carry = _increment(chunk, self.chunks)
        block, carry = _increment(block, self.blocks, carry)
        return jnp.minimum(half * self.grid[1] + row + carry, self.batch - 1), block, chunk


def _increment(digit: Any, base: int, by: Any = 1) -> tuple[Any, Any]:
    """Return a digit plus 0 or 1, and the carry."""
    if base == 1:
        return digit, by
    overflow = digit + by == base
    return jnp.where(overflow, 0, digit + by), overflow.astype(jnp.int32)


def dot(a: Array, b: Array, contract: tuple[Sequence[int], Sequence[int]] = ((1,), (0,))) -> Array:
    """Multiply bfloat16 matrices, accumulating in float32."""
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


def iota(shape: tuple[int, ...], axis: int) -> Array:
    """Return the index along `axis` of each element."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _truncate(v: Array) -> Array:
    """Truncate float32 to the bits of a bfloat16 (bitwise: a round trip through bfloat16 could be optimized away)."""
    return pltpu.bitcast(pltpu.bitcast(v, jnp.int32) & jnp.int32(-65536), jnp.float32)


def exact_sum_over(v: Array, matrix: Array) -> Array:
    """Multiply v [R l] by a 0/1 matrix [l l], exact up to float32 addition: v is the sum of three bfloat16 values."""
    high = _truncate(v)
    middle = _truncate(v - high)
    pieces = jnp.concatenate([high, middle, v - high - middle], 0).astype(jnp.bfloat16)
    products = dot(pieces, matrix.astype(jnp.bfloat16))
    n = v.shape[0]
    return products[:n] + products[n : 2 * n] + products[2 * n :]


def to_columns(rows: Array) -> Array:
    """Transpose [R l] -> [l 128]."""
    return jnp.concatenate([rows, jnp.zeros((LANES - rows.shape[0], rows.shape[1]), rows.dtype)], 0).T


def to_column(row: Array) -> Array:
    """Transpose [1 l] -> [l 1]."""
    return to_columns(jnp.broadcast_to(row, (8, row.shape[1])))[:, :1]


def broadcast_pair(columns: Array, pair: int, half_rows: int) -> Array:
    """Broadcast the two columns of a pair over the 64 lanes of their heads: [l 128] -> [l 128]."""
    return jnp.take_along_axis(columns, pair + (iota(columns.shape, 1) >> 6) * half_rows, axis=1)


def broadcast_pair_row(row: Array, pair: int, half_rows: int) -> Array:
    """Apply `broadcast_pair` to a single row: [1 128] -> [1 128]."""
    return broadcast_pair(jnp.broadcast_to(row, (8, LANES)), pair, half_rows)[:1]


def pair_rows(rows: Array, half_rows: int, tokens: slice) -> Array:
    """Concatenate 64 tokens of both heads of each pair along the lanes, left head first: [R l] -> [R/2 128]."""
    return jnp.concatenate([rows[:half_rows, tokens], rows[half_rows:, tokens]], 1)


def block_diagonal(v: Array) -> Array:
    """Return the block-diagonal [128 128] of bfloat16 [64 128], left head first; masks two packed values at a time."""
    words = pltpu.bitcast(v, jnp.int32)
    left = iota(words.shape, 1) < HEADDIM
    halves = [pltpu.bitcast(jnp.where(where, words, 0), jnp.bfloat16) for where in (left, ~left)]
    return jnp.concatenate(halves, 0)


def own_columns(v: Ref, pair: int, d_state: int) -> Array:
    """Return a pair's columns [l 2N] of a block's B or C."""
    return v[:, 2 * d_state * pair : 2 * d_state * (pair + 1)]


def for_both_heads(v: Array, own: bool) -> Array:
    """Repeat the rows of v, a factor of both heads of a pair; of their own, [r 2N], return [[left 0] [0 right]]."""
    if not own:
        return jnp.concatenate([v, v], 0)
    n = v.shape[1] // 2
    zeros = jnp.zeros((v.shape[0], n), v.dtype)
    left, right = jnp.concatenate([v[:, :n], zeros], 1), jnp.concatenate([zeros, v[:, n:]], 1)
    return jnp.concatenate([left, right], 0)


def stack_heads(v: Array) -> Array:
    """Put the right head's rows below the left head's: [l 2N] -> [2l N]."""
    n = v.shape[1] // 2
    return jnp.concatenate([v[:, :n], v[:, n:]], 0)


def side_by_side(v: Array) -> Array:
    """Undo `stack_heads`."""
    n = v.shape[0] // 2
    return jnp.concatenate([v[:n], v[n:]], 1)


def halves(chunk: int) -> list[slice]:
    """Split the chunk into slices of 64 tokens: those of two heads fill the contraction of one product."""
    return [slice(k, k + HEADDIM) for k in range(0, chunk, HEADDIM)]


def plus(a: Array | None, b: Array) -> Array:
    """Return the running sum a, initially None, plus b."""
    return b if a is None else a + b


def masked(v: Array, keep: Array) -> Array:
    """Mask bfloat16 v by a product: a select of bfloat16 needs another mask layout."""
    return (v.astype(jnp.float32) * keep.astype(jnp.float32)).astype(jnp.bfloat16)


def segments(resets: Ref | None) -> tuple[Any, Any]:
    """Return the resets up to each token as a row [1 l] and as a column [l 1]; None without segments."""
    return (None, None) if resets is None else (resets[...], to_column(resets[...]))


def keep(piece: slice, resets: Any, segment: Any) -> Array:
    """Return where token j of `piece` (lanes, repeated) reaches token t >= piece.start (rows)."""
    shape = (CHUNK - piece.start, LANES)
    reached = iota(shape, 0) >= (iota(shape, 1) & (HEADDIM - 1))
    if resets is not None:
        reached &= segment[piece.start :] == jnp.concatenate([resets[:, piece]] * 2, 1)
    return reached


def scores(B: Array, C: Array, own: bool, resets: Any, segment: Any) -> Array:
    """Return C B^T, masked: for each 64 columns, repeated or of each head, the rows from there on."""
    found = []
    for piece in halves(CHUNK):
        product = dot(C[piece.start :], for_both_heads(B[piece], own), AS_ROWS)
        found.append(jnp.where(keep(piece, resets, segment), product, 0.0))
    return jnp.concatenate(found, 0)


class SharedInputs(NamedTuple):
    """Per-head values and what all heads of a block share: arrays, block specs or refs."""

    dt: Any
    """[B blocks R L], raw; log-decays in base 2 without `A_and_bias`."""
    B: Any
    """[B L G*N]; None ahead of time where heads have their own."""
    C: Any
    """[B L G*N], likewise."""
    resets: Any | None
    """[B chunks 1 l] float32, resets in this chunk up to each token; None without segments."""
    A_and_bias: Any | None
    """[blocks R 2], log2(e) A and dt_bias; None where log-decays are given."""


def block_spec(place: Callable[..., tuple[Any, Any, Any]]) -> Callable[..., pl.BlockSpec]:
    """Return a constructor of specs (block shape, index map of (row, block, chunk)); `place` maps the grid indices."""
    return lambda shape, index: pl.BlockSpec(shape, lambda *grid: index(*place(*grid)))


def vmem(rows: int, columns: int = LANES, dtype: Any = jnp.float32) -> Any:
    """Return a scratch buffer."""
    return pltpu.VMEM((rows, columns), dtype)


def shared_specs(sizes: Sizes, like: SharedInputs, place: Callable[..., tuple[Any, Any, Any]]) -> SharedInputs:
    """Return the block specs, where `place` maps grid indices to (row, block, chunk)."""
    blocks_of_group = max(sizes.blocks // sizes.groups, 1)  # a block has several groups where heads have their own
    spec = block_spec(place)

    def of_group(row: Any, block: Any, chunk: Any) -> tuple[Any, Any, Any]:
        return row, chunk, 0 if sizes.groups == 1 else jax.lax.div(block, jnp.int32(blocks_of_group))

    return SharedInputs(
        dt=spec((None, None, sizes.rows, CHUNK), lambda row, block, chunk: (row, block, 0, chunk)),
        B=None if like.B is None else spec((None, CHUNK, sizes.bc_width), of_group),
        C=None if like.C is None else spec((None, CHUNK, sizes.bc_width), of_group),
        resets=None
        if like.resets is None
        else spec((None, None, 1, CHUNK), lambda row, block, chunk: (row, chunk, 0, 0)),
        A_and_bias=None
        if like.A_and_bias is None
        else spec((None, sizes.rows, 2), lambda row, block, chunk: (block, 0, 0)),
    )


def store(refs: Any, values: Any) -> None:
    """Store a record of values, or of such records, to the refs of its fields; a field that is None is left out."""
    for ref, value in zip(refs, values, strict=True):
        if isinstance(value, tuple):
            store(ref, value)
        elif ref is not None:
            ref[...] = value


class Decays(NamedTuple):
    """Step sizes and decays of one chunk, as rows [R l]."""

    dt: Array | None
    """After the softplus; None where log-decays are given."""
    slope: Array | None
    """Derivative of the softplus, likewise."""
    s: Array
    """Sum of the exponents from the chunk's or segment's start up to each step."""
    g: Array
    """s - log2 dt, or s: exp2(s_t - g_j) is the decay from step j to t, times dt_j or 1."""
    to_end: Array
    """exp2(s_last - g), finite also in segments before the last."""


def decays(inputs: SharedInputs, segment: Array | None) -> Decays:
    """Compute the decays; `segment` is the resets up to each token as a column [l 1]."""
    raw, dt, slope = inputs.dt[...], None, None
    exponent = raw
    if inputs.A_and_bias is not None:
        raw += inputs.A_and_bias[:, 1:]
        dt = softplus(raw)
        exponent = dt * inputs.A_and_bias[:, :1]
    up_to = iota((CHUNK, CHUNK), 0) <= iota((CHUNK, CHUNK), 1)
    if inputs.resets is not None:
        # The sum restarts with the segment: not even its rounding depends on the previous segment.
        up_to &= segment == inputs.resets[...]
    s = exact_sum_over(jnp.maximum(exponent, LOWEST_EXPONENT), up_to.astype(jnp.float32))
    g = s if dt is None else s - jnp.log2(jnp.maximum(dt, TINY))
    to_end = jnp.exp2(jnp.minimum(s[:, CHUNK - 1 :] - g, LARGEST_EXPONENT))
    if dt is not None:
        # softplus' = sigmoid(raw) = exp(raw - softplus(raw)): 1 - exp(-dt) has no digits left where dt is below 1e-7.
        slope = jnp.exp(raw - dt)
    return Decays(dt, slope, s, g, to_end)
