"""What the kernels of every op and platform do to their arrays on the way in: padding, sizes, and mesh axes."""

from typing import Any

import jax
import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array


def pad(v: Array, shape: tuple[int, ...], fill: float = 0) -> Array:
    """v, filled up at the end of each axis to `shape`."""
    if v.shape == shape:
        return v
    return jnp.pad(v, [(0, want - have) for have, want in zip(v.shape, shape, strict=True)], constant_values=fill)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def varying_axes(arrays: Any) -> frozenset[str]:
    """Inside `shard_map`: the mesh axes over which any array of a tree varies; other leaves are passed over."""
    leaves = [v for v in jax.tree.leaves(arrays) if hasattr(v, "dtype")]
    return frozenset[str]().union(*(jax.typeof(v).manual_axis_type.varying for v in leaves))


def vary_over(v: Array, axes: frozenset[str]) -> Array:
    """v, varying over at least these mesh axes."""
    missing = tuple(axes - jax.typeof(v).manual_axis_type.varying)
    return jax.lax.pcast(v, missing, to="varying") if missing else v


def vary_alike(arrays: Any) -> Any:
    """Inside `shard_map`: all arrays of a tree varying over all the mesh axes that any of them varies over.

    A kernel wants it so, and the transpose of this step adds up the gradient of what was the same on all devices.
    """
    axes = varying_axes(arrays)
    return jax.tree.map(lambda v: vary_over(v, axes), arrays)
