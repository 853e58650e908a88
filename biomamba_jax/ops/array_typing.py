"""Legend of the axis names in the shape annotations of `ops` and `model`.

B  batch (rows)                     H  heads of Mamba-2 and Mamba-3 (d_inner / headdim)
L  length (time steps)              P  headdim, channels of a head
D  d_model                          G  groups of heads that share B and C
E  d_inner = expand * d_model       S  rotating pairs of a head of Mamba-3
N  d_state                          C  channels of the causal convolution
R  dt_rank (Mamba-1), or mimo_rank  K  d_conv, width of the convolution
   (Mamba-3)                        V  vocabulary, padded
T  tokens (B * L, flattened)        past  K - 1, inputs before a token that its output depends on
"""

from jax import Array
from jaxtyping import Bool, Float, Int, UInt

__all__ = ["Array", "Bool", "Float", "Int", "UInt"]
