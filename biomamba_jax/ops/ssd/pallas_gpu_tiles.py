"""What the Mosaic GPU kernels of SSD share: sizes, layouts and the products of a chunk.

Every product is of bfloat16 tiles of 64 x 64 with float32 sums, one or more wgmma of a warpgroup. In shared memory a
row of a tile is 128 bytes, swizzled as wgmma and the copy engine want it. States are kept as [N P], so that the
products with them need no transposed copy.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from biomamba_jax.ops import mosaic_gpu
from biomamba_jax.ops.array_typing import Array

TILE = 64
CHUNK = TILE
HEADDIM = TILE
MOST_STATES = 128
"""Two tiles of states: more would not fit into the registers of a warpgroup."""
MAX_HEADS_IN_BLOCK = 16
"""Of the backward kernel, whose blocks sum the gradients of B and C over their heads."""

LOWEST_EXPONENT = -127.0
"""A step that decays to less than the smallest normal float counts as this one: zero, but a sum of exponents with it
keeps the small steps beside it."""
LARGEST_EXPONENT = 60.0
"""Entries that the mask makes zero are cut to this exponent, so that they are finite when the mask multiplies them."""
TINY = 2.0**-126

MATRIX = plgpu.Layout.WGMMA
COLUMN = MATRIX.reduce(1)  # a value of each row
ROW = MATRIX.reduce(0)  # a value of each column


class Sizes(NamedTuple):
    """Static sizes of one call."""

    batch: int
    chunks: int
    heads: int
    groups: int
    d_state: int
    """A multiple of 64."""
    segmented: bool

    @property
    def state_tiles(self) -> int:
        return self.d_state // TILE

    @property
    def heads_of_group(self) -> int:
        return self.heads // self.groups

    @property
    def heads_of_block(self) -> int:
        return max(n for n in range(1, MAX_HEADS_IN_BLOCK + 1) if self.heads_of_group % n == 0)

    @property
    def blocks(self) -> int:
        """Blocks of heads; a block's heads share B and C."""
        return self.heads // self.heads_of_block


class Vectors(NamedTuple):
    """Values of a head's tokens, each by its index in arrays [.. 4 l]."""

    s: Any = 0  # the sum of log2(e) d A from the chunk's or segment's start up to each token
    g: Any = 1  # s - log2 d: 2^(s_t - g_j) is the decay from token j to t, times d_j
    from_start: Any = 2  # 2^s, zero after a reset
    to_end: Any = 3  # 2^(s_last - g), zero before the last reset


VECTORS = Vectors()


class Sums(NamedTuple):
    """What the backward kernel says of a head's tokens, each by its index in arrays [.. 4 l]."""

    ends: int = 0  # all paths that end at each token
    begins: int = 1  # all paths that begin at each token
    leave: int = 2  # those of them that leave the chunk
    diagonal: int = 3  # dy . x


SUMS = Sums()


def tile(rows: int, columns: int, dtype: Any = jnp.bfloat16, *, slots: int | None = None) -> Any:
    """Shared memory for a matrix, as wgmma and the copy engine want it."""
    shape = (rows, columns) if slots is None else (slots, rows, columns)
    elements = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(128)))


def columns(i: int) -> Any:
    """Columns of tile i."""
    return (slice(None), pl.ds(i * TILE, TILE))


def rows(i: int) -> Any:
    """Rows of tile i."""
    return pl.ds(i * TILE, TILE)


class Product(NamedTuple):
    """a @ b, [64 64], of matrices in shared memory, transposed first where said; a may be an array in registers."""

    a: Any
    b: Any
    transpose_a: bool = False
    transpose_b: bool = False


def product(a: Any, b: Any, *, transpose_a: bool = False, transpose_b: bool = False) -> Array:
    return products(Product(a, b, transpose_a, transpose_b))[0]


def products(*wanted: Product) -> list[Array]:
    """Products that the tensor cores are given at once: a warpgroup waits for all together."""
    if mosaic_gpu.interpreted():
        if len(wanted) > 1:
            return [products(one)[0] for one in wanted]
        a, b, transpose_a, transpose_b = wanted[0]
        if isinstance(a, jax.Array) or transpose_a or transpose_b:  # its wgmma knows two plain references only
            a, b = a[...].T if transpose_a else a[...], b[...].T if transpose_b else b[...]
            return [jnp.dot(a, b, preferred_element_type=jnp.float32)]

    def compute(*sums: Any) -> list[Array]:
        for total, (a, b, transpose_a, transpose_b) in zip(sums, wanted, strict=True):
            a, b = a.transpose((1, 0)) if transpose_a else a, b.transpose((1, 0)) if transpose_b else b
            plgpu.wgmma(total, a, b)
        return [total[...] for total in sums]

    return pl.run_scoped(compute, *[plgpu.ACC((TILE, TILE), jnp.float32) for _ in wanted])


def over_columns(v: Array) -> Array:
    """A value of each row, [64] -> [64 64]."""
    return mosaic_gpu.broadcast(v, (TILE, TILE), (0,), MATRIX)


def over_rows(v: Array) -> Array:
    """A value of each column, [64] -> [64 64]."""
    return mosaic_gpu.broadcast(v, (TILE, TILE), (1,), MATRIX)


def read_column(ref: Any) -> Array:
    """[64] -> [64 64], a value of each row."""
    return over_columns(mosaic_gpu.read(ref, COLUMN))


def read_row(ref: Any) -> Array:
    """[64] -> [64 64], a value of each column."""
    return over_rows(mosaic_gpu.read(ref, ROW))


def read(ref: Any) -> Array:
    """A tile in shared memory, in float32."""
    return mosaic_gpu.lay(ref[...], MATRIX).astype(jnp.float32)


def keep(resets: Any | None, *, later_rows: bool) -> Array:
    """Where token j reaches token t >= j of its own segment; rows are t where `later_rows`, else j."""
    row, column = (mosaic_gpu.lay(lax.broadcasted_iota(jnp.int32, (TILE, TILE), axis), MATRIX) for axis in (0, 1))
    reached = row >= column if later_rows else row <= column
    if resets is not None:
        reached &= read_column(resets) == read_row(resets)
    return reached


def read_state(ref: Any, sizes: Sizes) -> list[Array]:
    """Tiles of a state [N P] in global memory."""
    return [mosaic_gpu.read(ref.at[rows(i)], MATRIX) for i in range(sizes.state_tiles)]


def write_state(ref: Any, state: list[Array]) -> None:
    """A state [N P] to global or shared memory, in its dtype."""
    for i, part in enumerate(state):
        ref[rows(i)] = part.astype(ref.dtype)


def advance(state: list[Array], across: Array, a: Any, weighted: Any) -> list[Array]:
    """across S + a^T v: the state before the next chunk, of a [l N] and the weighted v [l P] in shared memory."""
    terms = products(*(Product(a.at[columns(i)], weighted, transpose_a=True) for i in range(len(state))))
    return [across * part + term for part, term in zip(state, terms, strict=True)]
