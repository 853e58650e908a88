"""The selective scan on the CPU by compiled C++ (`ops/native/selective_scan.cc`), with its own backward pass.

Like `xla`, the forward pass keeps the state at the start of every chunk of tokens and nothing else with an axis N.
Softplus, skip connection and gate are part of it, and no decays and no other states reach main memory.
"""

from typing import NamedTuple

import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.kernel_arrays import cdiv, differentiable, vary_alike
from biomamba_jax.ops.native.call import CHANNEL_RANGE, call, segments
from biomamba_jax.ops.selective_scan.inputs import FilledInputs, Gradients, Inputs


class Plan(NamedTuple):
    """Sizes of the loops."""

    chunk: int = 32
    """Tokens between two kept states."""
    range: int = CHANNEL_RANGE
    """Channels that a thread handles at a time."""


_PLAN = Plan()


def selective_scan(inputs: Inputs, plan: Plan = _PLAN) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """Return all outputs and the final state; see `api.selective_scan`."""
    return _scan(vary_alike(inputs.with_zeros()), plan)


def _arguments(inputs: FilledInputs) -> tuple[Array | None, ...]:
    return (*inputs[:8], segments(inputs.segment_ids))


def _run(inputs: FilledInputs, plan: Plan, save: bool):
    rows, length, channels = inputs.x.shape
    states = inputs.A.shape[1]
    starts = (rows, cdiv(length, plan.chunk), states, channels) if save else (0,)
    shapes = [inputs.x.shape, inputs.initial_state.shape, starts]
    arguments = (*_arguments(inputs), inputs.initial_state)
    y, last, kept = call("selective_scan_forward", shapes, arguments, **plan._asdict())
    return (y.astype(inputs.x.dtype), last), kept


def _backward(inputs: FilledInputs, starts: Array, cotangents, plan: Plan) -> FilledInputs:
    rows, length, channels = inputs.x.shape
    states = inputs.A.shape[1]
    tokens, per_row = inputs.x.shape, (rows, channels)
    results = {
        "x": tokens,
        "dt": tokens,
        "A": (rows, channels, states),
        "B": (rows, cdiv(channels, plan.range), length, states),
        "C": (rows, cdiv(channels, plan.range), length, states),
        "D": per_row,
        "z": (0,) if inputs.z is None else tokens,
        "dt_bias": per_row,
        "initial": (rows, channels, states),
    }
    arguments = (*_arguments(inputs), starts, *cotangents)
    arrays = call("selective_scan_backward", list(results.values()), arguments, **plan._asdict())
    g = Gradients(**dict(zip(results, arrays, strict=True)))
    return inputs.crop(g._replace(B=jnp.sum(g.B, 1), C=jnp.sum(g.C, 1), z=None if inputs.z is None else g.z))


_scan = differentiable(_run, _backward)
