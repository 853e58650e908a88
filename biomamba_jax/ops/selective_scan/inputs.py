"""The arrays of one selective scan, as `api.selective_scan` passes them and as their cotangents are returned."""

from typing import Any, NamedTuple

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

    def crop(self, g: "Gradients") -> "FilledInputs":
        """Return the cotangents of these inputs: padded gradients sliced to their shapes and cast to their dtypes."""
        A, D, dt_bias = (jnp.sum(v, axis=0) for v in (g.A, g.D, g.dt_bias))
        padded = FilledInputs(g.x, g.dt, A, g.B, g.C, D.reshape(-1), g.z, dt_bias.reshape(-1), None, g.initial)
        return jax.tree.map(crop_like, padded, self._replace(segment_ids=None))


class Gradients(NamedTuple):
    """Outputs of a backward kernel, in its layouts; those of parameters are per row of the batch."""

    x: Any
    """[B L E]."""
    dt: Any
    """[B L E]."""
    z: Any
    """[B L E], or None without a gate."""
    B: Any
    """float32; TPU: [B L N]. GPU: [B tiles L Q 4], to be summed over tiles."""
    C: Any
    """Like B."""
    A: Any
    """float32; TPU: [B tiles N tile]. GPU: [B E Q 4]."""
    D: Any
    """float32; TPU: [B tiles 1 tile]. GPU: [B E]."""
    dt_bias: Any
    """Like D."""
    initial: Any
    """Like A. On TPU it carries the cotangent of the state from chunk to chunk."""
