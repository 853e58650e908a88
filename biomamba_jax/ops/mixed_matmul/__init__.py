"""Products with float32, bfloat16 or int8 weights, for inference."""

from biomamba_jax.ops.mixed_matmul.api import mixed_matmul
from biomamba_jax.ops.mixed_matmul.quantization import quantize

__all__ = ["mixed_matmul", "quantize"]
