"""The legend of shape letters used in every signature of `ops` and `model`.

B  batch (rows)                     H  heads of Mamba-2 (d_inner / headdim)
L  length (time steps)              P  headdim, channels of one head
D  d_model                          G  groups that share B and C in Mamba-2
E  d_inner = expand * d_model       C  channels of the causal convolution
N  d_state                          K  d_conv, width of the convolution
R  dt_rank (Mamba-1)                V  vocabulary, padded
T  tokens (B * L, flattened)
"""

from jax import Array
from jaxtyping import Bool, Float, Int

__all__ = ["Array", "Bool", "Float", "Int"]
