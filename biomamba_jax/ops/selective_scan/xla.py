"""The selective scan in XLA operations, with its own backward pass.

The forward pass keeps the state at the start of every chunk of time steps and nothing else of size [.., N]; the backward
pass recomputes the states inside a chunk from there. Inside a chunk the recurrence h_t = a_t h_{t-1} + b_t is solved in
one of two ways: an associative scan on accelerators, where depth costs more than work, and a loop on CPU, where it is
the other way round. States are held as [.., N, E], channels minor, so that every operation runs along whole vectors, and
sums over any axis are written as matrix products, since XLA's CPU reductions over a major axis are many times slower.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.numerics import accumulator_dtype, sum_leading

CHUNK_SIZE = {"cpu": 16, "gpu": 64, "tpu": 64}

# TPUs would otherwise multiply in bfloat16.
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class _Inputs(NamedTuple):
    x: Float[Array, "B L E"]
    dt: Float[Array, "B L E"]
    A: Float[Array, "E N"]
    B: Float[Array, "B L N"]
    C: Float[Array, "B L N"]
    D: Float[Array, " E"] | None
    z: Float[Array, "B L E"] | None
    dt_bias: Float[Array, " E"] | None
    segment_ids: Int[Array, "B L"] | None
    initial_state: Float[Array, "B E N"] | None


def selective_scan(
    x: Float[Array, "B L E"],
    dt: Float[Array, "B L E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " E"] | None,
    z: Float[Array, "B L E"] | None,
    dt_bias: Float[Array, " E"] | None,
    segment_ids: Int[Array, "B L"] | None,
    initial_state: Float[Array, "B E N"] | None,
    *,
    chunk_size: int | None = None,
    associative: bool | None = None,
) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """All outputs and the last state; see `api.selective_scan`.

    Args:
      chunk_size: time steps between two states that are kept; None is the platform's best.
      associative: solve the recurrence inside a chunk by an associative scan (True) or a loop (False); None is the
        platform's best.
    """
    platform = dispatch.platform()
    chunk_size = min(chunk_size or CHUNK_SIZE[platform], x.shape[1])
    if associative is None:
        associative = platform != "cpu"
    return _scan(_Inputs(x, dt, A, B, C, D, z, dt_bias, segment_ids, initial_state), chunk_size, associative)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _scan(inputs: _Inputs, chunk_size: int, associative: bool):
    return _forward(inputs, chunk_size, associative)[0]


def _forward(inputs: _Inputs, chunk_size: int, associative: bool):
    wide = accumulator_dtype(inputs.x.dtype)
    rows, length, _ = inputs.x.shape
    A = inputs.A.T.astype(wide)
    if inputs.initial_state is None:
        state = jnp.zeros((rows, *A.shape), wide)
    else:
        state = inputs.initial_state.swapaxes(1, 2).astype(wide)

    def chunk(state, tokens):
        x, delta, B, C, keep = tokens
        states = _recurrence(_decay(delta, A, keep), _outer(delta * x, B), state, associative)
        return states[-1], (_einsum("tbne,tbn->tbe", states, C), state)

    tokens = _chunks(inputs, _delta(inputs, wide), chunk_size, wide)
    state, (y, starts) = _loop(chunk, state, tokens)
    y = _unchunk(y, length)
    if inputs.D is not None:
        y = y + inputs.D.astype(wide) * inputs.x
    ungated = y.astype(inputs.x.dtype) if inputs.z is not None else None
    if inputs.z is not None:
        y = y * jax.nn.silu(inputs.z.astype(wide))
    return (y.astype(inputs.x.dtype), state.swapaxes(1, 2)), (inputs, starts, ungated)


def _backward(chunk_size: int, associative: bool, residuals, cotangents):
    inputs, starts, ungated = residuals
    wide = starts.dtype
    dy = cotangents[0].astype(wide)
    d_state = cotangents[1].swapaxes(1, 2)
    length = inputs.x.shape[1]
    A = inputs.A.T.astype(wide)
    dz = None
    if inputs.z is not None:
        gate, gate_vjp = jax.vjp(jax.nn.silu, inputs.z.astype(wide))
        (dz,) = gate_vjp(dy * ungated)
        dy = dy * gate
    delta = _delta(inputs, wide)

    def chunk(carry, tokens):
        # `into` is the gradient that reaches the chunk's last state from all that comes after the chunk.
        into, dA = carry
        start, dy, (x, delta, B, C, keep) = tokens
        decay = _decay(delta, A, keep)
        u = delta * x
        states = _recurrence(decay, _outer(u, B), start, associative)
        # G_t = C_t dy_t + a_{t+1} G_{t+1}: the same recurrence, backwards, with the decays moved by one step.
        following = jnp.concatenate([decay[1:], jnp.ones_like(decay[:1])])
        G = _recurrence(following, _outer(dy, C), into, associative, reverse=True)
        before = jnp.concatenate([start[None], states[:-1]])
        through = G * decay
        d_exponent = through * before
        dC = _einsum("tbne,tbe->tbn", states, dy)
        dB = _einsum("tbne,tbe->tbn", G, u)
        du = _einsum("tbne,tbn->tbe", G, B)
        d_delta = _einsum("tbne,n->tbe", d_exponent * A, jnp.ones(A.shape[0], wide)) + du * x
        dA = dA + sum_leading((d_exponent * delta[:, :, None, :]).reshape(-1, A.size)).reshape(A.shape)
        return (through[0], dA), (du * delta, d_delta, dB, dC)

    tokens = (starts, _chunk(dy, chunk_size), _chunks(inputs, delta, chunk_size, wide))
    (d_initial, dA), grads = _loop(chunk, (d_state, jnp.zeros_like(A)), tokens, reverse=True)
    dx, d_delta, dB, dC = (_unchunk(g, length) for g in grads)
    dD = None
    if inputs.D is not None:
        dx = dx + dy * inputs.D.astype(wide)
        dD = sum_leading(dy * inputs.x).astype(inputs.D.dtype)
    raw = inputs.dt.astype(wide)
    if inputs.dt_bias is not None:
        raw = raw + inputs.dt_bias.astype(wide)
    d_dt = d_delta * jax.nn.sigmoid(raw)
    d_bias = None
    if inputs.dt_bias is not None:
        d_bias = sum_leading(d_dt).astype(inputs.dt_bias.dtype)
    if inputs.initial_state is not None:
        d_initial = d_initial.swapaxes(1, 2).astype(inputs.initial_state.dtype)
    return (
        _Inputs(
            x=dx.astype(inputs.x.dtype),
            dt=d_dt.astype(inputs.dt.dtype),
            A=dA.T.astype(inputs.A.dtype),
            B=dB.astype(inputs.B.dtype),
            C=dC.astype(inputs.C.dtype),
            D=dD,
            z=None if dz is None else dz.astype(inputs.z.dtype),
            dt_bias=d_bias,
            segment_ids=None,
            initial_state=None if inputs.initial_state is None else d_initial,
        ),
    )


_scan.defvjp(_forward, _backward)


def _delta(inputs: _Inputs, wide) -> Float[Array, "B L E"]:
    raw = inputs.dt.astype(wide)
    if inputs.dt_bias is not None:
        raw = raw + inputs.dt_bias.astype(wide)
    return jax.nn.softplus(raw)


def _decay(delta, A, keep):
    """exp(delta A) [T B N E], exactly 0 where the state is reset: masked before the exponential."""
    exponent = delta[:, :, None, :] * A
    if keep is not None:
        exponent = jnp.where(keep[:, :, None, None], exponent, -jnp.inf)
    return jnp.exp(exponent)


def _outer(channels: Float[Array, "T B E"], states: Float[Array, "T B N"]) -> Float[Array, "T B N E"]:
    return channels[:, :, None, :] * states[:, :, :, None]


def _recurrence(a, b, state, associative: bool, reverse: bool = False):
    """All states of h_t = a_t h_{t-1} + b_t, from `state`; from the last step to the first if `reverse`."""
    if associative:

        def combine(left, right):
            return left[0] * right[0], right[0] * left[1] + right[1]

        decay, states = lax.associative_scan(combine, (a, b), reverse=reverse)
        return decay * state + states

    def step(state, token):
        state = token[0] * state + token[1]
        return state, state

    return _loop(step, state, (a, b), reverse)[1]


def _loop(body, carry, xs, reverse: bool = False):
    """`lax.scan`, but without a loop where there is one step only."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return lax.scan(body, carry, xs, reverse=reverse)
    carry, y = body(carry, jax.tree.map(lambda v: v[0], xs))
    return carry, jax.tree.map(lambda v: v[None], y)


def _chunks(inputs: _Inputs, delta, chunk_size: int, wide):
    """x, delta, B, C and the mask "same segment as the token before", each cut into chunks."""
    keep = None
    if inputs.segment_ids is not None:
        ids = inputs.segment_ids
        keep = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] == ids[:, :-1]], axis=1)
        keep = _chunk(keep, chunk_size, fill=True)
    return *(_chunk(v.astype(wide), chunk_size) for v in (inputs.x, delta, inputs.B, inputs.C)), keep


def _chunk(v, chunk_size: int, fill=0):
    """[B L ..] -> [chunks T B ..], time major. Zeros (delta = 0) at the end leave the state as it is."""
    rows, length = v.shape[:2]
    padding = -length % chunk_size
    if padding:
        v = jnp.pad(v, [(0, 0), (0, padding)] + [(0, 0)] * (v.ndim - 2), constant_values=fill)
    return v.swapaxes(0, 1).reshape(-1, chunk_size, rows, *v.shape[2:])


def _unchunk(v, length: int):
    return v.reshape(-1, *v.shape[2:]).swapaxes(0, 1)[:, :length]
