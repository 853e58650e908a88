"""The arrays of one rotary embedding, as `api.rotary_embedding` passes them."""

from typing import NamedTuple

from biomamba_jax.ops.array_typing import Array, Float


class Inputs(NamedTuple):
    """Arguments of `api.rotary_embedding`."""

    B: Float[Array, "B L R G N"]
    C: Float[Array, "B L R G N"]
    B_bias: Float[Array, "R H N"]
    C_bias: Float[Array, "R H N"]
    angle: Float[Array, "B L H S"]
