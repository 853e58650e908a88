"""Import and export of weights: Hugging Face, mamba_ssm and native, by one reader and one writer."""

from biomamba_jax.interop.weights import Dialect, Weights, dialect_of, read_model, write_model

__all__ = ["Dialect", "Weights", "dialect_of", "read_model", "write_model"]
