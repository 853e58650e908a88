"""The causal convolution on NVIDIA GPUs from Ampere on: one Triton kernel per direction, which reads its inputs once.

The backward pass recomputes the activation's inputs, K times per token, from the cache.
"""

from typing import NamedTuple

import jax.numpy as jnp

from biomamba_jax.ops import triton_calls
from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.causal_conv1d.inputs import Inputs
from biomamba_jax.ops.causal_conv1d.xla import last_inputs, reach
from biomamba_jax.ops.kernel_arrays import cdiv, differentiable, float32, next_power_of_2, struct_like, vary_alike
from biomamba_jax.ops.triton_calls import Launch

_KERNELS = f"{__package__}.triton_kernels"
_CHANNELS = 128  # of a program
_TOKENS = {"forward": 32, "backward": 16}  # of a program; the most that do not spill
_LAUNCH = Launch(4)


class Sizes(NamedTuple):
    """Compile-time constants of the kernels."""

    C: int
    """Channels of a row."""
    K: int
    """Width of the convolution."""
    T: int
    """Tokens of a program."""
    BC: int
    """Channels of a program."""
    SILU: bool
    """True if the activation is SiLU."""
    SEGMENTED: bool
    """True if there are segment ids."""
    INITIAL: bool
    """True if there are inputs before the first token."""


def causal_conv1d(inputs: Inputs, activation: str | None) -> tuple[Float[Array, "B L C"], Float[Array, "B past C"]]:
    """Return all outputs and the last K-1 inputs; see `api.causal_conv1d`."""
    inputs = vary_alike(inputs)
    last = last_inputs(inputs.x, inputs.weight.shape[1] - 1, inputs.segment_ids, inputs.initial_state)
    return _conv(inputs, activation), last


def _run(inputs: Inputs, activation: str | None, save: bool) -> tuple[Array, None]:
    """Return the outputs; the residuals are the inputs alone."""
    (y,) = triton_calls.call(
        triton_calls.kernels(_KERNELS).causal_conv1d_forward,
        (*_kernel_inputs(inputs), inputs.x.shape[1]),
        outputs=[struct_like(inputs.x)],
        grid=_grid(inputs, _TOKENS["forward"]),
        launch=_LAUNCH,
        constants={"sizes": _sizes(inputs, activation, _TOKENS["forward"])},
    )
    return y, None


def _backward(inputs: Inputs, residuals: None, dy: Array, activation: str | None) -> Inputs:
    x, weight, bias, initial_state = inputs.x, inputs.weight, inputs.bias, inputs.initial_state
    rows, _, channels = x.shape
    width = weight.shape[1]
    tokens = _TOKENS["backward"]
    grid = _grid(inputs, tokens)
    dx, d_weight, d_initial = triton_calls.call(
        triton_calls.kernels(_KERNELS).causal_conv1d_backward,
        (*_kernel_inputs(inputs), dy, x.shape[1]),
        outputs=[
            struct_like(x),
            float32(rows, grid[0], width + 1, channels),
            float32(1) if initial_state is None else float32(*initial_state.shape),
        ],
        grid=grid,
        launch=_LAUNCH,
        constants={"sizes": _sizes(inputs, activation, tokens), "BEFORE": next_power_of_2(width)},
    )
    sums = jnp.sum(d_weight, (0, 1))
    return Inputs(
        x=dx,
        weight=sums[:width].T.astype(weight.dtype),
        bias=None if bias is None else sums[width].astype(bias.dtype),
        segment_ids=None,
        initial_state=None if initial_state is None else d_initial.astype(initial_state.dtype),
    )


_conv = differentiable(_run, _backward)


def _grid(inputs: Inputs, tokens: int) -> tuple[int, int, int]:
    """Return the grid, token blocks first: CUDA limits the other two axes to 65,535 programs."""
    rows, length, channels = inputs.x.shape
    return cdiv(length, tokens), cdiv(channels, _CHANNELS), rows


def _sizes(inputs: Inputs, activation: str | None, tokens: int) -> Sizes:
    channels, width = inputs.weight.shape
    initial = inputs.initial_state is not None and width > 1
    return Sizes(channels, width, tokens, _CHANNELS, activation == "silu", inputs.segment_ids is not None, initial)


def _kernel_inputs(inputs: Inputs) -> tuple[Array, ...]:
    """Return the first arguments of both kernels; x is the placeholder of a missing array."""
    x, weight, bias, segment_ids, initial_state = inputs
    bias = jnp.zeros(x.shape[2]) if bias is None else bias
    past = weight.shape[1] - 1
    within = reach(segment_ids, past)
    return (
        x,
        weight.T.astype(jnp.float32),
        bias.astype(jnp.float32),
        x if initial_state is None or not past else initial_state,
        x if within is None else within,
    )
