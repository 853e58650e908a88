"""The recurrence inside one chunk of one row, forward and backward, in two forms.

`ASSOCIATIVE` has logarithmic depth and does more work: for accelerators. `SEQUENTIAL` is a loop over time steps: for
the CPU, where it is many times faster. Its states are [N E] with channels minor, so that every operation runs along
whole vectors, and every sum is a matrix product, because XLA's CPU backend reduces a major axis many times slower than
it multiplies. The decays of a whole chunk are computed before the loop, on all cores.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from biomamba_jax.ops.array_typing import Array, Float

# The default precision on TPU and GPU would round float32 operands.
_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class Chunk(NamedTuple):
    """T time steps of h_t = a_t h_{t-1} + B_t u_t, y_t = C_t h_t."""

    a: Float[Array, "T N E"]
    """Decays."""
    u: Float[Array, "T E"]
    """Inputs."""
    B: Float[Array, "T N"]
    """Input projections."""
    C: Float[Array, "T N"]
    """Output projections."""


class Gradients(NamedTuple):
    """Gradients of a loss. Below, g_t is the gradient with respect to the exponent delta_t A of the decay a_t."""

    initial: Float[Array, "N E"]
    """With respect to the state before the chunk."""
    A: Float[Array, "N E"]
    """Sum over T of g delta, plus the carried sum of later chunks."""
    delta: Float[Array, "T E"]
    """Sum over N of g A: through the decay only."""
    u: Float[Array, "T E"]
    """With respect to `Chunk.u`."""
    B: Float[Array, "T N"]
    """With respect to `Chunk.B`."""
    C: Float[Array, "T N"]
    """With respect to `Chunk.C`."""


class Form(NamedTuple):
    """One form of the recurrence."""

    outputs: Callable[[Chunk, Array], tuple[Array, Array]]
    """(chunk, start) -> (final state, y)."""
    gradients: Callable[[Chunk, Array, Array, Array, Array, Array, Array], Gradients]
    """(chunk, start, A, delta, dy, d_last, dA) -> gradients, where `d_last` is the cotangent of the chunk's final state
    from all later chunks and `dA` the sum over them."""


def loop(body, carry, xs, reverse: bool = False):
    """Run `lax.scan`, without a loop if there is only one step."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return lax.scan(body, carry, xs, reverse=reverse)
    carry, y = body(carry, jax.tree.map(lambda v: v[0], xs))
    return carry, jax.tree.map(lambda v: v[None], y)


def _sequential_outputs(chunk: Chunk, start: Array) -> tuple[Array, Array]:
    def step(state, token: Chunk):
        state = token.a * state + token.B[:, None] * token.u
        return state, _einsum("ne,n->e", state, token.C)

    return loop(step, start, chunk)


def _sequential_gradients(
    chunk: Chunk, start: Array, A: Array, delta: Array, dy: Array, d_last: Array, dA: Array
) -> Gradients:
    def recompute(carry, xs):
        state, befores, t = carry
        token, dy = xs
        # An explicit update, since XLA copies the buffer of a scan's stacked output once more; an unsigned index needs
        # no handling of negative values.
        befores = lax.dynamic_update_index_in_dim(befores, state, t, axis=0)
        state = token.a * state + token.B[:, None] * token.u
        return (state, befores, t + jnp.uint32(1)), _einsum("ne,e->n", state, dy)

    (_, befores, _), dC = loop(recompute, (start, lax.empty(chunk.a.shape, chunk.a.dtype), jnp.uint32(0)), (chunk, dy))
    ones = jnp.ones(A.shape[0], A.dtype)

    def step(carry, xs):
        # dh = C_t dy_t + a_{t+1} dh_{t+1}; the carry holds its second term.
        later, dA = carry
        token, before, delta, dy = xs
        dh = later + token.C[:, None] * dy
        later = token.a * dh
        d_exponent = later * before
        d_delta = _einsum("ne,n->e", d_exponent * A, ones)
        dB = _einsum("ne,e->n", dh, token.u)
        du = _einsum("ne,n->e", dh, token.B)
        return (later, dA + d_exponent * delta), (d_delta, du, dB)

    (d_start, dA), (d_delta, du, dB) = loop(step, (d_last, dA), (chunk, befores, delta, dy), reverse=True)
    return Gradients(d_start, dA, d_delta, du, dB, dC)


def _associative_states(a: Array, b: Array, start: Array, reverse: bool = False) -> Array:
    """Return all states of h_t = a_t h_{t-1} + b_t."""

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    decay, states = lax.associative_scan(combine, (a, b), reverse=reverse)
    return decay * start + states


def _associative_outputs(chunk: Chunk, start: Array) -> tuple[Array, Array]:
    states = _associative_states(chunk.a, chunk.B[:, :, None] * chunk.u[:, None, :], start)
    return states[-1], _einsum("tne,tn->te", states, chunk.C)


def _associative_gradients(
    chunk: Chunk, start: Array, A: Array, delta: Array, dy: Array, d_last: Array, dA: Array
) -> Gradients:
    states = _associative_states(chunk.a, chunk.B[:, :, None] * chunk.u[:, None, :], start)
    before = jnp.concatenate([start[None], states[:-1]])
    # dh_t = C_t dy_t + a_{t+1} dh_{t+1}: the same recurrence in reverse, with the decays shifted by one step.
    following = jnp.concatenate([chunk.a[1:], jnp.ones_like(chunk.a[:1])])
    dh = _associative_states(following, chunk.C[:, :, None] * dy[:, None, :], d_last, reverse=True)
    later = chunk.a * dh
    d_exponent = later * before
    return Gradients(
        initial=later[0],
        A=dA + jnp.sum(d_exponent * delta[:, None, :], axis=0),
        delta=jnp.sum(d_exponent * A, axis=1),
        u=_einsum("tne,tn->te", dh, chunk.B),
        B=_einsum("tne,te->tn", dh, chunk.u),
        C=_einsum("tne,te->tn", states, dy),
    )


SEQUENTIAL = Form(_sequential_outputs, _sequential_gradients)
ASSOCIATIVE = Form(_associative_outputs, _associative_gradients)
