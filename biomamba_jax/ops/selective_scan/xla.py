"""The selective scan in XLA operations, with its own backward pass.

The forward pass saves the state at the start of every chunk of time steps and nothing else with an axis N; the backward
pass recomputes the states of one chunk at a time from there (`chunks`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.kernel_arrays import differentiable, pad, round_up
from biomamba_jax.ops.numerics import accumulator_dtype, segment_starts, softplus, sum_leading
from biomamba_jax.ops.selective_scan.chunks import ASSOCIATIVE, SEQUENTIAL, Chunk, loop
from biomamba_jax.ops.selective_scan.inputs import Inputs

_CHUNK_SIZE = {"cpu": 32, "gpu": 64, "tpu": 64}


class _Plan(NamedTuple):
    """Static choices of one call."""

    chunk_size: int  # at most the length
    associative: bool


class _Tokens(NamedTuple):
    """Per-token inputs of the recurrence in the accumulator dtype, chunked: [B chunks T ...]; of one row, without B."""

    x: Array
    delta: Array
    B: Array
    C: Array
    same: Array | None  # True if the token before is of the same segment


def selective_scan(
    inputs: Inputs,
    *,
    chunk_size: int | None = None,
    associative: bool | None = None,
) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """Return all outputs and the final state; see `api.selective_scan`.

    Args:
      inputs: the arrays.
      chunk_size: time steps between two saved states; None is the platform's best.
      associative: solve the recurrence inside a chunk by an associative scan (True) or step by step (False); None is
        the platform's best.
    """
    platform = dispatch.platform()
    if associative is None:
        associative = platform != "cpu"
    plan = _Plan(min(chunk_size or _CHUNK_SIZE[platform], inputs.x.shape[1]), associative)
    return _scan(inputs, plan)


def _run(inputs: Inputs, plan: _Plan, save: bool):
    """Return (y, final state) and the residuals, which cost nothing if unused."""
    dtype = accumulator_dtype(inputs.x.dtype)
    rows, length, channels = inputs.x.shape
    A = inputs.A.T.astype(dtype)
    if inputs.initial_state is None:
        initial = jnp.zeros((rows, *A.shape), dtype)
    else:
        initial = inputs.initial_state.swapaxes(1, 2).astype(dtype)
    form = ASSOCIATIVE if plan.associative else SEQUENTIAL

    def row(args):
        def chunk(state, tokens: _Tokens):
            last, y = form.outputs(_recurrence(tokens, A), state)
            return last, (y, state)

        return loop(chunk, *args)

    state, (y, starts) = _map_rows(row, (initial, _tokens(inputs, plan)), plan)
    y = y.reshape(rows, -1, channels)[:, :length]
    if inputs.D is not None:
        y = y + inputs.D.astype(dtype) * inputs.x
    ungated = None
    if inputs.z is not None:
        ungated = y.astype(inputs.x.dtype)
        y = y * jax.nn.silu(inputs.z.astype(dtype))
    return (y.astype(inputs.x.dtype), state.swapaxes(1, 2)), (starts, ungated)


def _backward(inputs: Inputs, residuals, cotangents, plan: _Plan) -> Inputs:
    starts, ungated = residuals
    dtype = accumulator_dtype(inputs.x.dtype)
    rows, length, _ = inputs.x.shape
    A = inputs.A.T.astype(dtype)
    dy = cotangents[0].astype(dtype)
    dz = None
    if inputs.z is not None:
        z = inputs.z.astype(dtype)
        sigmoid = jax.nn.sigmoid(z)
        dz = (dy * ungated * sigmoid * (1 + z * (1 - sigmoid))).astype(inputs.z.dtype)
        dy = dy * z * sigmoid
    form = ASSOCIATIVE if plan.associative else SEQUENTIAL

    def row(args):
        def chunk(carry, xs):
            d_last, dA = carry
            start, dy, tokens = xs
            g = form.gradients(_recurrence(tokens, A), start, A, tokens.delta, dy, d_last, dA)
            # u = delta x, in the input of the recurrence and (through g.delta) in its decay.
            return (g.initial, g.A), (g.u * tokens.delta, g.delta + g.u * tokens.x, g.B, g.C)

        d_state, *xs = args
        return loop(chunk, (d_state, jnp.zeros_like(A)), tuple(xs), reverse=True)

    args = (cotangents[1].swapaxes(1, 2).astype(dtype), starts, _chunked(dy, plan), _tokens(inputs, plan))
    (d_initial, dA), chunks = _map_rows(row, args, plan)
    dx, d_delta, dB, dC = (v.reshape(rows, -1, v.shape[-1])[:, :length] for v in chunks)
    dD = None
    if inputs.D is not None:
        dx = dx + dy * inputs.D.astype(dtype)
        dD = sum_leading(dy * inputs.x).astype(inputs.D.dtype)
    d_dt = d_delta * jax.nn.sigmoid(_biased_dt(inputs))
    d_bias = None if inputs.dt_bias is None else sum_leading(d_dt).astype(inputs.dt_bias.dtype)
    if inputs.initial_state is not None:
        d_initial = d_initial.swapaxes(1, 2).astype(inputs.initial_state.dtype)
    return Inputs(
        x=dx.astype(inputs.x.dtype),
        dt=d_dt.astype(inputs.dt.dtype),
        A=sum_leading(dA.reshape(rows, -1)).reshape(A.shape).T.astype(inputs.A.dtype),
        B=dB.astype(inputs.B.dtype),
        C=dC.astype(inputs.C.dtype),
        D=dD,
        z=dz,
        dt_bias=d_bias,
        segment_ids=None,
        initial_state=None if inputs.initial_state is None else d_initial,
    )


_scan = differentiable(_run, _backward)


def _biased_dt(inputs: Inputs) -> Array:
    dt = inputs.dt.astype(accumulator_dtype(inputs.x.dtype))
    return dt if inputs.dt_bias is None else dt + inputs.dt_bias.astype(dt.dtype)


def _tokens(inputs: Inputs, plan: _Plan) -> _Tokens:
    dtype = accumulator_dtype(inputs.x.dtype)
    dt = _biased_dt(inputs)
    delta = softplus(dt)
    same = None
    if inputs.segment_ids is not None:
        same = _chunked(~segment_starts(inputs.segment_ids), plan, fill=True)
    x, B, C = (_chunked(v.astype(dtype), plan) for v in (inputs.x, inputs.B, inputs.C))
    return _Tokens(x, _chunked(delta, plan), B, C, same)


def _chunked(v: Array, plan: _Plan, fill: bool | int = 0) -> Array:
    """Chunk [B L ...] -> [B chunks T ...]. Padded steps have delta = 0, which leaves the state unchanged."""
    rows, length, *rest = v.shape
    v = pad(v, (rows, round_up(length, plan.chunk_size), *rest), fill)
    return v.reshape(rows, -1, plan.chunk_size, *rest)


def _recurrence(tokens: _Tokens, A: Float[Array, "N E"]) -> Chunk:
    """Return a chunk of one row of h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t (Mamba, arXiv 2312.00752, eq. 2)."""
    exponent = tokens.delta[:, None, :] * A
    if tokens.same is not None:
        # Masked before the exponential: the decay into a new segment is exactly 0, and so is its gradient.
        exponent = jnp.where(tokens.same[:, None, None], exponent, -jnp.inf)
    return Chunk(jnp.exp(exponent), tokens.delta * tokens.x, tokens.B, tokens.C)


def _map_rows(f, xs, plan: _Plan):
    """Map f over the rows, vectorized or in a loop.

    The sequential form loops over rows: the states of a step then stay in the cache, and a batch axis would cost copies
    between layouts. It takes half the time of all rows at once, even for 256 channels. A single token is too little
    work for a loop.
    """
    if plan.associative or plan.chunk_size == 1:
        return jax.vmap(f)(xs)
    return loop(lambda _, row: (None, f(row)), None, xs)[1]
