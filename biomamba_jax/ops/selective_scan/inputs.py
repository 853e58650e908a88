"""The arrays of one selective scan, as `api.selective_scan` hands them to an implementation and gets gradients back."""

from typing import NamedTuple

import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float, Int


class Inputs(NamedTuple):
    """See `api.selective_scan`; None where the caller gave none."""

    x: Float[Array, "B L E"]
    dt: Float[Array, "B L E"]
    A: Float[Array, "E N"]
    B: Float[Array, "B L N"]
    C: Float[Array, "B L N"]
    D: Float[Array, " E"] | None = None
    z: Float[Array, "B L E"] | None = None
    dt_bias: Float[Array, " E"] | None = None
    segment_ids: Int[Array, "B L"] | None = None
    initial_state: Float[Array, "B E N"] | None = None

    def with_zeros(self) -> "FilledInputs":
        """With zeros for the parameters and the state that are None; a gate and segments stay optional."""
        rows, _, channels = self.x.shape
        zeros = jnp.zeros(channels, jnp.float32)
        state = self.initial_state
        return FilledInputs(
            self.x,
            self.dt,
            self.A,
            self.B,
            self.C,
            zeros if self.D is None else self.D,
            self.z,
            zeros if self.dt_bias is None else self.dt_bias,
            self.segment_ids,
            jnp.zeros((rows, *self.A.shape), jnp.float32) if state is None else state,
        )


class FilledInputs(NamedTuple):
    """What the kernels read: only the gate and the segments may be missing."""

    x: Float[Array, "B L E"]
    dt: Float[Array, "B L E"]
    A: Float[Array, "E N"]
    B: Float[Array, "B L N"]
    C: Float[Array, "B L N"]
    D: Float[Array, " E"]
    z: Float[Array, "B L E"] | None
    dt_bias: Float[Array, " E"]
    segment_ids: Int[Array, "B L"] | None
    initial_state: Float[Array, "B E N"]
