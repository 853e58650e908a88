"""Chunked SSD with its own backward pass, for any XLA backend.

Within a chunk of l tokens the recurrence is a masked matrix product, between chunks a state is carried (Dao and Gu
2024, arXiv 2405.21060, section 6). With the weight w = d and the exponent d A of each step (or w = 1 and the given
log-decay), c_t the sum of exponents up to t, and one segment:

    M[t, s] = (C_t . B_s) exp(c_t - c_s) w_s  for s <= t,  plus D on the diagonal
    y_t     = sum_s M[t, s] x_s + exp(c_t) C_t . S
    S'      = exp(c_last) S + sum_s exp(c_last - c_s) w_s B_s x_s^T

One `lax.scan` over chunks computes all of it, so the quadratic arrays exist for one chunk at a time and stay in cache.
The residuals are the inputs and the state before each chunk; the backward pass recomputes the rest.

Inside, per-token scalars are [B H l], B and C [B G l N], and the channels of a group's heads are concatenated: x and y
are [B G l W] and states [B G N W] with W = (H / G) P. That makes each product with a state one large matrix product per
group. Every einsum has its batch axes first and its operands in the order of the result: XLA's CPU backend then copies
nothing.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import pad, round_up
from biomamba_jax.ops.numerics import accumulator_dtype, segment_starts
from biomamba_jax.ops.ssd.inputs import Inputs

# CPU: measured; 32 and 128 are slower by a tenth to a quarter. Accelerators: a token moves 4 H l bytes per array like M
# and 4 N H P / l per array of states, balanced near l = 128 for the published shapes.
_CHUNK_SIZE: dict[dispatch.Platform, int] = {"cpu": 64, "gpu": 128, "tpu": 128}


def ssd(inputs: Inputs, chunk_size: int | None) -> tuple[Array, Array]:
    """Return all outputs and the final state; see `api.ssd`."""
    x, dt, A, B, C, D, dt_bias, segment_ids, initial_state = inputs
    batch, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    dtype = accumulator_dtype(x.dtype)
    weight, exponent = weights_and_exponents(x, dt, A, dt_bias)
    D = jnp.zeros(heads, dtype) if D is None else D.astype(dtype)
    if initial_state is None:
        initial_state = jnp.zeros((batch, heads, headdim, d_state), dtype)
    initial_state = initial_state.astype(dtype)
    if length == 1:
        return _step(x, weight, exponent, B, C, D, initial_state)

    starts = jnp.zeros((batch, length), bool)
    if segment_ids is not None:
        starts = segment_starts(segment_ids)
    chunk = min(chunk_size or _CHUNK_SIZE[dispatch.platform()], length)
    # A padded step has weight and exponent zero, which leaves the state unchanged.
    padded = round_up(length, chunk)
    unpadded = (x, weight, exponent, B, C, starts)
    x, weight, exponent, B, C, starts = (pad(v, (batch, padded, *v.shape[2:])) for v in unpadded)
    state = initial_state.reshape(batch, groups, -1, d_state).swapaxes(2, 3)
    y, state = _scan_chunks(x, weight, exponent, B, C, D, starts, state, chunk)
    return y[:, :length], state.swapaxes(2, 3).reshape(initial_state.shape)


def weights_and_exponents(x: Array, dt: Array | None, A: Array, dt_bias: Array | None) -> tuple[Array, Array]:
    """Return the factor of each step's input and the log of its decay [B L H], in the accumulator dtype."""
    dtype = accumulator_dtype(x.dtype)
    A = A.astype(dtype)
    if dt is None:
        return jnp.ones_like(A), A
    dt = dt.astype(dtype)
    dt = jax.nn.softplus(dt if dt_bias is None else dt + dt_bias.astype(dtype))
    return dt, dt * A


def _step(x: Array, weight: Array, exponent: Array, B: Array, C: Array, D: Array, state: Array) -> tuple[Array, Array]:
    """Compute the recurrence for one token, as in decoding."""
    batch, groups = x.shape[0], B.shape[2]
    u = x[:, 0].astype(state.dtype)
    b, c = (v[:, 0].astype(state.dtype) for v in (B, C))
    increment = (weight[:, 0, :, None] * u).reshape(batch, groups, -1)[..., None] * b[:, :, None, :]
    state = jnp.exp(exponent[:, 0])[:, :, None, None] * state + increment.reshape(state.shape)
    y = jnp.einsum("bgwn,bgn->bgw", state.reshape(increment.shape), c, precision="highest")
    y = y.reshape(u.shape) + D[:, None] * u
    return y[:, None].astype(x.dtype), state


class _Chunk(NamedTuple):
    """One chunk's inputs."""

    x: Array  # [B G l W]
    weight: Array  # [B H l]
    exponent: Array  # [B H l]
    B: Array  # [B G l N]
    C: Array  # [B G l N]
    starts: Array  # [B l], true where the state resets


