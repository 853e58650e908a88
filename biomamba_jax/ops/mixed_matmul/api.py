"""The public function `mixed_matmul`: argument checks and dispatch to an implementation."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.kernel_arrays import check_shapes, float64_reason
from biomamba_jax.ops.mixed_matmul import native, reference, xla

_IMPLEMENTATIONS: Mapping[str, Callable[[Array, Array, Array | None], Array]] = {
    "xla": xla.mixed_matmul,
    "native": native.mixed_matmul,
    "reference": reference.mixed_matmul,
}
_MAX_NATIVE_ROWS = 16
"""XLA's products of more rows are as fast: native ones took half of its CPU time for 8 rows, all of it for 32."""


def mixed_matmul(
    x: Float[Array, "*batch C"],
    weight: Array,
    scale: Float[Array, " F"] | None = None,
    *,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "*batch F"]:
    """Compute x weight^T * scale with float32 accumulation, whatever the dtype of the weights. Not for training.

    Args:
      x: activations [..., C], any float dtype.
      weight: [F C], int8 or any float dtype.
      scale: factor of each output [F], as `quantize` returns it; None is 1.
      implementation: "xla", "native" (CPU), "reference", or None for the platform's fastest.

    Returns:
      [..., F] in float32 (float64 for float64 x).

    Raises:
      UserError: shapes do not match, or the implementation does not exist or cannot run here.
    """
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
        raise UserError(f"mixed_matmul: x must be [..., C] and weight [F C], not {x.shape} and {weight.shape}")
    check_shapes("mixed_matmul", {"scale": scale}, scale=weight.shape[:1])
    known = (jnp.float32, jnp.bfloat16, jnp.int8)
    of_weight = None if weight.dtype in known else f"its weights are float32, bfloat16 or int8, not {weight.dtype}"
    unsupported = {"native": lambda: float64_reason(x) or of_weight}
    prefer: dispatch.Implementation | None = "xla" if x.size > _MAX_NATIVE_ROWS * x.shape[-1] else None
    matmul = dispatch.choose("mixed_matmul", implementation, _IMPLEMENTATIONS, unsupported, prefer=prefer)
    return matmul(x, weight, scale)
