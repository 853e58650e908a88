"""Backward kernel of SSD on TPU: visits the chunks from the last to the first.

It reads the state before each chunk and recomputes everything else. In the notation of the forward pass, with
E_tj = 2^(s_t - g_j), M = E o C B^T where t >= j in one segment, and w_j = 2^(s_last - g_j):

    dx = M^T dy + w (B dS') + D dy                       dS = 2^(s_last) dS' + C^T (2^s dy)
    d(C B^T) = sum over heads of (dy x^T) o E            dC = d(C B^T) B + (2^s dy) S^T      dB likewise
    gradient of step k's log-decay = sum of all paths j -> t with j < k <= t of the same segment

That sum is [paths that end at t >= k] - [paths that begin at j >= k]. Within a chunk these are sums over the rows and
columns of M o (dy x^T), so paths on both sides cancel, and y itself is not needed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import LOG2_E, out_struct
from biomamba_jax.ops.ssd import pallas_tpu_tiles as tiles
from biomamba_jax.ops.ssd.pallas_common import HEADDIM, LARGEST_EXPONENT, LOWEST_EXPONENT, TINY
from biomamba_jax.ops.ssd.pallas_tpu_tiles import CHUNK, LANES, SharedInputs, Sizes

_STAGES = 4
"""Pairs at the end of a chunk that the stages of the next one's shared values are interleaved with: tuned on v5e."""


class _Inputs(NamedTuple):
    x: Any  # [B L H*P]
    dy: Any  # [B L H*P]
    states: Any  # [B chunks N H*P], bfloat16, before each chunk
    d_final_state: Any  # [B N H*P]
    here: SharedInputs
    ahead: SharedInputs  # of the next grid step, the previous chunk
    D: Any  # [blocks 1 128]


class Gradients(NamedTuple):
    """Outputs of the kernel, in its layouts; the caller finishes sums over lanes and channels."""

    x: Any
    """[B L H*P]."""
    dt: Any
    """[B blocks R L], with respect to the raw dt."""
    A: Any
    """[B blocks R 128], to be summed over lanes; None where log-decays are given."""
    B: Any
    """[B L blocks*N], or [B L H*N] of heads with their own."""
    C: Any
    """Likewise."""
    D: Any
    """[B blocks 1 W], to be summed over the channels of a head."""
    initial_state: Any
    """[B N H*P]."""


class _Shared(NamedTuple):
    """Values of one chunk that the heads of a block share, and per-head rows and columns."""

    segment: Any  # [l 1], resets in this chunk up to each token, as a column; None without segments
    dt: Any  # [R l], after the softplus; None where log-decays are given
    slope: Any  # [R l], derivative of the softplus, likewise
    s: Any  # [l 128], columns
    g: Any  # [l 128], columns
    to_end: Any  # [l 128], columns of w
    across: Any  # [8 128], columns of 2^(s_last), zero after a reset
    g_rows: Any  # for each 64 tokens, g as rows of pairs
    s_rows: Any
    products: Any  # _Products of all heads; None where each has its own


class _Products(NamedTuple):
    """B and C, and their products, of one chunk: of all heads, or of a pair with its own, [l 2N] in place of [l N]."""

    C: Any  # [l N], zero after a reset
    B: Any  # [l N], zero before the last reset
    C_transposed: Any  # [N l], or the heads side by side, [N 2l]; zero after a reset
    scores: Any  # C B^T, masked: for each 64 columns, repeated or of each head, the rows from there on
    scores_transposed: Any  # B C^T, masked: likewise, the rows up to there


class _Sums(NamedTuple):
    """Accumulated over the heads of one chunk."""

    scores: Any  # gradient of the scores, both heads of a pair concatenated; None where heads have their own
    B: Any  # [l N], likewise
    C: Any  # [l N], likewise
    ends: Any  # [R l], all paths that end at each token
    begins: Any  # [R l], paths that begin at each token and leave the chunk
    begins_inside: Any  # paths that begin at each token and end in the chunk: for each 64 tokens, rows of pairs
    last: Any  # [R/2 128], paths that leave the chunk, summed over tokens


