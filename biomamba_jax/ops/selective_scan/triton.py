"""The selective scan on NVIDIA GPUs from Ampere on: two Triton kernels, their sizes, and the rule that joins them.

The forward pass keeps the state before every chunk; the backward pass takes all else from the inputs.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from biomamba_jax.ops import triton_calls
from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.kernel_arrays import cdiv, next_power_of_2, vary_alike
from biomamba_jax.ops.numerics import segment_starts
from biomamba_jax.ops.selective_scan.inputs import FilledInputs, Inputs
from biomamba_jax.ops.triton_calls import Launch

_KERNELS = f"{__package__}.triton_kernels"
_LOG2_E = 1.4426950408889634


class Blocks(NamedTuple):
    """Sizes of a program: its channels, the time steps that are unrolled, and the neighbouring channels of a thread.

    With one, the thread has all of its states; with more, lanes share the states, and sums over channels take fewer
    exchanges.
    """

    channels: int
    steps: int
    vector: int
    launch: Launch


CHUNK = 32
"""Time steps between the states that are kept: 2 bytes a token and channel at d_state = 16."""

BLOCKS: Mapping[str, Mapping[int, Blocks]] = {
    "forward": {80: Blocks(channels=32, steps=4, vector=1, launch=Launch(1))},
    "backward": {80: Blocks(channels=32, steps=4, vector=4, launch=Launch(1))},
}
"""For each kernel and compute capability from the given one on, by static counts (`benchmark kernels --target sm_90`):
few instructions, no spills forward, and a warp with 32 channels, since a batch has few programs."""


def why_not(x: Array) -> str | None:
    """Why the kernels can't compute these arrays, if so."""
    return "it computes in float32, and x is float64" if x.dtype == jnp.float64 else None


def selective_scan(inputs: Inputs) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """All outputs and the last state; see `api.selective_scan`."""
    return _scan(vary_alike(inputs.with_zeros()))


@jax.custom_vjp
def _scan(inputs: FilledInputs) -> tuple[Array, Array]:
    return _run(inputs, save=False)[0]


def _forward(inputs: FilledInputs):
    outputs, boundary = _run(inputs, save=True)
    return outputs, (inputs, boundary)


def _run(inputs: FilledInputs, save: bool) -> tuple[tuple[Array, Array], Array]:
    rows, length, channels = inputs.x.shape
    d_state = inputs.A.shape[1]
    sizes = triton_calls.for_device(BLOCKS["forward"])
    y, final, boundary = triton_calls.call(
        triton_calls.kernels(_KERNELS).selective_scan_forward,
        *_kernel_inputs(inputs),
        _channels_last(inputs.initial_state),
        length,
        channels // _vector_width(sizes, channels),
        outputs=[
            jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype),
            jax.ShapeDtypeStruct((rows, d_state, channels), jnp.float32),
            jax.ShapeDtypeStruct((rows, cdiv(length, CHUNK) if save else 1, d_state, channels), jnp.float32),
        ],
        grid=(cdiv(channels, sizes.channels), rows),
        launch=sizes.launch,
        constants=_constants(sizes, inputs) | {"SAVE": save},
    )
    return (y, final.swapaxes(1, 2)), boundary


def _backward(residuals, cotangents):
    inputs, boundary = residuals
    dy, d_final = cotangents
    rows, length, channels = inputs.x.shape
    d_state = inputs.A.shape[1]
    sizes = triton_calls.for_device(BLOCKS["backward"])
    f32 = jnp.float32
    programs = cdiv(channels, sizes.channels)
    gated = inputs.z is not None
    narrow = jax.ShapeDtypeStruct((rows, programs, length, d_state), f32)
    state = jax.ShapeDtypeStruct((rows, d_state, channels), f32)
    vector = jax.ShapeDtypeStruct((rows, channels), f32)
    unused = jax.ShapeDtypeStruct((1,), inputs.x.dtype)
    dx, d_dt, dz, dB, dC, dA, dD, d_bias, d_initial, _ = triton_calls.call(
        triton_calls.kernels(_KERNELS).selective_scan_backward,
        *_kernel_inputs(inputs),
        boundary,
        dy.astype(inputs.x.dtype),
        _channels_last(d_final),
        length,
        channels // _vector_width(sizes, channels),
        outputs=[
            jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype),
            jax.ShapeDtypeStruct(inputs.dt.shape, inputs.dt.dtype),
            unused if inputs.z is None else jax.ShapeDtypeStruct(inputs.z.shape, inputs.z.dtype),
            narrow,
            narrow,
            state,
            vector,
            vector,
            state,
            jax.ShapeDtypeStruct((rows, CHUNK // sizes.steps, d_state, channels), f32),
        ],
        grid=(programs, rows),
        launch=sizes.launch,
        constants=_constants(sizes, inputs),
    )
    return (
        FilledInputs(
            x=dx,
            dt=d_dt,
            A=jnp.sum(dA, 0).T.astype(inputs.A.dtype),
            B=jnp.sum(dB, 1).astype(inputs.B.dtype),
            C=jnp.sum(dC, 1).astype(inputs.C.dtype),
            D=jnp.sum(dD, 0).astype(inputs.D.dtype),
            z=dz if gated else None,
            dt_bias=jnp.sum(d_bias, 0).astype(inputs.dt_bias.dtype),
            segment_ids=None,
            initial_state=d_initial.swapaxes(1, 2).astype(inputs.initial_state.dtype),
        ),
    )


_scan.defvjp(_forward, _backward)


def _vector_width(sizes: Blocks, channels: int) -> int:
    """How many neighbouring channels a thread has: what divides them all."""
    return math.gcd(sizes.vector, channels)


def _constants(sizes: Blocks, inputs: FilledInputs) -> dict[str, int | bool]:
    """The values that both kernels are compiled for."""
    channels, d_state = inputs.A.shape
    return {
        "N": d_state,
        "BN": next_power_of_2(d_state),
        "BE": sizes.channels,
        "VECTOR": _vector_width(sizes, channels),
        "U": sizes.steps,
        "CHUNK": CHUNK,
        "GATED": inputs.z is not None,
        "SEGMENTED": inputs.segment_ids is not None,
    }


def _kernel_inputs(inputs: FilledInputs) -> tuple[Array, ...]:
    """What both kernels take first; x stands in for what there is none of."""
    A, D, dt_bias = (v.astype(jnp.float32) for v in (inputs.A, inputs.D, inputs.dt_bias))
    x, ids = inputs.x, inputs.segment_ids
    reset = x
    if ids is not None:
        reset = jnp.where(segment_starts(ids), -jnp.inf, 0.0).astype(jnp.float32)
    z = x if inputs.z is None else inputs.z
    return x, inputs.dt, z, inputs.B, inputs.C, (A * _LOG2_E).T, D, dt_bias, reset


def _channels_last(state: Float[Array, "B E N"]) -> Float[Array, "B N E"]:
    return state.astype(jnp.float32).swapaxes(1, 2)
