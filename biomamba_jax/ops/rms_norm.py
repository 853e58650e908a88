"""RMSNorm, plain and gated, with its own backward pass."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.kernel_arrays import differentiable
from biomamba_jax.ops.numerics import accumulator_dtype, sum_leading


def rms_norm(
    x: Float[Array, "*batch C"],
    weight: Float[Array, " C"],
    gate: Float[Array, "*batch C"] | None = None,
    *,
    eps: float = 1e-5,
    groups: int = 1,
    axis: str | None = None,
    peers: tuple[tuple[int, ...], ...] | None = None,
) -> Float[Array, "*batch C"]:
    """Normalize the last axis: u * rsqrt(mean(u^2) + eps) * weight, with u = x, or x * silu(gate).

    Statistics and the gradient of the weight are computed in float32 (float64 for float64 x).

    Source: Zhang and Sennrich 2019 (arXiv 1910.07467); the gated form, with statistics per group of channels: Dao and
    Gu 2024 (arXiv 2405.21060), `RMSNormGated` of the authors' code (github.com/state-spaces/mamba).

    Args:
      x: input [... C], any float dtype.
      weight: scale of each channel [C].
      gate: [... C], or None for no gate.
      eps: added to the mean square.
      groups: number of equal groups of channels, each with its own mean; 1 if the channels are sharded.
      axis: mesh axis that the channels are sharded over: the mean is over all devices' channels.
      peers: with axis, groups of its device indices of equal size: the mean is over each group's channels.

    Returns:
      An array of x's shape in float32 (float64 for float64 x), which the caller casts to its compute dtype.
    """
    return _rms_norm((x, weight, gate), _Means(eps, groups, axis, peers))


class _Means(NamedTuple):
    """The channels that a mean is over, and what is added to it."""

    eps: float
    groups: int
    axis: str | None
    peers: tuple[tuple[int, ...], ...] | None


def _gated(x: Array, gate: Array | None) -> Array:
    u = x.astype(accumulator_dtype(x.dtype))
    return u if gate is None else u * jax.nn.silu(gate.astype(u.dtype))


def _mean(x: Array, means: _Means) -> Array:
    """Return the mean of each group of channels, broadcast to them."""
    groups = means.groups
    if groups == 1:
        mean = jnp.mean(x, axis=-1, keepdims=True)
        return jax.lax.pmean(mean, means.axis, axis_index_groups=means.peers) if means.axis else mean
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    return jnp.broadcast_to(jnp.mean(grouped, axis=-1, keepdims=True), grouped.shape).reshape(x.shape)


def _run(inputs: tuple[Array, Array, Array | None], means: _Means, save: bool) -> tuple[Array, None]:
    """Return the outputs; the residuals are the inputs alone."""
    x, weight, gate = inputs
    u = _gated(x, gate)
    return u * jax.lax.rsqrt(_mean(u * u, means) + means.eps) * weight, None


def _backward(inputs: tuple[Array, Array, Array | None], residuals: None, dy: Array, means: _Means):
    x, weight, gate = inputs
    u = _gated(x, gate)
    scale = jax.lax.rsqrt(_mean(u * u, means) + means.eps)
    normed = u * scale
    d_normed = dy * weight
    du = scale * (d_normed - normed * _mean(d_normed * normed, means))
    d_weight = sum_leading(dy * normed).astype(weight.dtype)
    if gate is None:
        return du.astype(x.dtype), d_weight, None
    z = gate.astype(u.dtype)
    sigmoid = jax.nn.sigmoid(z)
    dx = du * z * sigmoid
    d_gate = du * x.astype(u.dtype) * sigmoid * (1 + z * (1 - sigmoid))
    return dx.astype(x.dtype), d_weight, d_gate.astype(gate.dtype)


_rms_norm = differentiable(_run, _backward)
