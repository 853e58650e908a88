"""SSD on Mosaic GPU, for Hopper: the layouts of the kernels, and the pairing of the forward with the backward pass.

Products are of bfloat16 values with float32 accumulation, also for float32 inputs; everything else is float32, the
direct path D x and the gradients through it included. What is one value a token and head, the softplus and the sums of
exponents, is left to XLA, and so is its gradient: it is a sixtieth of x.

Only the state before each chunk is kept for the backward pass (bfloat16, as it enters the products), not one array as
long as the text besides the inputs.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.kernel_arrays import pad, round_up, vary_alike
from biomamba_jax.ops.mosaic_gpu import LN_2, LOG2_E
from biomamba_jax.ops.numerics import segment_starts
from biomamba_jax.ops.ssd import pallas_gpu_backward, pallas_gpu_forward
from biomamba_jax.ops.ssd import pallas_gpu_tiles as tiles
from biomamba_jax.ops.ssd.inputs import Inputs
from biomamba_jax.ops.ssd.pallas_gpu_tiles import CHUNK, SUMS

# softplus of it, with any bias added, is zero: such a step changes nothing.
_NO_STEP = -1e30


class _Arrays(NamedTuple):
    """Padded in length and d_state."""

    x: Float[Array, "B L H P"]
    dt: Float[Array, "B L H"]  # after the softplus
    exponent: Float[Array, "B L H"]  # log2(e) dt A
    B: Float[Array, "B L G N"]
    C: Float[Array, "B L G N"]
    D: Float[Array, " H"]
    resets: Float[Array, "B chunks l"] | None  # resets in the chunk up to each token
    initial_state: Float[Array, "B H N P"]


def ssd(inputs: Inputs, chunk_size: int | None, *, interpret: Any = None) -> tuple[Array, Array]:
    """See `biomamba_jax.ops.ssd`. `interpret` (parameters of Pallas's interpreter for GPU) runs the kernels anywhere.

    Raises:
      UserError: the kernels cannot compute these arrays, or not in this program.
    """
    x, dt, A, B, C, D, dt_bias, segment_ids, initial_state = inputs
    reason = why_not(x, B, chunk_size) or (None if interpret else dispatch.unavailable("pallas_gpu"))
    if reason:
        raise UserError(f"ssd: implementation 'pallas_gpu' cannot be used: {reason}; leave the choice to None or 'xla'")
    batch, length, heads, _ = x.shape
    f32 = jnp.float32
    padded = round_up(length, CHUNK)
    dt = pad(dt.astype(f32), (batch, padded, heads), _NO_STEP)
    dt = _softplus(dt if dt_bias is None else dt + dt_bias.astype(f32))
    exponent = jnp.maximum(dt * (A.astype(f32) * LOG2_E), tiles.LOWEST_EXPONENT)
    narrow = (batch, padded, B.shape[2], round_up(B.shape[3], tiles.TILE))
    state = (batch, heads, narrow[3], tiles.HEADDIM)
    initial = jnp.zeros(state, f32) if initial_state is None else pad(initial_state.astype(f32).swapaxes(2, 3), state)
    resets = None
    if segment_ids is not None:
        starts = jnp.pad(segment_starts(segment_ids), ((0, 0), (0, padded - length)))
        resets = jnp.cumsum(starts.astype(f32).reshape(batch, -1, CHUNK), axis=-1)
    arrays = _Arrays(
        x=pad(x, (batch, padded, *x.shape[2:])),
        dt=dt,
        exponent=exponent,
        B=pad(B, narrow),
        C=pad(C, narrow),
        D=jnp.zeros(heads, f32) if D is None else D.astype(f32),
        resets=resets,
        initial_state=initial,
    )
    y, final = _ssd(vary_alike(arrays), interpret)
    return y[:, :length], final[:, :, : B.shape[3]].swapaxes(2, 3)


def why_not(x: Array, B: Array, chunk_size: int | None) -> str | None:
    """Why the kernels can't compute these arrays, if so."""
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, not bfloat16 or float32"
    if x.shape[3] != tiles.HEADDIM:
        return f"headdim is {x.shape[3]}, not {tiles.HEADDIM}"
    if B.shape[3] > tiles.MOST_STATES:
        return f"d_state is {B.shape[3]}, more than {tiles.MOST_STATES}"
    if chunk_size not in (None, CHUNK):
        return f"chunk_size is {chunk_size}, not {CHUNK}"
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if x.dtype == jnp.float32 and precision not in (None, "default", "fastest", "bfloat16"):
        return f"its products are of bfloat16 and {precision} precision is asked for"
    return None


def _softplus(v: Array) -> Array:
    return jnp.maximum(v, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(v)))


def _sizes(inputs: _Arrays) -> tiles.Sizes:
    batch, length, heads, _ = inputs.x.shape
    groups, d_state = inputs.B.shape[2:]
    return tiles.Sizes(batch, length // CHUNK, heads, groups, d_state, inputs.resets is not None)


def _chunked(v: Array) -> Array:
    """[B L H] -> [B chunks H l]."""
    batch, _, heads = v.shape
    return v.reshape(batch, -1, CHUNK, heads).swapaxes(2, 3)


def _unchunked(v: Array) -> Array:
    """The inverse of `_chunked`."""
    batch, _, heads, _ = v.shape
    return v.swapaxes(2, 3).reshape(batch, -1, heads)


def _sum_until(v: Array, resets: Array | None, *, backwards: bool = False) -> Array:
    """Sums of [B chunks H l] from the chunk's or segment's start up to each token, or from each token to the end.

    The sum starts anew with the segment: not even its rounding depends on the segment before.
    """
    until = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))
    until = until.T if backwards else until
    if resets is not None:
        until = (until & (resets[..., :, None] == resets[..., None, :]))[:, :, None]
    # Not a product: XLA refuses a few shapes of them at full precision, and this is one pass over a small array.
    return jnp.sum(jnp.where(until, v[..., None, :], 0.0), axis=-1)


