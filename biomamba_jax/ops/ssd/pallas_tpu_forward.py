"""Forward kernel of SSD on TPU: chunk after chunk, all heads of a block at once.

With s_t the sum of log2(e) d A up to token t of the chunk and g_t = s_t - log2 d_t, for each head:

    y_t = sum_{j<=t} (C_t . B_j) 2^(s_t - g_j) x_j  +  2^(s_t) C_t . S  +  D x_t
    S' = 2^(s_last) S + sum_j 2^(s_last - g_j) B_j x_j^T

* d is folded into the exponent, so x enters the products unscaled.
* C B^T is masked once per chunk (causal, same segment) and shared by all heads. A reset costs nothing per head: it also
  masks C for the carried-in state, B for the carried-out state, and the decay across the chunk.
* Two heads share one product, [M_1 | M_2] (64 columns of each) times blockdiag(x_1, x_2): the matrix unit is full.
* What the heads share is a long dependency chain of small steps, which would take a quarter of the time by itself. It
  is computed one chunk ahead, in stages interleaved with the pairs of heads, because the scheduler stays close to
  program order.
* Heads with B and C of their own share only the decays' chain. Their products are the same with the two heads' B and C
  side by side, [C_1 | C_2], and the other factor block-diagonal.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import out_struct
from biomamba_jax.ops.ssd import pallas_tpu_tiles as tiles
from biomamba_jax.ops.ssd.pallas_common import HEADDIM, LARGEST_EXPONENT
from biomamba_jax.ops.ssd.pallas_tpu_tiles import CHUNK, LANES, Ref, SharedInputs, Sizes

_STAGES = 5
"""Pairs at the end of a chunk that the stages of the next chunk's shared values are interleaved with: tuned on v5e."""


class _Inputs(NamedTuple):
    x: Any  # [B L H*P]
    here: SharedInputs
    ahead: SharedInputs  # of the next grid step
    D: Any  # [blocks 1 128]
    initial_state: Any  # [B N H*P] or None


class _Outputs(NamedTuple):
    y: Any  # [B L H*P]
    final_state: Any  # [B N H*P], float32
    states: Any | None  # [B chunks N H*P], bfloat16, before each chunk


class _Shared(NamedTuple):
    """Values of one chunk that the heads of a block share."""

    s: Any  # [l 128], columns
    to_end: Any  # [l 128], columns of 2^(s_last - g)
    across: Any  # [8 128], columns of 2^(s_last), zero after a reset
    rows: Any  # for each 64 tokens, g as rows of pairs
    products: Any  # _Products of all heads; None where each has its own


class _Products(NamedTuple):
    """B and C, and their products, of one chunk: of all heads, or of a pair with its own, [l 2N] in place of [l N]."""

    C: Any  # [l N], zero after a reset
    B_transposed: Any  # [N l], or the heads side by side, [N 2l]; zero before the last reset
    scores: Any  # C B^T, masked: for each 64 columns, repeated or of each head, the rows from there on


def _prepare(sizes: Sizes, inputs: SharedInputs) -> Iterator[Any]:
    """Compute what the heads share, in stages; the last one yields it."""
    resets, segment = tiles.segments(inputs.resets)
    decays = tiles.decays(inputs, segment)
    yield None
    s = tiles.to_columns(decays.s)
    yield None
    to_end = tiles.to_columns(decays.to_end)
    across = jnp.exp2(s[CHUNK - 1 :])
    if segment is not None:
        across = jnp.where(segment[CHUNK - 1 :] == 0, across, 0.0)
    across = jnp.broadcast_to(across, (8, LANES))
    rows = [tiles.pair_rows(decays.g, sizes.half_rows, piece) for piece in tiles.halves(CHUNK)]
    products = None
    if not sizes.own:
        for stage in _products(sizes, inputs.B[...], inputs.C[...], resets, segment):
            products = stage
            yield None
    yield _Shared(s, to_end, across, jnp.concatenate(rows, 0), products)


def _products(sizes: Sizes, B: Array, C: Array, resets: Any, segment: Any) -> Iterator[Any]:
    """Compute what depends on B and C, of all heads or of a pair with its own, in stages; the last one yields it."""
    C_in = C if segment is None else tiles.masked(C, segment == 0)
    yield None
    scores = tiles.scores(B, C, sizes.own, resets, segment)
    yield None
    B_transposed = (tiles.stack_heads(B) if sizes.own else B).T  # masked after the transpose, see the backward kernel
    if segment is not None:
        last = resets == resets[:, CHUNK - 1 :]
        B_transposed = tiles.masked(B_transposed, jnp.concatenate([last] * (2 if sizes.own else 1), 1))
    yield _Products(C_in, B_transposed, scores)


