"""SSD on Mosaic GPU, for Hopper: padding and layouts of the kernels, and the custom_vjp that pairs them.

Products are of bfloat16 values with float32 accumulation, also for float32 inputs; everything else is float32, the
skip D x and the gradients through it included. Arrays with one value per token and head (the softplus and the sums of
exponents) are left to XLA, and so are their gradients: they are a sixtieth of x.

The only residual besides the inputs is the state before each chunk (bfloat16, as it enters the products), not another
array of the length of x.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.kernel_arrays import LN_2, LOG2_E, differentiable, pad, round_up, vary_alike
from biomamba_jax.ops.numerics import segment_starts
from biomamba_jax.ops.ssd import pallas_common, pallas_gpu_backward, pallas_gpu_forward
from biomamba_jax.ops.ssd import pallas_gpu_tiles as tiles
from biomamba_jax.ops.ssd.inputs import Inputs
from biomamba_jax.ops.ssd.pallas_common import LARGEST_EXPONENT, LOWEST_EXPONENT, TINY
from biomamba_jax.ops.ssd.pallas_gpu_tiles import CHUNK, SUMS
from biomamba_jax.ops.ssd.xla import weights_and_exponents


class _Arrays(NamedTuple):
    """Inputs padded in length and d_state."""

    x: Float[Array, "B L H P"]
    weight: Float[Array, "B L H"]  # of x: the step size after the softplus, or 1 where log-decays are given
    exponent: Float[Array, "B L H"]  # in base 2: log2(e) times the log-decay
    B: Float[Array, "B L G N"]
    C: Float[Array, "B L G N"]
    D: Float[Array, " H"]
    resets: Float[Array, "B chunks l"] | None  # resets in the chunk up to each token
    initial_state: Float[Array, "B H N P"]


def ssd(inputs: Inputs, chunk_size: int | None, *, interpret: Any = None) -> tuple[Array, Array]:
    """Return all outputs and the final state; see `api.ssd`.

    Args:
      inputs: the arrays.
      chunk_size: None or the kernels' chunk.
      interpret: parameters of Pallas's interpreter for GPU, which is slow and needs no GPU. For tests.
    """
    x, dt, A, B, C, D, dt_bias, segment_ids, initial_state = inputs
    batch, length, heads, _ = x.shape
    f32 = jnp.float32
    padded = round_up(length, CHUNK)
    in_base_2 = weights_and_exponents(x, dt, A.astype(f32) * LOG2_E, dt_bias)
    weight, exponent = (pad(v, (batch, padded, heads)) for v in in_base_2)
    per_state = (batch, padded, B.shape[2], round_up(B.shape[3], tiles.TILE))
    state = (batch, heads, per_state[3], pallas_common.HEADDIM)
    initial = jnp.zeros(state, f32) if initial_state is None else pad(initial_state.astype(f32).swapaxes(2, 3), state)
    resets = None
    if segment_ids is not None:
        starts = jnp.pad(segment_starts(segment_ids), ((0, 0), (0, padded - length)))
        resets = jnp.cumsum(starts.astype(f32).reshape(batch, -1, CHUNK), axis=-1)
    arrays = _Arrays(
        x=pad(x, (batch, padded, *x.shape[2:])),
        weight=weight,
        exponent=jnp.maximum(exponent, LOWEST_EXPONENT),
        B=pad(B, per_state),
        C=pad(C, per_state),
        D=jnp.zeros(heads, f32) if D is None else D.astype(f32),
        resets=resets,
        initial_state=initial,
    )
    y, final = _ssd(vary_alike(arrays), interpret)
    return y[:, :length], final[:, :, : B.shape[3]].swapaxes(2, 3)


def unsupported_reason(x: Array, B: Array, chunk_size: int | None) -> str | None:
    """Return why the kernels cannot compute these arrays, or None if they can."""
    if reason := pallas_common.unsupported_reason(x, chunk_size, CHUNK):
        return reason
    if B.shape[3] > tiles.MAX_STATES:
        return f"d_state is {B.shape[3]}, more than {tiles.MAX_STATES}"
    return None


def _sizes(inputs: _Arrays) -> tiles.Sizes:
    batch, length, heads, _ = inputs.x.shape
    groups, d_state = inputs.B.shape[2:]
    return tiles.Sizes(batch, length // CHUNK, heads, groups, d_state, inputs.resets is not None)


def _chunked(v: Array) -> Array:
    """Chunk [B L H] -> [B chunks H l]."""
    batch, _, heads = v.shape
    return v.reshape(batch, -1, CHUNK, heads).swapaxes(2, 3)


def _unchunked(v: Array) -> Array:
    """Undo `_chunked`."""
    batch, _, heads, _ = v.shape
    return v.swapaxes(2, 3).reshape(batch, -1, heads)


def _sum_until(v: Array, resets: Array | None, *, backwards: bool = False) -> Array:
    """Sum [B chunks H l] from the chunk's or segment's start up to each token, or from each token to the end.

    The sum restarts with the segment: not even its rounding depends on the previous segment.
    """
    until = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))
    until = until.T if backwards else until
    if resets is not None:
        until = (until & (resets[..., :, None] == resets[..., None, :]))[:, :, None]
    # Not a product: XLA rejects a few shapes of them at full precision, and this is one pass over a small array.
    return jnp.sum(jnp.where(until, v[..., None, :], 0.0), axis=-1)


def _vectors(inputs: _Arrays) -> Array:
    """Return [B chunks H 4 l], see `tiles.Vectors`."""
    s = _sum_until(_chunked(inputs.exponent), inputs.resets)
    g = s - jnp.log2(jnp.maximum(_chunked(inputs.weight), TINY))
    from_start = jnp.exp2(s)
    to_end = jnp.exp2(jnp.minimum(s[..., -1:] - g, LARGEST_EXPONENT))
    if inputs.resets is not None:
        resets = inputs.resets[:, :, None]
        from_start = jnp.where(resets == 0, from_start, 0.0)
        to_end = jnp.where(resets == resets[..., -1:], to_end, 0.0)
    return jnp.stack(tiles.Vectors(s, g, from_start, to_end), axis=3)


def _split_skip(inputs: _Arrays) -> tuple[Array, Array | None]:
    """Return D for the kernels, and D for the skip added outside, for x wider than the kernels' bfloat16."""
    if inputs.x.dtype == jnp.bfloat16:
        return inputs.D, None
    return jnp.zeros_like(inputs.D), inputs.D


