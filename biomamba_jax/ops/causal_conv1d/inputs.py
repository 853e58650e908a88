"""The arrays of one causal convolution, as `api.causal_conv1d` hands them over and gets gradients back."""

from typing import NamedTuple

from biomamba_jax.ops.array_typing import Array, Float, Int


class Inputs(NamedTuple):
    """See `api.causal_conv1d`; None where the caller gave none."""

    x: Float[Array, "B L C"]
    weight: Float[Array, "C K"]
    bias: Float[Array, " C"] | None = None
    segment_ids: Int[Array, "B L"] | None = None
    initial_state: Float[Array, "B K-1 C"] | None = None
