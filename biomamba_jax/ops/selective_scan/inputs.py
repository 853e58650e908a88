"""The arrays of one selective scan, as `api.selective_scan` passes them and as their cotangents are returned."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.kernel_arrays import crop_like


class Inputs(NamedTuple):
    """Arguments of `api.selective_scan`; None where the caller gave none."""

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
        """Replace missing parameters and a missing state by zeros; the gate and the segments stay optional."""
        zeros = jnp.zeros(self.x.shape[2], jnp.float32)
        state = jnp.zeros((self.x.shape[0], *self.A.shape), jnp.float32)
        defaults = {"D": zeros, "dt_bias": zeros, "initial_state": state}
        return FilledInputs(**(self._asdict() | {k: v for k, v in defaults.items() if getattr(self, k) is None}))


class FilledInputs(NamedTuple):
    """Inputs of the kernels: only the gate and the segments may be missing."""

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

    def crop(self, cotangents: "FilledInputs") -> "FilledInputs":
        """Slice padded cotangents to the shapes of these inputs and cast them to their dtypes."""
        return jax.tree.map(crop_like, cotangents, self._replace(segment_ids=None))
