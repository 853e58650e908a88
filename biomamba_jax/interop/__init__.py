"""Weights in and out: Hugging Face, mamba_ssm and native, each read and written by one function."""

from biomamba_jax.interop.weights import Dialect, Weights, dialect_of, read_model, write_model

__all__ = ["Dialect", "Weights", "dialect_of", "read_model", "write_model"]
