"""The short causal convolution in front of every state space model."""

from biomamba_jax.ops.causal_conv1d.api import causal_conv1d

__all__ = ["causal_conv1d"]
