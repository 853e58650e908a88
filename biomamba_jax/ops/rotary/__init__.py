"""The data-dependent rotary embedding of Mamba-3."""

from biomamba_jax.ops.rotary.api import rotary_embedding

__all__ = ["rotary_embedding"]
