"""The causal convolution on the CPU by compiled C++ (`ops/native/causal_conv1d.cc`), with its own backward pass.

Each pass reads and writes its arrays once, activation included; no shifted copy of the inputs exists.
"""

import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.causal_conv1d.inputs import Inputs
from biomamba_jax.ops.causal_conv1d.xla import last_inputs
from biomamba_jax.ops.kernel_arrays import differentiable, vary_alike
from biomamba_jax.ops.native.call import CHANNEL_RANGE, call, segments


def causal_conv1d(inputs: Inputs, activation: str | None) -> tuple[Float[Array, "B L C"], Float[Array, "B past C"]]:
    """Return all outputs and the last K-1 inputs; see `api.causal_conv1d`."""
    return _conv(vary_alike(inputs), activation)


def _arguments(inputs: Inputs) -> tuple[Array | None, ...]:
    rows, _, channels = inputs.x.shape
    bias, initial = inputs.bias, inputs.initial_state
    if bias is None:
        bias = jnp.zeros(channels)
    if initial is None:
        initial = jnp.zeros((rows, inputs.weight.shape[1] - 1, channels))
    return inputs.x, inputs.weight, bias, segments(inputs.segment_ids), initial


def _run(inputs: Inputs, activation: str | None, save: bool):
    x = inputs.x
    attributes = {"silu": activation == "silu", "range": CHANNEL_RANGE}
    (y,) = call("causal_conv1d_forward", [x.shape], _arguments(inputs), **attributes)
    last = last_inputs(x, inputs.weight.shape[1] - 1, inputs.segment_ids, inputs.initial_state)
    return (y.astype(x.dtype), last), None


def _backward(inputs: Inputs, residuals: None, cotangents, activation: str | None) -> Inputs:
    x, weight = inputs.x, inputs.weight
    rows, _, channels = x.shape
    shapes = [x.shape, (rows, *weight.shape), (rows, channels), (rows, weight.shape[1] - 1, channels)]
    attributes = {"silu": activation == "silu", "range": CHANNEL_RANGE}
    arguments = (*_arguments(inputs), *cotangents)
    dx, d_weight, d_bias, d_initial = call("causal_conv1d_backward", shapes, arguments, **attributes)
    bias, initial = inputs.bias, inputs.initial_state
    return Inputs(
        x=dx.astype(x.dtype),
        weight=jnp.sum(d_weight, 0).astype(weight.dtype),
        bias=None if bias is None else jnp.sum(d_bias, 0).astype(bias.dtype),
        segment_ids=None,
        initial_state=None if initial is None else d_initial.astype(initial.dtype),
    )


_conv = differentiable(_run, _backward)