def _keep_transposed(piece: slice, resets: Any, segment: Any) -> Array:
    """Return where token j (rows, up to piece.stop) reaches token t >= j of `piece` (lanes, repeated)."""
    shape = (piece.stop, LANES)
    keep = tiles.iota(shape, 0) <= (tiles.iota(shape, 1) & (HEADDIM - 1)) + piece.start
    if resets is not None:
        keep &= segment[: piece.stop] == jnp.concatenate([resets[:, piece]] * 2, 1)
    return keep


def _prepare(sizes: Sizes, inputs: SharedInputs) -> Iterator[Any]:
    """Compute what the heads share, in stages; the last one yields it."""
    resets, segment = tiles.segments(inputs.resets)
    yield None
    decays = tiles.decays(inputs, segment)
    yield None
    s = tiles.to_columns(decays.s)
    g = tiles.to_columns(decays.g)
    yield None
    to_end = tiles.to_columns(decays.to_end)
    yield None
    across = jnp.exp2(s[CHUNK - 1 :])
    if segment is not None:
        across = jnp.where(segment[CHUNK - 1 :] == 0, across, 0.0)
    across = jnp.broadcast_to(across, (8, LANES))
    rows = ([tiles.pair_rows(v, sizes.half_rows, piece) for piece in tiles.halves(CHUNK)] for v in (decays.g, decays.s))
    g_rows, s_rows = (jnp.concatenate(v, 0) for v in rows)
    heads = segment, decays.dt, decays.slope, s, g, to_end, across, g_rows, s_rows
    products = None
    if not sizes.own:
        for stage in _products(sizes, inputs.B[...], inputs.C[...], resets, segment):
            products = stage
            yield None
    yield _Shared(*heads, products)


def _products(sizes: Sizes, B: Array, C: Array, resets: Any, segment: Any) -> Iterator[Any]:
    """Compute what depends on B and C, of all heads or of a pair with its own, in stages; the last one yields it."""
    # Masked after the transpose: at one of values just rounded, libtpu's static profile for v5e ends its process.
    C_in, B_out, C_transposed = C, B, (tiles.stack_heads(C) if sizes.own else C).T
    if segment is not None:
        C_in, B_out = tiles.masked(C, segment == 0), tiles.masked(B, segment == segment[CHUNK - 1 :])
        C_transposed = tiles.masked(C_transposed, (jnp.concatenate([resets] * 2, 1) if sizes.own else resets) == 0)
    yield None
    scores, transposed = tiles.scores(B, C, sizes.own, resets, segment), []
    yield None
    for piece in tiles.halves(CHUNK):
        product = tiles.dot(B[: piece.stop], tiles.for_both_heads(C[piece], sizes.own), tiles.AS_ROWS)
        transposed.append(jnp.where(_keep_transposed(piece, resets, segment), product, 0.0))
    yield None
    yield _Products(C_in, B_out, C_transposed, scores, jnp.concatenate(transposed, 0))


def _store_head_sums(rows: Any, sizes: Sizes, pair: int, values: Array) -> None:
    """Sum [l 128] over each head's channels and store the sums to the pair's two rows of `rows`."""
    transposed = values.T
    rows[pair : pair + 1] = jnp.sum(transposed[:HEADDIM], 0, keepdims=True)
    row = sizes.half_rows + pair
    rows[row : row + 1] = jnp.sum(transposed[HEADDIM:], 0, keepdims=True)


