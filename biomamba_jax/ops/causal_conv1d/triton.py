"""The causal convolution on NVIDIA GPUs from Ampere on: a Triton kernel in each direction, which reads its inputs once.

The inputs of the activation are computed again in the backward pass, where they are needed K times a token, from cache.
"""

from functools import partial

import jax
import jax.numpy as jnp

from biomamba_jax.ops import triton_calls
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.causal_conv1d.inputs import Inputs
from biomamba_jax.ops.causal_conv1d.xla import last_inputs
from biomamba_jax.ops.kernel_arrays import cdiv, next_power_of_2, vary_alike
from biomamba_jax.ops.numerics import segment_starts
from biomamba_jax.ops.triton_calls import Launch

_KERNELS = f"{__package__}.triton_kernels"
_CHANNELS = 128  # of a program
_TOKENS = {"forward": 32, "backward": 16}  # so many that nothing spills
_LAUNCH = Launch(4)


def why_not(x: Array) -> str | None:
    """Why the kernels can't compute these arrays, if so."""
    return "it computes in float32, and x is float64" if x.dtype == jnp.float64 else None


def causal_conv1d(inputs: Inputs, activation: str | None) -> tuple[Float[Array, "B L C"], Float[Array, "B K-1 C"]]:
    """All outputs and the last K-1 inputs; see `api.causal_conv1d`."""
    inputs = vary_alike(inputs)
    last = last_inputs(inputs.x, inputs.weight.shape[1] - 1, inputs.segment_ids, inputs.initial_state)
    return _conv(inputs, activation), last


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _conv(inputs: Inputs, activation: str | None) -> Array:
    (y,) = triton_calls.call(
        triton_calls.kernels(_KERNELS).causal_conv1d_forward,
        *_kernel_inputs(inputs),
        inputs.x.shape[1],
        outputs=[jax.ShapeDtypeStruct(inputs.x.shape, inputs.x.dtype)],
        grid=_grid(inputs, _TOKENS["forward"]),
        launch=_LAUNCH,
        constants=_constants(inputs, activation, _TOKENS["forward"]),
    )
    return y


def _forward(inputs: Inputs, activation: str | None):
    return _conv(inputs, activation), inputs


def _backward(activation: str | None, inputs: Inputs, dy: Array):
    x, weight, bias, _, initial_state = inputs
    rows, _, channels = x.shape
    width = weight.shape[1]
    f32 = jnp.float32
    tokens = _TOKENS["backward"]
    grid = _grid(inputs, tokens)
    dx, d_weight, d_initial = triton_calls.call(
        triton_calls.kernels(_KERNELS).causal_conv1d_backward,
        *_kernel_inputs(inputs),
        dy,
        x.shape[1],
        outputs=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((rows, grid[0], width + 1, channels), f32),
            jax.ShapeDtypeStruct((1,) if initial_state is None else initial_state.shape, f32),
        ],
        grid=grid,
        launch=_LAUNCH,
        constants=_constants(inputs, activation, tokens) | {"BEFORE": next_power_of_2(width)},
    )
    sums = jnp.sum(d_weight, (0, 1))
    return (
        Inputs(
            x=dx,
            weight=sums[:width].T.astype(weight.dtype),
            bias=None if bias is None else sums[width].astype(bias.dtype),
            segment_ids=None,
            initial_state=None if initial_state is None else d_initial.astype(initial_state.dtype),
        ),
    )


_conv.defvjp(_forward, _backward)


def _grid(inputs: Inputs, tokens: int) -> tuple[int, int, int]:
    """Tokens come first: of the other two axes CUDA takes 65,535 programs at most."""
    rows, length, channels = inputs.x.shape
    return cdiv(length, tokens), cdiv(channels, _CHANNELS), rows


def _constants(inputs: Inputs, activation: str | None, tokens: int) -> dict[str, int | bool]:
    channels, width = inputs.weight.shape
    return {
        "C": channels,
        "K": width,
        "T": tokens,
        "BC": _CHANNELS,
        "SILU": activation == "silu",
        "SEGMENTED": inputs.segment_ids is not None,
        "INITIAL": inputs.initial_state is not None and width > 1,
    }


def _kernel_inputs(inputs: Inputs) -> tuple[Array, ...]:
    """What both kernels take first; x stands in for what there is none of."""
    x, weight, bias, ids, initial_state = inputs
    bias = jnp.zeros(x.shape[2]) if bias is None else bias
    past = weight.shape[1] - 1
    return (
        x,
        weight.T.astype(jnp.float32),
        bias.astype(jnp.float32),
        x if initial_state is None or not past else initial_state,
        x if ids is None else _reach(ids, past),
    )


def _reach(segment_ids: Int[Array, "B L"], past: int) -> Int[Array, "B L"]:
    """How many steps back each token may look, `past` at most; what comes before the first is of its segment."""
    token = jnp.arange(segment_ids.shape[1])
    start = jax.lax.cummax(jnp.where(segment_starts(segment_ids), token, -past), axis=1)
    return jnp.minimum(token - start, past).astype(jnp.int32)
