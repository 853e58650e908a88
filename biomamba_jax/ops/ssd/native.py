"""SSD on the CPU as the recurrence itself, by compiled C++ (`ops/native/ssd.cc`), with its own backward pass.

States stay in registers while time passes: there are no products within chunks and no arrays [H l l]. Like `xla`, the
forward pass keeps the state at the start of every chunk. Softplus and decays are left to XLA: they are [B L H].
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.kernel_arrays import cdiv, crop_like, differentiable, largest_divisor, round_up, vary_alike
from biomamba_jax.ops.native.call import call, segments
from biomamba_jax.ops.ssd.inputs import Inputs
from biomamba_jax.ops.ssd.xla import weights_and_exponents

_CHUNK_SIZE = 64  # tokens between two kept states
_PARTS = 16  # of the work of a backward pass, at least: as many threads as may share it; each has its own dB and dC


class _Steps(NamedTuple):
    """The arrays of the recurrence, and their cotangents."""

    x: Float[Array, "B L H P"]
    weight: Float[Array, "B L H"]
    decay: Float[Array, "B L H"]
    B: Float[Array, "B L G N"]
    C: Float[Array, "B L G N"]
    D: Float[Array, " H"]
    segment_ids: Int[Array, "B L"] | None
    initial_state: Float[Array, "B H P N"]


def ssd(inputs: Inputs, chunk_size: int | None) -> tuple[Array, Array]:
    """Return all outputs and the final state; see `api.ssd`."""
    x, dt, A, B, C, D, dt_bias, segment_ids, initial_state = inputs
    rows, length, heads, headdim = x.shape
    weight, exponent = weights_and_exponents(x, dt, A, dt_bias)
    D = jnp.zeros(heads) if D is None else D
    if initial_state is None:
        initial_state = jnp.zeros((rows, heads, headdim, B.shape[3]))
    steps = _Steps(x, weight, jnp.exp(exponent), B, C, D, segment_ids, initial_state)
    return _scan(vary_alike(steps), min(chunk_size or _CHUNK_SIZE, length))


def _arguments(steps: _Steps) -> tuple[Array | None, ...]:
    return (*steps[:6], segments(steps.segment_ids))


def _run(steps: _Steps, chunk: int, save: bool):
    rows, length = steps.x.shape[:2]
    state = steps.initial_state.shape
    _, heads, headdim, d_state = state
    # The library keeps vectors of channels, of at most 16, for blocks of 8 states.
    padded = round_up(headdim, 16) * round_up(d_state, 8)
    starts = (rows, cdiv(length, chunk), heads, padded) if save else (0,)
    arguments = (*_arguments(steps), steps.initial_state)
    y, last, kept = call("ssd_forward", [steps.x.shape, state, starts], arguments, chunk=chunk)
    return (y.astype(steps.x.dtype), last), kept


def _backward(steps: _Steps, starts: Array, cotangents, chunk: int) -> _Steps:
    rows, length, heads, _ = steps.x.shape
    groups, d_state = steps.B.shape[2:]
    share = largest_divisor(heads // groups, max(rows * heads // _PARTS, 1))
    per_step, shared = steps.weight.shape, (rows, heads // share, length, d_state)
    shapes = [steps.x.shape, per_step, per_step, shared, shared, (rows, heads), steps.initial_state.shape]
    arguments = (*_arguments(steps), starts, *cotangents)
    x, weight, decay, B, C, D, initial = call("ssd_backward", shapes, arguments, chunk=chunk, share=share)
    B, C = (_sum_parts(v.reshape(rows, groups, -1, length, d_state)).swapaxes(1, 2) for v in (B, C))
    gradients = _Steps(x, weight, decay, B, C, jnp.sum(D, 0), None, initial)
    return jax.tree.map(crop_like, gradients, steps._replace(segment_ids=None))


def _sum_parts(v: Float[Array, "B G parts L N"]) -> Float[Array, "B G L N"]:
    """Sum over the parts in one loop; for one row of 24 x 512 x 128 XLA's reduction takes 33 ms in place of 0.5."""
    return sum((v[:, :, part] for part in range(1, v.shape[2])), v[:, :, 0])


_scan = differentiable(_run, _backward)
