"""Sizes, layouts and chunk products that the Mosaic GPU kernels of SSD share.

Every product is of bfloat16 tiles of 64 x 64 with float32 accumulation, one or more wgmma of a warpgroup. In shared
memory a row of a tile is 128 bytes, swizzled as wgmma and TMA require. States are stored as [N P], so that the products
with them need no transposed copy.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from biomamba_jax.ops import mosaic_gpu
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import largest_divisor

TILE = 64
CHUNK = TILE
MAX_STATES = 128
"""Two tiles of states: more would not fit into the registers of a warpgroup."""
MAX_HEADS_IN_BLOCK = 16
"""Heads of a block of the backward kernel, over which it sums the gradients of B and C."""

MATRIX = plgpu.Layout.WGMMA
COLUMN = MATRIX.reduce(1)  # one value per row
ROW = MATRIX.reduce(0)  # one value per column


class Sizes(NamedTuple):
    """Static sizes of one call."""

    batch: int
    """Rows of the batch."""
    chunks: int
    """Chunks of a row."""
    heads: int
    """Heads of a row."""
    groups: int
    """Groups of heads that share B and C."""
    d_state: int
    """A multiple of 64."""
    segmented: bool
    """True if there are segment ids."""

    @property
    def state_tiles(self) -> int:
        """Tiles of a head's states."""
        return self.d_state // TILE

    @property
    def heads_of_group(self) -> int:
        """Heads that share B and C."""
        return self.heads // self.groups

    @property
    def heads_of_block(self) -> int:
        """Heads of a block of the backward kernel."""
        return largest_divisor(self.heads_of_group, MAX_HEADS_IN_BLOCK)

    @property
    def blocks(self) -> int:
        """Blocks of heads; a block's heads share B and C."""
        return self.heads // self.heads_of_block


class Vectors(NamedTuple):
    """Per-token values of a head, or the index of each in arrays [... 4 l]."""

    s: Any = 0
    """Sum of log2(e) d A from the chunk's or segment's start up to each token."""
    g: Any = 1
    """s - log2 d: 2^(s_t - g_j) is the decay from token j to t, times d_j."""
    from_start: Any = 2
    """2^s, zero after a reset."""
    to_end: Any = 3
    """2^(s_last - g), zero before the last reset."""


VECTORS = Vectors()


class Sums(NamedTuple):
    """Indices, in arrays [... 4 l], of the backward kernel's per-token sums of a head."""

    ends: int = 0
    """All paths that end at each token."""
    begins: int = 1
    """All paths that begin at each token."""
    leave: int = 2
    """Paths that begin at each token and leave the chunk."""
    diagonal: int = 3
    """dy . x."""


SUMS = Sums()


def tile(rows: int, columns: int, dtype: Any = jnp.bfloat16, *, slots: int | None = None) -> Any:
    """Return shared memory for a matrix, tiled and swizzled as wgmma and TMA require."""
    shape = (rows, columns) if slots is None else (slots, rows, columns)
    elements = 128 // jnp.dtype(dtype).itemsize
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, elements)), plgpu.SwizzleTransform(128)))


def columns(i: int) -> Any:
    """Return the index of the columns of tile i."""
    return (slice(None), pl.ds(i * TILE, TILE))


def rows(i: int) -> Any:
    """Return the slice of the rows of tile i."""
    return pl.ds(i * TILE, TILE)


class Product(NamedTuple):
    """Operands of a @ b, [64 64]."""

    a: Any
    """Matrix in shared memory, or an array in registers."""
    b: Any
    """Matrix in shared memory."""
    transpose_a: bool = False
    """True to transpose a first."""
    transpose_b: bool = False
    """True to transpose b first."""


def product(a: Any, b: Any, *, transpose_b: bool = False) -> Array:
    """Compute one product."""
    return products(Product(a, b, transpose_b=transpose_b))[0]


def products(*operands: Product) -> list[Array]:
    """Compute several products, issued together: the warpgroup waits once for all."""
    if mosaic_gpu.interpreted():
        if len(operands) > 1:
            return [products(one)[0] for one in operands]
        a, b, transpose_a, transpose_b = operands[0]
        if isinstance(a, jax.Array) or transpose_a or transpose_b:  # its wgmma supports only two untransposed refs
            a, b = a[...].T if transpose_a else a[...], b[...].T if transpose_b else b[...]
            return [jnp.dot(a, b, preferred_element_type=jnp.float32)]

    def compute(*sums: Any) -> list[Array]:
        for total, (a, b, transpose_a, transpose_b) in zip(sums, operands, strict=True):
            a, b = a.transpose((1, 0)) if transpose_a else a, b.transpose((1, 0)) if transpose_b else b
            plgpu.wgmma(total, a, b)
        return [total[...] for total in sums]

    return pl.run_scoped(compute, *[plgpu.ACC((TILE, TILE), jnp.float32) for _ in operands])


def read_column(ref: Any) -> Array:
    """Read a value per row: [64] -> [64 64]."""
    return mosaic_gpu.broadcast(mosaic_gpu.read(ref, COLUMN), (TILE, TILE), (0,), MATRIX)


def read_row(ref: Any) -> Array:
    """Read a value per column: [64] -> [64 64]."""
    return mosaic_gpu.broadcast(mosaic_gpu.read(ref, ROW), (TILE, TILE), (1,), MATRIX)


def read(ref: Any) -> Array:
    """Read a tile in shared memory as float32."""
    return mosaic_gpu.to_layout(ref[...], MATRIX).astype(jnp.float32)


def keep(resets: Any | None, *, later_rows: bool) -> Array:
    """Return where token j reaches token t >= j of its segment; rows are t if `later_rows`, else j."""
    row, column = (mosaic_gpu.to_layout(lax.broadcasted_iota(jnp.int32, (TILE, TILE), axis), MATRIX) for axis in (0, 1))
    reached = row >= column if later_rows else row <= column
    if resets is not None:
        reached &= read_column(resets) == read_row(resets)
    return reached


def read_state(ref: Any, sizes: Sizes) -> list[Array]:
    """Read the tiles of a state [N P] in global memory."""
    return [mosaic_gpu.read(ref.at[rows(i)], MATRIX) for i in range(sizes.state_tiles)]


def write_state(ref: Any, state: list[Array]) -> None:
    """Write a state [N P] to global or shared memory, in its dtype."""
    for i, part in enumerate(state):
        ref[rows(i)] = part.astype(ref.dtype)


def advance(state: list[Array], across: Array, a: Any, weighted: Any) -> list[Array]:
    """Return across S + a^T v, the state before the next chunk; a [l N] and weighted v [l P] are in shared memory."""
    terms = products(*(Product(a.at[columns(i)], weighted, transpose_a=True) for i in range(len(state))))
    return [across * part + term for part, term in zip(state, terms, strict=True)]


def fetch(sources: Any, buffers: Any, index: Any, arrived: Any) -> None:
    """Start the copies of all sources to one slot of their buffers; each arrives at the slot's barrier."""
    for source, buffer in zip(sources, buffers, strict=True):
        if buffer is not None:
            plgpu.copy_gmem_to_smem(source, buffer.at[index], arrived.at[index])
