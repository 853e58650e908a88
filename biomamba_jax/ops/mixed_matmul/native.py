"""The product on the CPU by compiled C++ (`ops/native/mixed_matmul.cc`), which reads each weight once, in its dtype."""

from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.native.call import call


def mixed_matmul(
    x: Float[Array, "*batch C"], weight: Array, scale: Float[Array, " F"] | None
) -> Float[Array, "*batch F"]:
    """Multiply a few rows; see `api.mixed_matmul`."""
    rows = x.reshape(-1, x.shape[-1])
    (y,) = call("mixed_matmul", [(rows.shape[0], weight.shape[0])], [rows, scale], weight)
    return y.reshape(*x.shape[:-1], -1)
