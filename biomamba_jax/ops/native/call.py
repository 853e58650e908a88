"""Calls of the compiled functions from JAX programs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from biomamba_jax.errors import UserError
from biomamba_jax.ops.array_typing import Array, Int
from biomamba_jax.ops.kernel_arrays import vary_alike, vary_over, varying_axes
from biomamba_jax.ops.native import library

CHANNEL_RANGE = 64
"""Channels of a row that a thread handles at a time."""


def call(
    name: str,
    results: Sequence[tuple[int, ...]],
    arguments: Sequence[Array | None],
    weights: Array | None = None,
    /,
    **attributes: bool | int,
) -> Sequence[Array]:
    """Call a function of the library.

    Args:
      name: its name.
      results: shapes of its results, all float32.
      arguments: its arrays, cast to float32 unless they hold integers; None becomes an empty array: an absent input.
      weights: its last array, in its own dtype; None: there is none.
      attributes: its static arguments.

    Returns:
      The results; inside `shard_map` they vary over all mesh axes that any argument varies over.

    Raises:
      UserError: the library cannot be used here.
    """
    if reason := library.unavailable_reason():
        raise UserError(f"{name}: {reason}")
    arrays = vary_alike([*map(_argument, arguments), *([] if weights is None else [weights])])
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
    static = {k: v if isinstance(v, bool) else np.int64(v) for k, v in attributes.items()}
    outputs = jax.ffi.ffi_call(name, structs, vmap_method="sequential")(*arrays, **static)
    axes = varying_axes(arrays)
    return [vary_over(v, axes) for v in outputs]


def segments(segment_ids: Int[Array, "B L"] | None) -> Int[Array, "..."]:
    """Return the argument for optional segment ids."""
    return jnp.zeros(0, jnp.int32) if segment_ids is None else segment_ids


def _argument(v: Array | None) -> Array:
    if v is None:
        return jnp.zeros(0, jnp.float32)
    return v.astype(jnp.int32 if jnp.issubdtype(v.dtype, jnp.integer) else jnp.float32)