def _vectors(inputs: _Arrays) -> Array:
    """[B chunks H 4 l], see `tiles.Vectors`."""
    s = _sum_until(_chunked(inputs.exponent), inputs.resets)
    g = s - jnp.log2(jnp.maximum(_chunked(inputs.dt), tiles.TINY))
    from_start = jnp.exp2(s)
    to_end = jnp.exp2(jnp.minimum(s[..., -1:] - g, tiles.LARGEST_EXPONENT))
    if inputs.resets is not None:
        resets = inputs.resets[:, :, None]
        from_start = jnp.where(resets == 0, from_start, 0.0)
        to_end = jnp.where(resets == resets[..., -1:], to_end, 0.0)
    return jnp.stack(tiles.Vectors(s, g, from_start, to_end), axis=3)


def _split_skip(inputs: _Arrays) -> tuple[Array, Array | None]:
    """D for the kernels, and D for what is added outside, where x is wider than what the kernels read."""
    if inputs.x.dtype == jnp.bfloat16:
        return inputs.D, None
    return jnp.zeros_like(inputs.D), inputs.D


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _ssd(inputs: _Arrays, interpret: Any) -> tuple[Array, Array]:
    return _run(inputs, interpret, save_states=False)[0]


def _run(inputs: _Arrays, interpret: Any, *, save_states: bool):
    bf16 = jnp.bfloat16
    D, outside = _split_skip(inputs)
    arguments = pallas_gpu_forward.Inputs(
        x=inputs.x.astype(bf16),
        B=inputs.B.astype(bf16),
        C=inputs.C.astype(bf16),
        vectors=_vectors(inputs),
        resets=inputs.resets,
        D=D,
        initial_state=inputs.initial_state,
    )
    out = pallas_gpu_forward.forward(arguments, _sizes(inputs), inputs.x.dtype, save_states, interpret)
    y = out.y if outside is None else out.y + outside[:, None] * inputs.x
    return (y, out.final_state), out.states


def _forward(inputs: _Arrays, interpret: Any):
    results, states = _run(inputs, interpret, save_states=True)
    return results, (inputs, states)


def _backward(interpret: Any, residuals, cotangents):
    inputs, states = residuals
    dy, d_final_state = cotangents
    sizes = _sizes(inputs)
    vectors = _vectors(inputs)
    D, outside = _split_skip(inputs)
    x, dy_rounded, B, C = (v.astype(jnp.bfloat16) for v in (inputs.x, dy, inputs.B, inputs.C))
    handed_back = pallas_gpu_backward.state_gradients(
        pallas_gpu_backward.StateInputs(dy_rounded, C, vectors, d_final_state), sizes, interpret
    )
    out = pallas_gpu_backward.gradients(
        pallas_gpu_backward.Inputs(x, dy_rounded, B, C, states, handed_back.after, vectors, inputs.resets, D),
        sizes,
        inputs.x.dtype,
        interpret,
    )
    dx, d_D = out.x, jnp.sum(out.sums[:, :, :, SUMS.diagonal], (0, 1, 3))
    if outside is not None:
        dx, d_D = dx + outside[:, None] * dy, jnp.sum(dy * inputs.x, (0, 1, 3))
    d_dt, d_exponent = _step_gradients(inputs, vectors, out)

    def of_group(v: Array, like: Array) -> Array:
        """Gradients of B and C: the sum over a group's blocks of heads."""
        v = v.reshape(sizes.batch, sizes.groups, -1, *v.shape[2:])
        return jnp.sum(v, 2).swapaxes(1, 2).astype(like.dtype)

    return (
        _Arrays(
            x=dx,
            dt=d_dt,
            exponent=d_exponent,
            B=of_group(out.B, inputs.B),
            C=of_group(out.C, inputs.C),
            D=d_D,
            resets=None if inputs.resets is None else jnp.zeros_like(inputs.resets),
            initial_state=handed_back.initial_state,
        ),
    )


_ssd.defvjp(_forward, _backward)


def _step_gradients(inputs: _Arrays, vectors: Array, out: pallas_gpu_backward.Gradients) -> tuple[Array, Array]:
    """Of the steps, as far as they weigh x, and of the exponents, from sums over paths.

    The gradient of step k's log-decay is the sum of all paths j -> t with j < k <= t of the same segment: [paths that
    end at t >= k] - [paths that begin at j >= k]. Rounding cancels in the difference because both sides have the same
    rounded factors.
    """
    begins = out.sums[:, :, :, SUMS.begins]
    leave = jnp.sum(out.sums[:, :, :, SUMS.leave], -1)
    leave += vectors[:, :, :, tiles.VECTORS.from_start, -1] * jnp.sum(out.through, -1)
    net = out.sums[:, :, :, SUMS.ends] - begins
    net = net.at[..., -1].add(leave)
    d_exponent = _sum_until(net, inputs.resets, backwards=True) * LN_2
    if inputs.resets is not None:
        before = jnp.pad(inputs.resets[..., :-1], ((0, 0), (0, 0), (1, 0)))
        d_exponent = jnp.where((inputs.resets == before)[:, :, None], d_exponent, 0.0)
    d_dt = begins / jnp.maximum(_chunked(inputs.dt), tiles.TINY)
    return _unchunked(d_dt), _unchunked(d_exponent)
