"""The arrays of one `ssd` call, as `api.ssd` passes them to an implementation."""

from typing import NamedTuple

from biomamba_jax.ops.array_typing import Array, Float, Int


class Inputs(NamedTuple):
    """Arguments of `api.ssd`; None where the caller gave none."""

    x: Float[Array, "B L H P"]
    dt: Float[Array, "B L H"] | None
    A: Float[Array, " H"] | Float[Array, "B L H"]
    B: Float[Array, "B L G N"]
    C: Float[Array, "B L G N"]
    D: Float[Array, " H"] | None = None
    dt_bias: Float[Array, " H"] | None = None
    segment_ids: Int[Array, "B L"] | None = None
    initial_state: Float[Array, "B H P N"] | None = None
