"""The selective scan of Mamba-1: a gated linear recurrence with input-dependent steps."""

from biomamba_jax.ops.selective_scan.api import selective_scan

__all__ = ["selective_scan"]
