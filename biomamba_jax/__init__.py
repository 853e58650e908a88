"""BioMamba in JAX: Mamba-1 and Mamba-2 language models for biomedical text, on CPU, GPU and TPU."""

__version__ = "0.1.0"