def _kernel(sizes: Sizes, inputs: _Inputs, outputs: _Outputs, state: Ref, shared: _Shared) -> None:
    half_rows = sizes.half_rows
    _, row, block, chunk = (pl.program_id(axis) for axis in range(4))

    @pl.when(chunk == 0)
    def start_stream() -> None:
        initial = inputs.initial_state
        state[...] = jnp.zeros_like(state) if initial is None else initial[...]

    @pl.when((row == 0) & (block == 0) & (chunk == 0))
    def start_half() -> None:
        *_, values = _prepare(sizes, inputs.here)
        tiles.store(shared, values)

    if outputs.states is not None:
        outputs.states[...] = state[...].astype(jnp.bfloat16)
    stages, values = _prepare(sizes, inputs.ahead), None
    columns, to_end, across = (ref[...] for ref in shared[:3])
    products = shared.products
    resets, segment = tiles.segments(inputs.here.resets if sizes.own else None)
    if not sizes.own:
        C, B_transposed = products.C[...], products.B_transposed[...]
    pieces = tiles.halves(CHUNK)
    for pair in range(sizes.pairs):
        if pair >= sizes.pairs - _STAGES:
            values = next(stages, values)
        lanes = slice(pair * LANES, (pair + 1) * LANES)
        x = inputs.x[:, lanes]
        s = tiles.broadcast_pair(columns, pair, half_rows)
        before = state[:, lanes]
        y: list[Any] = [None] * len(pieces)
        start = 0
        state_factor = before.astype(jnp.bfloat16)
        if sizes.own:
            B, C = (tiles.own_columns(v, pair, sizes.d_state) for v in (inputs.here.B, inputs.here.C))
            *_, products = _products(sizes, B, C, resets, segment)
            C, B_transposed, state_factor = products.C, products.B_transposed, tiles.block_diagonal(state_factor)
        from_state = tiles.dot(C, state_factor) * jnp.exp2(s)
        for k, piece in enumerate(pieces):
            rows = CHUNK - piece.start
            i = k * half_rows + pair
            exponent = s[piece.start :] - shared.rows[i : i + 1]
            decay = jnp.exp2(jnp.minimum(exponent, LARGEST_EXPONENT))
            mixing = (products.scores[start : start + rows] * decay).astype(jnp.bfloat16)
            start += rows
            product = tiles.dot(mixing, tiles.block_diagonal(x[piece].astype(jnp.bfloat16)))
            for n in range(k, len(pieces)):
                y[n] = tiles.plus(y[n], product[(n - k) * HEADDIM : (n - k + 1) * HEADDIM])
        x = x.astype(jnp.float32)
        skip = tiles.broadcast_pair_row(inputs.D[...], pair, half_rows)
        outputs.y[:, lanes] = (from_state + jnp.concatenate(y, 0) + skip * x).astype(outputs.y.dtype)
        weighted = (x * tiles.broadcast_pair(to_end, pair, half_rows)).astype(jnp.bfloat16)
        weighted = tiles.block_diagonal(weighted) if sizes.own else weighted
        decay = tiles.broadcast_pair_row(across[:1], pair, half_rows)
        state[:, lanes] = before * decay + tiles.dot(B_transposed, weighted)
    *_, values = values, *stages
    tiles.store(shared, values)

    @pl.when(chunk == sizes.chunks - 1)
    def end_stream() -> None:
        outputs.final_state[...] = state[...]


def forward(
    sizes: Sizes,
    x: Array,
    shared: SharedInputs,
    D: Array,
    initial_state: Array | None,
    *,
    save_states: bool,
    interpret: Any,
) -> _Outputs:
    """Run the kernel; arrays as in `_Inputs` and `_Outputs`."""
    n, width = sizes.d_state, sizes.width
    channels = sizes.blocks * width

    spec = tiles.block_spec(sizes.place)
    tokens = spec((None, CHUNK, width), lambda row, block, chunk: (row, chunk, block))
    one_state = spec((None, n, width), lambda row, block, chunk: (row, 0, block))
    each_state = spec((None, None, n, width), lambda row, block, chunk: (row, chunk, 0, block))
    ahead = shared._replace(B=None, C=None) if sizes.own else shared
    inputs = _Inputs(x=x, here=shared, ahead=ahead, D=D, initial_state=initial_state)
    in_specs = _Inputs(
        x=tokens,
        here=tiles.shared_specs(sizes, shared, sizes.place),
        ahead=tiles.shared_specs(sizes, ahead, sizes.place_ahead),
        D=spec((None, 1, LANES), lambda row, block, chunk: (block, 0, 0)),
        initial_state=None if initial_state is None else one_state,
    )
    states_shape = (sizes.batch, sizes.chunks, n, channels)
    outputs = _Outputs(
        y=out_struct(x.shape, x.dtype, x),
        final_state=out_struct((sizes.batch, n, channels), jnp.float32, x),
        states=out_struct(states_shape, jnp.bfloat16, x) if save_states else None,
    )
    out_specs = _Outputs(y=tokens, final_state=one_state, states=each_state if save_states else None)
    pieces = len(tiles.halves(CHUNK))
    scores = sum(CHUNK - piece.start for piece in tiles.halves(CHUNK))

    products = _Products(
        C=tiles.vmem(CHUNK, n, jnp.bfloat16),
        B_transposed=tiles.vmem(n, CHUNK, jnp.bfloat16),
        scores=tiles.vmem(scores),
    )
    scratch = _Shared(
        s=tiles.vmem(CHUNK),
        to_end=tiles.vmem(CHUNK),
        across=tiles.vmem(8),
        rows=tiles.vmem(pieces * sizes.half_rows),
        products=None if sizes.own else products,
    )

    def kernel(inputs: _Inputs, *refs: Any) -> None:
        *outputs, state, shared = refs
        _kernel(sizes, inputs, _Outputs(*outputs), state, shared)

    return pl.pallas_call(
        kernel,
        grid=sizes.grid,
        in_specs=[in_specs],
        out_specs=out_specs,
        out_shape=outputs,
        scratch_shapes=[tiles.vmem(n, width), scratch],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="ssd_forward",
    )(inputs)
