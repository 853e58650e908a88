"""Helpers of all ops and kernels: shape checks, padding, block counts, output types, varying mesh axes, custom_vjp."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from biomamba_jax.errors import UserError
from biomamba_jax.ops.array_typing import Array

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


def check_shapes(op: str, arrays: Mapping[str, Any], **expected: tuple[int, ...]) -> None:
    """Raise UserError for the first array whose shape is not the expected one; arrays that are None pass."""
    for name, shape in expected.items():
        if arrays[name] is not None and arrays[name].shape != shape:
            raise UserError(f"{op}: {name} has shape {arrays[name].shape}, expected {shape}")


def float64_reason(x: Array, name: str = "x") -> str | None:
    """Return why kernels that compute in float32 cannot take x, called `name` in the message; None if they can."""
    return f"it computes in float32, and {name} is float64" if x.dtype == jnp.float64 else None


def pad(v: Array, shape: tuple[int, ...], fill: float = 0.0) -> Array:
    """Pad v at the end of each axis to `shape`."""
    if v.shape == shape:
        return v
    return jnp.pad(v, [(0, want - have) for have, want in zip(v.shape, shape, strict=True)], constant_values=fill)


def crop_like(v: Array, like: Array) -> Array:
    """Undo `pad`: slice v to the shape of `like` and cast it to its dtype."""
    return v[tuple(map(slice, like.shape))].astype(like.dtype)


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple that is at least `value`."""
    return -(-value // multiple) * multiple


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def largest_divisor(n: int, at_most: int) -> int:
    """Return the largest divisor of n that is at most `at_most`."""
    return max(k for k in range(1, at_most + 1) if n % k == 0)


def out_struct(shape: tuple[int, ...], dtype: DTypeLike, like: Array) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's output; inside `shard_map` it varies over the same mesh axes as `like`."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).manual_axis_type)


def varying_axes(arrays: Any) -> frozenset[str]:
    """Return the mesh axes over which any array of a tree varies inside `shard_map`; other leaves are ignored."""
    leaves = [v for v in jax.tree.leaves(arrays) if hasattr(v, "dtype")]
    return frozenset[str]().union(*(jax.typeof(v).manual_axis_type.varying for v in leaves))


def vary_over(v: Array, axes: frozenset[str]) -> Array:
    """Return v, cast to vary over at least these mesh axes."""
    missing = tuple(axes - jax.typeof(v).manual_axis_type.varying)
    return jax.lax.pcast(v, missing, to="varying") if missing else v


def vary_alike(arrays: Any) -> Any:
    """Cast all arrays of a tree to vary over every mesh axis that any of them varies over, inside `shard_map`.

    Kernels require it, and the transpose of the cast all-reduces the gradient of an array that was replicated.
    """
    axes = varying_axes(arrays)
    return jax.tree.map(lambda v: vary_over(v, axes), arrays)


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """Return the type of a float32 output of a kernel."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def struct_like(v: Array) -> jax.ShapeDtypeStruct:
    """Return the type of a kernel's output of v's shape and dtype."""
    return jax.ShapeDtypeStruct(v.shape, v.dtype)


def differentiable(
    run: Callable[[Any, Any, bool], tuple[Any, Any]], backward: Callable[[Any, Any, Any, Any], Any]
) -> Callable[[Any, Any], Any]:
    """Pair the forward and backward pass of an op as a `jax.custom_vjp`.

    Args:
      run: (inputs, static, save) -> (outputs, residuals); without `save`, residuals are not needed.
      backward: (inputs, residuals, cotangents, static) -> cotangents of inputs, a tree like inputs.

    Returns:
      (inputs, static) -> outputs, differentiable in inputs; static is hashable.
    """

    @partial(jax.custom_vjp, nondiff_argnums=(1,))
    def compute(inputs: Any, static: Any) -> Any:
        return run(inputs, static, False)[0]

    def forward(inputs: Any, static: Any) -> tuple[Any, Any]:
        outputs, residuals = run(inputs, static, True)
        return outputs, (inputs, residuals)

    def transpose(static: Any, residuals: tuple[Any, Any], cotangents: Any) -> tuple[Any]:
        return (backward(*residuals, cotangents, static),)

    compute.defvjp(forward, transpose)
    return compute
