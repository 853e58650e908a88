"""State-space duality: the recurrence of Mamba-2."""

from biomamba_jax.ops.ssd.api import ssd

__all__ = ["ssd"]
