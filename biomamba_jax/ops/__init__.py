"""The compute-heavy ops, one folder each: a public function, a plain-loop reference and its fast implementations."""

from biomamba_jax.ops.causal_conv1d import causal_conv1d
from biomamba_jax.ops.cross_entropy import linear_cross_entropy
from biomamba_jax.ops.mixed_matmul import mixed_matmul
from biomamba_jax.ops.rms_norm import rms_norm
from biomamba_jax.ops.rotary import rotary_embedding
from biomamba_jax.ops.selective_scan import selective_scan
from biomamba_jax.ops.ssd import ssd

__all__ = [
    "causal_conv1d",
    "linear_cross_entropy",
    "mixed_matmul",
    "rms_norm",
    "rotary_embedding",
    "selective_scan",
    "ssd",
]