def _pair(sizes: Sizes, pair: int, inputs: _Inputs, out: Gradients, d_state: Any, shared: _Shared, sums: _Sums) -> None:
    """Compute the gradients of a pair of heads. The order keeps few arrays live: the scheduler stays close to it."""
    half_rows = sizes.half_rows
    lanes = slice(pair * LANES, (pair + 1) * LANES)
    x, dy, state, d_after = inputs.x[:, lanes], inputs.dy[:, lanes], inputs.states[:, lanes], d_state[:, lanes]
    x_exact, dy_exact = x.astype(jnp.float32), dy.astype(jnp.float32)
    x, dy, d_after_rounded = x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16), d_after.astype(jnp.bfloat16)
    products, factor = shared.products, lambda v: v
    if sizes.own:
        B, C = (tiles.own_columns(v, pair, sizes.d_state) for v in (inputs.here.B, inputs.here.C))
        resets = None if inputs.here.resets is None else inputs.here.resets[...]
        segment = None if shared.segment is None else shared.segment[...]
        *_, products = _products(sizes, B, C, resets, segment)
        factor = tiles.block_diagonal
        d_B: list[Any] = []
        d_C: list[Any] = [None] * (CHUNK // HEADDIM)

    s = tiles.broadcast_pair(shared.s[...], pair, half_rows)
    ends: list[Any] = [None] * (CHUNK // HEADDIM)
    start = 0
    for k, piece in enumerate(tiles.halves(CHUNK)):
        i = k * half_rows + pair
        rows = slice(start, start + CHUNK - piece.start)
        start = rows.stop
        decay = jnp.exp2(jnp.minimum(s[piece.start :] - shared.g_rows[i : i + 1], LARGEST_EXPONENT))
        d_scores = tiles.dot(dy[piece.start :], tiles.block_diagonal(x[piece]), tiles.AS_ROWS) * decay
        if sizes.own:
            _add_of_scores(d_scores, piece, sizes, B, C, resets, segment, d_B, d_C)
        else:
            sums.scores[rows] += d_scores
        paths = d_scores * products.scores[rows]
        sums.begins_inside[i : i + 1] = jnp.sum(paths, 0, keepdims=True)
        for n in range(k, len(ends)):
            ends[n] = tiles.plus(ends[n], paths[(n - k) * HEADDIM : (n - k + 1) * HEADDIM])
    dy_decayed_exact = jnp.exp2(s) * dy_exact
    dy_decayed = dy_decayed_exact.astype(jnp.bfloat16)
    from_state = tiles.dot(products.C[...], factor(state)) * dy_decayed_exact
    _store_head_sums(sums.ends, sizes, pair, jnp.concatenate(ends, 0) + from_state)

    g = tiles.broadcast_pair(shared.g[...], pair, half_rows)
    dx: list[Any] = [None] * (CHUNK // HEADDIM)
    start = 0
    for k, piece in enumerate(tiles.halves(CHUNK)):
        i = k * half_rows + pair
        rows = slice(start, start + piece.stop)
        start = rows.stop
        decay = jnp.exp2(jnp.minimum(shared.s_rows[i : i + 1] - g[: piece.stop], LARGEST_EXPONENT))
        mixing = (products.scores_transposed[rows] * decay).astype(jnp.bfloat16)
        product = tiles.dot(mixing, tiles.block_diagonal(dy[piece]))
        for n in range(k + 1):
            dx[n] = tiles.plus(dx[n], product[n * HEADDIM : (n + 1) * HEADDIM])

    to_end = tiles.broadcast_pair(shared.to_end[...], pair, half_rows)
    x_weighted = (to_end * x_exact).astype(jnp.bfloat16)
    onward = tiles.dot(products.B[...], factor(d_after_rounded)) * to_end
    skip = tiles.broadcast_pair_row(inputs.D[...], pair, half_rows) * dy_exact
    out.x[:, lanes] = (jnp.concatenate(dx, 0) + onward + skip).astype(out.x.dtype)
    out.D[:, lanes] += jnp.sum(dy_exact * x_exact, 0, keepdims=True)
    # For the same reason the block-diagonal factors are the left ones: the right ones are transposed.
    state_to_C = tiles.dot(factor(dy_decayed), state, tiles.AS_ROWS)
    state_to_B = tiles.dot(factor(x_weighted), d_after_rounded, tiles.AS_ROWS)
    if sizes.own:
        state_to_B, state_to_C = (tiles.side_by_side(v) for v in (state_to_B, state_to_C))
        state_to_B, state_to_C = _through_state(state_to_B, state_to_C, segment)
        columns = slice(2 * sizes.d_state * pair, 2 * sizes.d_state * (pair + 1))
        out.C[:, columns] = (state_to_C + jnp.concatenate(d_C, 0)).astype(out.C.dtype)
        out.B[:, columns] = (state_to_B + jnp.concatenate(d_B, 0)).astype(out.B.dtype)
    else:
        sums.C[...] += state_to_C
        sums.B[...] += state_to_B
    d_before = tiles.broadcast_pair(shared.across[...], pair, half_rows)[:1] * d_after
    d_state[:, lanes] = d_before + tiles.dot(products.C_transposed[...], factor(dy_decayed))

    begins = x.astype(jnp.float32) * onward
    last = jnp.sum(begins, 0, keepdims=True) + jnp.sum(d_before * state.astype(jnp.float32), 0, keepdims=True)
    sums.last[pair : pair + 1] = last
    _store_head_sums(sums.begins, sizes, pair, begins)


def _add_of_scores(
    d_scores: Array, piece: slice, sizes: Sizes, B: Any, C: Any, resets: Any, segment: Any, d_B: list, d_C: list
) -> None:
    """Add the gradients of B and C through the scores of 64 columns to those of each 64 tokens; pieces in order."""
    kept = (tiles.keep(piece, resets, segment).astype(jnp.float32) * d_scores).astype(jnp.bfloat16)
    to_C = tiles.dot(kept, tiles.for_both_heads(B[piece], sizes.own))
    for n, rows in enumerate(tiles.halves(CHUNK - piece.start), start=len(d_B)):
        d_C[n] = tiles.plus(d_C[n], to_C[rows])
    to_B = tiles.dot(kept, C[piece.start :], tiles.AS_COLUMNS)
    if sizes.own:
        d_B.append(jnp.concatenate([to_B[:HEADDIM, : sizes.d_state], to_B[HEADDIM:, sizes.d_state :]], 1))
    else:
        d_B.append(to_B[:HEADDIM] + to_B[HEADDIM:])


def _through_state(d_B: Array, d_C: Array, segment: Any) -> tuple[Array, Array]:
    """Return the gradients of B and C through the state, which only tokens of its segment write or read."""
    if segment is None:
        return d_B, d_C
    return d_B * (segment == segment[CHUNK - 1 :]).astype(jnp.float32), d_C * (segment == 0).astype(jnp.float32)


def _finish_B_and_C(sizes: Sizes, inputs: SharedInputs, out: Gradients, shared: _Shared, sums: _Sums) -> None:
    """Compute the gradients of shared B and C from the sums over heads."""
    B, C = inputs.B[...], inputs.C[...]
    resets, segment = (None, None) if inputs.resets is None else (inputs.resets[...], shared.segment[...])
    state_to_B, state_to_C = _through_state(sums.B[...], sums.C[...], segment)
    d_B: list[Any] = []
    d_C: list[Any] = [None] * (CHUNK // HEADDIM)
    start = 0
    for piece in tiles.halves(CHUNK):
        rows = slice(start, start + CHUNK - piece.start)
        start = rows.stop
        _add_of_scores(sums.scores[rows], piece, sizes, B, C, resets, segment, d_B, d_C)
    out.B[...] = (state_to_B + jnp.concatenate(d_B, 0)).astype(out.B.dtype)
    out.C[...] = (state_to_C + jnp.concatenate(d_C, 0)).astype(out.C.dtype)


def _finish(sizes: Sizes, inputs: SharedInputs, out: Gradients, shared: _Shared, sums: _Sums) -> None:
    """Compute the gradients of dt and A, or of the log-decays, from the sums over tokens."""
    pieces = tiles.halves(CHUNK)
    last = sums.last[...]
    left = tiles.iota(last.shape, 1) < HEADDIM
    leave = jnp.concatenate([jnp.sum(jnp.where(where, last, 0.0), 1, keepdims=True) for where in (left, ~left)], 0)
    at_end = tiles.iota((sizes.rows, CHUNK), 1) == CHUNK - 1
    inside = [sums.begins_inside[k * sizes.half_rows : (k + 1) * sizes.half_rows] for k in range(len(pieces))]
    of_heads = [jnp.concatenate([v[:, head] for v in inside], 1) for head in tiles.halves(LANES)]
    begins = sums.begins[...] + jnp.concatenate(of_heads, 0)
    net = sums.ends[...] - begins + jnp.where(at_end, leave, 0.0)
    from_here = tiles.iota((CHUNK, CHUNK), 0) >= tiles.iota((CHUNK, CHUNK), 1)
    if inputs.resets is not None:
        from_here &= shared.segment[...] == inputs.resets[...]
    exponent = inputs.dt[...] if inputs.A_and_bias is None else shared.dt[...] * inputs.A_and_bias[:, :1]
    # A clipped exponent has no gradient; at a reset the exponent has no effect.
    d_exponent = jnp.where(exponent > LOWEST_EXPONENT, tiles.exact_sum_over(net, from_here), 0.0)
    if inputs.A_and_bias is None:
        out.dt[...] = d_exponent
        return
    dt, A = shared.dt[...], inputs.A_and_bias[:, :1]
    out.A[...] += d_exponent * dt
    d_dt = d_exponent * (A / LOG2_E) + begins / jnp.maximum(dt, TINY)
    out.dt[...] = d_dt * shared.slope[...]


def _kernel(sizes: Sizes, inputs: _Inputs, out: Gradients, d_state: Any, shared: _Shared, sums: _Sums) -> None:
    _, row, block, step = (pl.program_id(axis) for axis in range(4))

    @pl.when(step == 0)
    def start_stream() -> None:
        d_state[...] = inputs.d_final_state[...]
        if out.A is not None:
            out.A[...] = jnp.zeros_like(out.A)
        out.D[...] = jnp.zeros_like(out.D)

    @pl.when((row == 0) & (block == 0) & (step == 0))
    def start_half() -> None:
        # Rows after the last pair are never written, but are summed with the others.
        for ref in (sums.ends, sums.begins, sums.begins_inside, sums.last):
            ref[...] = jnp.zeros_like(ref)
        *_, values = _prepare(sizes, inputs.here)
        tiles.store(shared, values)

    for ref in (sums.scores, sums.B, sums.C) if not sizes.own else ():
        ref[...] = jnp.zeros_like(ref)
    stages, values = _prepare(sizes, inputs.ahead), None
    for pair in range(sizes.pairs):
        if pair >= sizes.pairs - _STAGES:
            values = next(stages, values)
        _pair(sizes, pair, inputs, out, d_state, shared, sums)
    *_, values = values, *stages
    if not sizes.own:
        _finish_B_and_C(sizes, inputs.here, out, shared, sums)
    _finish(sizes, inputs.here, out, shared, sums)
    tiles.store(shared, values)

    @pl.when(step == sizes.chunks - 1)
    def end_stream() -> None:
        out.initial_state[...] = d_state[...]


def backward(
    sizes: Sizes,
    x: Array,
    dy: Array,
    states: Array,
    d_final_state: Array,
    shared: SharedInputs,
    D: Array,
    *,
    interpret: Any,
) -> Gradients:
    """Run the kernel; arrays as in `_Inputs`."""
    ahead = shared._replace(B=None, C=None) if sizes.own else shared
    inputs = _Inputs(x, dy, states, d_final_state, shared, ahead, D)

    def kernel(inputs: _Inputs, *refs: Any) -> None:
        *gradients, d_state, shared, sums = refs
        _kernel(sizes, inputs, Gradients(*gradients), d_state, shared, sums)

    return pl.pallas_call(
        kernel,
        grid=sizes.grid,
        in_specs=[_input_specs(sizes, inputs)],
        out_specs=_output_specs(sizes),
        out_shape=_outputs(sizes, x, shared),
        scratch_shapes=[
            tiles.vmem(sizes.d_state, sizes.width),
            _shared_scratch(sizes, segmented=shared.resets is not None),
            _sums_scratch(sizes),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary")),
        interpret=interpret,
        name="ssd_backward",
    )(inputs)


def _reverse(sizes: Sizes, place: Any) -> Any:
    """Return the place of a grid step where the chunks are visited in reverse."""

    def reversed_place(*grid: Any) -> tuple[Any, Any, Any]:
        row, block, step = place(*grid)
        return row, block, sizes.chunks - 1 - step

    return reversed_place


def _input_specs(sizes: Sizes, inputs: _Inputs) -> _Inputs:
    here, n, width = _reverse(sizes, sizes.place), sizes.d_state, sizes.width
    spec = tiles.block_spec(here)
    tokens = spec((None, CHUNK, width), lambda row, block, chunk: (row, chunk, block))
    return _Inputs(
        x=tokens,
        dy=tokens,
        states=spec((None, None, n, width), lambda row, block, chunk: (row, chunk, 0, block)),
        d_final_state=spec((None, n, width), lambda row, block, chunk: (row, 0, block)),
        here=tiles.shared_specs(sizes, inputs.here, here),
        ahead=tiles.shared_specs(sizes, inputs.ahead, _reverse(sizes, sizes.place_ahead)),
        D=spec((None, 1, LANES), lambda row, block, chunk: (block, 0, 0)),
    )


def _outputs(sizes: Sizes, x: Array, shared: SharedInputs) -> Gradients:
    channels = sizes.blocks * sizes.width
    # If several blocks share B and C, their gradients are partial sums: in float32.
    partial_dtype = shared.B.dtype if sizes.own or sizes.blocks == sizes.groups else jnp.float32
    of_tokens = (sizes.batch, sizes.chunks * CHUNK, sizes.blocks * sizes.bc_width)
    return Gradients(
        x=out_struct(x.shape, x.dtype, x),
        dt=out_struct(shared.dt.shape, jnp.float32, x),
        A=None if sizes.own else out_struct((sizes.batch, sizes.blocks, sizes.rows, LANES), jnp.float32, x),
        B=out_struct(of_tokens, partial_dtype, x),
        C=out_struct(of_tokens, partial_dtype, x),
        D=out_struct((sizes.batch, sizes.blocks, 1, sizes.width), jnp.float32, x),
        initial_state=out_struct((sizes.batch, sizes.d_state, channels), jnp.float32, x),
    )


def _output_specs(sizes: Sizes) -> Gradients:
    spec = tiles.block_spec(_reverse(sizes, sizes.place))
    of_block = spec((None, CHUNK, sizes.bc_width), lambda row, block, chunk: (row, chunk, block))
    return Gradients(
        x=spec((None, CHUNK, sizes.width), lambda row, block, chunk: (row, chunk, block)),
        dt=spec((None, None, sizes.rows, CHUNK), lambda row, block, chunk: (row, block, 0, chunk)),
        A=None if sizes.own else spec((None, None, sizes.rows, LANES), lambda row, block, chunk: (row, block, 0, 0)),
        B=of_block,
        C=of_block,
        D=spec((None, None, 1, sizes.width), lambda row, block, chunk: (row, block, 0, 0)),
        initial_state=spec((None, sizes.d_state, sizes.width), lambda row, block, chunk: (row, 0, block)),
    )


def _rows_below() -> int:
    """Return the rows of all pieces of a chunk's scores, which are those from a piece's first token on."""
    return sum(CHUNK - piece.start for piece in tiles.halves(CHUNK))


def _shared_scratch(sizes: Sizes, *, segmented: bool) -> _Shared:
    products = _Products(
        C=tiles.vmem(CHUNK, sizes.d_state, jnp.bfloat16),
        B=tiles.vmem(CHUNK, sizes.d_state, jnp.bfloat16),
        C_transposed=tiles.vmem(sizes.d_state, CHUNK, jnp.bfloat16),
        scores=tiles.vmem(_rows_below()),
        scores_transposed=tiles.vmem(_rows_below()),
    )
    of_pieces = len(tiles.halves(CHUNK)) * sizes.half_rows
    return _Shared(
        segment=tiles.vmem(CHUNK, 1) if segmented else None,
        dt=None if sizes.own else tiles.vmem(sizes.rows, CHUNK),
        slope=None if sizes.own else tiles.vmem(sizes.rows, CHUNK),
        s=tiles.vmem(CHUNK),
        g=tiles.vmem(CHUNK),
        to_end=tiles.vmem(CHUNK),
        across=tiles.vmem(8),
        g_rows=tiles.vmem(of_pieces),
        s_rows=tiles.vmem(of_pieces),
        products=None if sizes.own else products,
    )


def _sums_scratch(sizes: Sizes) -> _Sums:
    return _Sums(
        scores=None if sizes.own else tiles.vmem(_rows_below()),
        B=None if sizes.own else tiles.vmem(CHUNK, sizes.d_state),
        C=None if sizes.own else tiles.vmem(CHUNK, sizes.d_state),
        ends=tiles.vmem(sizes.rows, CHUNK),
        begins=tiles.vmem(sizes.rows, CHUNK),
        begins_inside=tiles.vmem(len(tiles.halves(CHUNK)) * sizes.half_rows),
        last=tiles.vmem(sizes.half_rows),
    )