def _run(inputs: _Arrays, interpret: Any, save: bool):
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
    out = pallas_gpu_forward.forward(arguments, _sizes(inputs), inputs.x.dtype, save, interpret)
    y = out.y if outside is None else out.y + outside[:, None] * inputs.x
    return (y, out.final_state), out.states


def _backward(inputs: _Arrays, states: Array, cotangents, interpret: Any) -> _Arrays:
    dy, d_final_state = cotangents
    sizes = _sizes(inputs)
    vectors = _vectors(inputs)
    D, outside = _split_skip(inputs)
    x, dy_rounded, B, C = (v.astype(jnp.bfloat16) for v in (inputs.x, dy, inputs.B, inputs.C))
    states_out = pallas_gpu_backward.state_gradients(
        pallas_gpu_backward.StateInputs(dy_rounded, C, vectors, d_final_state), sizes, interpret
    )
    out = pallas_gpu_backward.gradients(
        pallas_gpu_backward.Inputs(x, dy_rounded, B, C, states, states_out.after, vectors, inputs.resets, D),
        sizes,
        inputs.x.dtype,
        interpret,
    )
    dx, d_D = out.x, jnp.sum(out.sums[:, :, :, SUMS.diagonal], (0, 1, 3))
    if outside is not None:
        dx, d_D = dx + outside[:, None] * dy, jnp.sum(dy * inputs.x, (0, 1, 3))
    d_weight, d_exponent = _step_gradients(inputs, vectors, out)

    def of_group(v: Array, like: Array) -> Array:
        """Sum the gradient of B or C over a group's blocks of heads."""
        v = v.reshape(sizes.batch, sizes.groups, -1, *v.shape[2:])
        return jnp.sum(v, 2).swapaxes(1, 2).astype(like.dtype)

    return _Arrays(
        x=dx,
        weight=d_weight,
        exponent=d_exponent,
        B=of_group(out.B, inputs.B),
        C=of_group(out.C, inputs.C),
        D=d_D,
        resets=None if inputs.resets is None else jnp.zeros_like(inputs.resets),
        initial_state=states_out.initial_state,
    )


_ssd = differentiable(_run, _backward)


def _step_gradients(inputs: _Arrays, vectors: Array, out: pallas_gpu_backward.Gradients) -> tuple[Array, Array]:
    """Return the gradients of the weights of x and of the exponents, from sums over paths.

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
    d_weight = begins / jnp.maximum(_chunked(inputs.weight), TINY)
    return _unchunked(d_weight), _unchunked(d_exponent)