class _Decays(NamedTuple):
    """Exponentials of sums of exponents, zero across a reset."""

    pair: Array  # [B H l l], from token s (last axis) to token t >= s; 1 on the diagonal
    from_start: Array  # [B H l], from the carried-in state to each token
    to_end: Array  # [B H l], from each token to the carried-out state
    across: Array  # [B H 1], from the carried-in to the carried-out state


def _chunks(x: Array, weight: Array, exponent: Array, B: Array, C: Array, starts: Array, chunk: int) -> _Chunk:
    """Stack all chunks on a new leading axis."""
    batch, length = starts.shape
    n, groups = length // chunk, B.shape[2]

    def grouped(v: Array) -> Array:
        return v.reshape(batch, n, chunk, groups, -1).transpose(1, 0, 3, 2, 4)

    weight, exponent = (v.reshape(batch, n, chunk, -1).transpose(1, 0, 3, 2) for v in (weight, exponent))
    starts = starts.reshape(batch, n, chunk).swapaxes(0, 1)
    return _Chunk(grouped(x), weight, exponent, grouped(B), grouped(C), starts)


def _unchunk(v: Array, shape: tuple[int, ...]) -> Array:
    """Undo the chunking: [n B G l W] -> `shape`, [B L ...]."""
    return v.transpose(1, 0, 3, 2, 4).reshape(shape)


def _dot(spec: str, *operands: Array, dtype: jnp.dtype) -> Array:
    """Multiply in `dtype` with float32 (float64) accumulation and result."""
    operands = tuple(v.astype(dtype) for v in operands)
    return jnp.einsum(spec, *operands, preferred_element_type=accumulator_dtype(dtype))


def _exact(spec: str, *operands: Array) -> Array:
    """Multiply at full precision, whatever the backend's default: for sums of exponents and of gradients."""
    return jnp.einsum(spec, *operands, precision="highest")


def _sum(v: Array, axis: int) -> Array:
    """Sum over axis -1 or -2; on CPU as a product with ones, see `numerics.sum_leading`."""
    if dispatch.platform() != "cpu":
        return jnp.sum(v, axis)
    if axis == -1:
        return jnp.einsum("...k,k->...", v, jnp.ones(v.shape[-1:], v.dtype))
    return jnp.einsum("...ok,...kw->...ow", jnp.ones((*v.shape[:-2], 1, v.shape[-2]), v.dtype), v)[..., 0, :]


