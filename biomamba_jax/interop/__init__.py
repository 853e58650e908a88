"""Import and export of weights: Hugging Face, mamba_ssm and native, by one reader and one writer."""

from biomamba_jax.interop.models import Dialect, dialect_of, read_model, write_model
from biomamba_jax.interop.weights import Weights

__all__ = ["Dialect", "Weights", "dialect_of", "read_model", "write_model"]
