"""The arrays of one causal convolution, as `api.causal_conv1d` passes them and as their cotangents are returned."""

from typing import NamedTuple

from biomamba_jax.ops.array_typing import Array, Float, Int


class Inputs(NamedTuple):
    """Arguments of `api.causal_conv1d`; None where the caller gave none."""

    x: Float[Array, "B L C"]
    weight: Float[Array, "C K"]
    bias: Float[Array, " C"] | None = None
    segment_ids: Int[Array, "B L"] | None = None
    initial_state: Float[Array, "B past C"] | None = None