def _to_channels(v: Array, groups: int, headdim: int) -> Array:
    """Broadcast a value per head to its channels: [B H l] -> [B G l W]."""
    batch, heads, chunk = v.shape
    v = v.reshape(batch, groups, heads // groups, chunk).swapaxes(2, 3)
    return jnp.broadcast_to(v[..., None], (*v.shape, headdim)).reshape(batch, groups, chunk, -1)


def _sum_channels(v: Array, headdim: int) -> Array:
    """Sum over each head's channels, the transpose of `_to_channels`: [B G l W] -> [B H l]."""
    batch, groups, chunk, width = v.shape
    sums = _sum(v.reshape(batch, groups, chunk, width // headdim, headdim), -1)
    return sums.swapaxes(2, 3).reshape(batch, -1, chunk)


def _split_heads(v: Array, headdim: int) -> Array:
    """Split the heads of a group: [B G l W] -> [B H l P]."""
    batch, groups, chunk, width = v.shape
    return v.reshape(batch, groups, chunk, width // headdim, headdim).swapaxes(2, 3).reshape(batch, -1, chunk, headdim)


def _merge_heads(v: Array, groups: int) -> Array:
    """Concatenate the heads of a group: [B H l P] -> [B G l W]."""
    batch, heads, chunk, headdim = v.shape
    return v.reshape(batch, groups, heads // groups, chunk, headdim).swapaxes(2, 3).reshape(batch, groups, chunk, -1)


def _per_head(v: Array, heads: int) -> Array:
    """Broadcast a value per group to its heads: [B G ...] -> [B H ...]."""
    batch, groups, *rest = v.shape
    return jnp.broadcast_to(v[:, :, None], (batch, groups, heads // groups, *rest)).reshape(batch, heads, *rest)


def _segments(starts: Array) -> Array:
    """Count the resets in this chunk up to each token [B l]; 0 is the segment of the carried-in state.

    As a product: a cumulative sum outside the scan would be sliced inside the loops that use it as a mask, which XLA's
    CPU backend then does not vectorize (10 times slower).
    """
    chunk = starts.shape[1]
    return _exact("bs,ts->bt", starts, jnp.tril(jnp.ones((chunk, chunk), starts.dtype)))


def _same_segment(segment: Array) -> Array:
    """Return where token s (last axis) is not after token t and no reset is between them [B l l]."""
    chunk = segment.shape[1]
    return jnp.tril(jnp.ones((chunk, chunk), bool)) & (segment[:, :, None] == segment[:, None, :])


def _exponents(exponent: Array, segment: Array) -> tuple[Array, Array]:
    """Return the exponents [B H l] as they enter the sums, and where they have any effect.

    At a reset it has none. A step that decays to zero is clipped to an exponent that just does so, or else the sum of
    exponents would lose the small steps next to a huge one.
    """
    info = np.finfo(exponent.dtype)
    floor = np.log(info.smallest_subnormal).astype(exponent.dtype) - 1
    before = jnp.pad(segment[:, :-1], ((0, 0), (1, 0)))
    effective = (exponent > floor) & (segment == before)[:, None]
    return jnp.where(effective, exponent, jnp.where(segment == before, floor, 0)[:, None]), effective


def _decays(exponent: Array, segment: Array) -> _Decays:
    """Compute the decays, with masks before exp: no infinity and no NaN, in values or gradients.

    The exponents between s and t are summed directly, not as the difference of two sums from the chunk's start: next to
    huge steps that difference has no significant digits.
    """
    same = _same_segment(segment)
    until = jnp.tril(jnp.ones_like(same[0], exponent.dtype))  # [t, k], k <= t
    after = jnp.tril(until, -1)  # [k, s], k > s
    between = _exact("bhtk,ks->bhts", exponent[..., None, :] * until, after)

    def masked_exp(where: Array, v: Array) -> Array:
        return jnp.exp(jnp.where(where[:, None], v, -jnp.inf))

    return _Decays(
        pair=masked_exp(same, between),
        from_start=masked_exp(segment == 0, _exact("bhk,tk->bht", exponent, until)),
        to_end=masked_exp(segment == segment[:, -1:], between[..., -1, :]),
        across=masked_exp(segment[:, -1:] == 0, jnp.sum(exponent, -1, keepdims=True)),
    )


def _mixing_matrix(decays: _Decays, cb: Array, weight: Array, D: Array) -> Array:
    """Return M [B H l l] of the module's docstring."""
    diagonal = D[:, None, None] * jnp.eye(weight.shape[-1], dtype=weight.dtype)
    return _per_head(cb, weight.shape[1]) * decays.pair * weight[..., None, :] + diagonal


def _run(x, weight, exponent, B, C, D, starts, state, chunk) -> tuple[Array, Array, Array]:
    """Return y [B L H P], the final state [B G N W], and the states before each chunk [n B G N W]."""
    groups, headdim = B.shape[2], x.shape[3]
    dot = partial(_dot, dtype=x.dtype)

    def body(state: Array, part: _Chunk) -> tuple[Array, tuple[Array, Array]]:
        segment = _segments(part.starts.astype(weight.dtype))
        exponent, _ = _exponents(part.exponent, segment)
        decays = _decays(exponent, segment)
        cb = dot("bgtn,bgsn->bgts", part.C, part.B)
        inside = dot("bhts,bhsp->bhtp", _mixing_matrix(decays, cb, part.weight, D), _split_heads(part.x, headdim))
        from_state = dot("bgtn,bgnw->bgtw", part.C, state) * _to_channels(decays.from_start, groups, headdim)
        y = _merge_heads(inside, groups) + from_state
        weighted = part.x * _to_channels(decays.to_end * part.weight, groups, headdim)
        increment = dot("bgsn,bgsw->bgnw", part.B, weighted)
        return _to_channels(decays.across, groups, headdim) * state + increment, (y.astype(x.dtype), state)

    final_state, (y, states) = jax.lax.scan(body, state, _chunks(x, weight, exponent, B, C, starts, chunk))
    return _unchunk(y, x.shape), final_state, states


@partial(jax.custom_vjp, nondiff_argnums=(8,))
def _scan_chunks(x, weight, exponent, B, C, D, starts, state, chunk: int) -> tuple[Array, Array]:
    return _run(x, weight, exponent, B, C, D, starts, state, chunk)[:2]


def _forward(x, weight, exponent, B, C, D, starts, state, chunk: int):
    y, final_state, states = _run(x, weight, exponent, B, C, D, starts, state, chunk)
    return (y, final_state), (x, weight, exponent, B, C, D, starts, states)


def _backward(chunk: int, residuals, cotangents):
    """Compute the gradients by the transposed recurrence, from the last chunk to the first.

    The gradient of step k's exponent is the sum over all paths s -> t (s < k <= t) of path value times its gradient.
    Within the chunk exactly these are summed. Sums over rows minus sums over columns would be cheaper, but the paths on
    one side of k appear in both: where a step is huge, only their rounding error remains. The diagonal is not a path.
    Sums run over the tokens of the same segment only: exactly nothing leaks.
    """
    x, weight, exponent, B, C, D, starts, states = residuals
    dy, d_final_state = cotangents
    heads, headdim = x.shape[2:]
    groups = B.shape[2]
    dot = partial(_dot, dtype=x.dtype)
    off_diagonal = 1 - jnp.eye(chunk, dtype=weight.dtype)
    before = jnp.triu(jnp.ones((chunk, chunk), weight.dtype), 1)  # [s, k], s < k
    until = jnp.tril(jnp.ones((chunk, chunk), weight.dtype))  # [t, k], k <= t

    def body(d_state: Array, inputs: tuple[_Chunk, Array, Array]):
        part, state, dy = inputs
        segment = _segments(part.starts.astype(weight.dtype))
        exponent, effective = _exponents(part.exponent, segment)
        decays = _decays(exponent, segment)
        cb = dot("bgtn,bgsn->bgts", part.C, part.B)

        # y_t = sum_s M[t, s] x_s
        x_h, dy_h = _split_heads(part.x, headdim), _split_heads(dy, headdim)
        d_mixing = dot("bhtp,bhsp->bhts", dy_h, x_h)
        dx = _merge_heads(dot("bhts,bhtp->bhsp", _mixing_matrix(decays, cb, part.weight, D), dy_h), groups)
        d_diagonal = _sum_channels(dy.astype(weight.dtype) * part.x, headdim)
        d_product = d_mixing * decays.pair
        d_cb = (d_product * part.weight[..., None, :]).reshape(*cb.shape[:2], heads // groups, chunk * chunk)
        d_cb = _sum(d_cb, -2).reshape(cb.shape)
        paths = d_product * _per_head(cb, heads) * off_diagonal
        from_s = _sum(paths, -2)
        across_k = _exact("bhts,sk->bhtk", paths * part.weight[..., None, :], before) * until

        # y_t += exp(c_t) C_t . S
        dy_decayed = dy * _to_channels(decays.from_start, groups, headdim)
        d_c = dot("bgtw,bgnw->bgtn", dy_decayed, state) + dot("bgts,bgsn->bgtn", d_cb, part.B)
        to_t = _sum_channels(dy_decayed * dot("bgtn,bgnw->bgtw", part.C, state), headdim)

        # S' += sum_s exp(c_last - c_s) d_s B_s x_s^T
        to_end = _to_channels(decays.to_end * part.weight, groups, headdim)
        d_weighted = dot("bgsn,bgnw->bgsw", part.B, d_state)
        dx += to_end * d_weighted
        d_b = dot("bgsw,bgnw->bgsn", part.x * to_end, d_state) + dot("bgts,bgtn->bgsn", d_cb, part.C)
        from_s_to_end = _sum_channels(d_weighted * part.x, headdim) * decays.to_end

        # S' += exp(c_last) S
        through = _sum_channels(_sum(d_state * state, -2)[:, :, None], headdim) * decays.across
        d_state = _to_channels(decays.across, groups, headdim) * d_state + dot("bgtn,bgtw->bgnw", part.C, dy_decayed)

        same = _same_segment(segment).astype(weight.dtype)
        d_exponent = _sum(across_k, -2) + _exact("bht,btk->bhk", to_t, same) + through
        d_exponent += _exact("bhs,bks->bhk", from_s_to_end * part.weight, same * off_diagonal)
        d_exponent = jnp.where(effective, d_exponent, 0)
        cb_diagonal = _per_head(jnp.diagonal(cb, axis1=-2, axis2=-1), heads)
        d_weight = from_s + from_s_to_end + d_diagonal * cb_diagonal
        d_d = jnp.sum(d_diagonal, (0, 2))
        outputs = dx.astype(x.dtype), d_weight, d_exponent, d_b.astype(B.dtype), d_c.astype(C.dtype), d_d
        return d_state, outputs

    parts = _chunks(x, weight, exponent, B, C, starts, chunk)
    dy = _chunks(dy, weight, exponent, B, C, starts, chunk).x
    d_initial, gradients = jax.lax.scan(body, d_final_state, (parts, states, dy), reverse=True)
    dx, d_weight, d_exponent, d_b, d_c, d_d = gradients
    d_weight, d_exponent = (v.transpose(1, 0, 3, 2).reshape(weight.shape) for v in (d_weight, d_exponent))
    dx, d_b, d_c = (_unchunk(v, like.shape) for v, like in ((dx, x), (d_b, B), (d_c, C)))
    return dx, d_weight, d_exponent, d_b, d_c, jnp.sum(d_d, 0), None, d_initial


_scan_chunks.defvjp(_forward, _backward)
