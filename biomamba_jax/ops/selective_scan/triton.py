"""The selective scan on NVIDIA GPUs from Ampere on: sizes of the two Triton kernels, and their custom_vjp.

The only residual besides the inputs is the state before every chunk.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from biomamba_jax.ops import triton_calls
from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.kernel_arrays import (
    LOG2_E,
    cdiv,
    differentiable,
    float32,
    next_power_of_2,
    struct_like,
    vary_alike,
)
from biomamba_jax.ops.numerics import segment_starts
from biomamba_jax.ops.selective_scan.inputs import FilledInputs, Gradients, Inputs
from biomamba_jax.ops.triton_calls import Launch

_KERNELS = f"{__package__}.triton_kernels"


class Blocks(NamedTuple):
    """Sizes of a program."""

    channels: int
    """Channels of a program."""
    steps: int
    """Unrolled time steps."""
    vector: int
    """Neighbouring channels of a thread. With one, a thread has all states of its channel; with more, lanes share the
    states, and sums over channels take fewer shuffles."""
    launch: Launch
    """Warps and stages."""


class Sizes(NamedTuple):
    """Compile-time constants of a kernel."""

    N: int
    """States of a channel."""
    BN: int
    """N rounded up to a power of two."""
    BE: int
    """Channels of a program."""
    VECTOR: int
    """Neighbouring channels of a thread, a divisor of a row's channels."""
    U: int
    """Unrolled time steps."""
    CHUNK: int
    """Time steps between saved states."""
    GATED: bool
    """True if there is a gate z."""
    SEGMENTED: bool
    """True if there are segment ids."""
    SAVE: bool
    """True to save the states before each chunk, for the backward kernel."""


CHUNK = 32
"""Time steps between saved states: 2 bytes per token and channel at d_state = 16."""

BLOCKS: Mapping[str, Blocks] = {
    "forward": Blocks(channels=32, steps=4, vector=1, launch=Launch(1)),
    "backward": Blocks(channels=32, steps=4, vector=4, launch=Launch(1)),
}
"""Chosen by static counts (`python -m benchmarks kernels --target sm_90`): few instructions, no spills forward, and a
warp for 32 channels, since a batch has few programs."""


def selective_scan(inputs: Inputs) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """Return all outputs and the final state; see `api.selective_scan`."""
    return _scan(vary_alike(inputs.with_zeros()), None)


def _run(inputs: FilledInputs, _: None, save: bool) -> tuple[tuple[Array, Array], Array]:
    rows, length, channels = inputs.x.shape
    blocks, sizes = BLOCKS["forward"], _sizes("forward", inputs, save)
    y, final, boundary = triton_calls.call(
        triton_calls.kernels(_KERNELS).selective_scan_forward,
        [*_kernel_inputs(inputs), _channels_last(inputs.initial_state), length, channels // sizes.VECTOR],
        outputs=[
            struct_like(inputs.x),
            float32(rows, sizes.N, channels),
            float32(rows, cdiv(length, CHUNK) if save else 1, sizes.N, channels),
        ],
        grid=(cdiv(channels, blocks.channels), rows),
        launch=blocks.launch,
        constants={"sizes": sizes},
    )
    return (y, final.swapaxes(1, 2)), boundary


def _backward(inputs: FilledInputs, boundary: Array, cotangents, static: None) -> FilledInputs:
    dy, d_final = cotangents
    rows, length, channels = inputs.x.shape
    blocks, sizes = BLOCKS["backward"], _sizes("backward", inputs)
    programs = cdiv(channels, blocks.channels)
    extent = length, channels // sizes.VECTOR
    d_per_state = float32(rows, programs, length, sizes.N)
    state, vector = float32(rows, sizes.N, channels), float32(rows, channels)
    dz_like = jax.ShapeDtypeStruct((1,), inputs.x.dtype) if inputs.z is None else struct_like(inputs.z)
    saved = float32(rows, CHUNK // blocks.steps, sizes.N, channels)
    dx, d_dt, dz, dB, dC, dA, dD, d_bias, d_initial, _ = triton_calls.call(
        triton_calls.kernels(_KERNELS).selective_scan_backward,
        [*_kernel_inputs(inputs), boundary, dy.astype(inputs.x.dtype), _channels_last(d_final), *extent],
        outputs=[struct_like(inputs.x), struct_like(inputs.dt), dz_like, d_per_state, d_per_state]
        + [state, vector, vector, state, saved],
        grid=(programs, rows),
        launch=blocks.launch,
        constants={"sizes": sizes},
    )
    dA, d_initial = dA.swapaxes(1, 2), d_initial.swapaxes(1, 2)
    given_dz = None if inputs.z is None else dz
    return inputs.crop(Gradients(dx, d_dt, given_dz, jnp.sum(dB, 1), jnp.sum(dC, 1), dA, dD, d_bias, d_initial))


_scan = differentiable(_run, _backward)


def _sizes(direction: str, inputs: FilledInputs, save: bool = False) -> Sizes:
    blocks, (channels, d_state) = BLOCKS[direction], inputs.A.shape
    return Sizes(
        N=d_state,
        BN=next_power_of_2(d_state),
        BE=blocks.channels,
        VECTOR=math.gcd(blocks.vector, channels),
        U=blocks.steps,
        CHUNK=CHUNK,
        GATED=inputs.z is not None,
        SEGMENTED=inputs.segment_ids is not None,
        SAVE=save,
    )


def _kernel_inputs(inputs: FilledInputs) -> tuple[Array, ...]:
    """Return the first arguments of both kernels; x is the placeholder of a missing array."""
    A, D, dt_bias = (v.astype(jnp.float32) for v in (inputs.A, inputs.D, inputs.dt_bias))
    x, ids = inputs.x, inputs.segment_ids
    reset = x
    if ids is not None:
        reset = jnp.where(segment_starts(ids), -jnp.inf, 0.0).astype(jnp.float32)
    z = x if inputs.z is None else inputs.z
    return x, inputs.dt, z, inputs.B, inputs.C, (A * LOG2_E).T, D, dt_bias, reset


def _channels_last(state: Float[Array, "B E N"]) -> Float[Array, "B N E"]:
    return state.astype(jnp.float32).swapaxes(1, 2)
