"""BioMamba in JAX: Mamba-1 and Mamba-2 language models for biomedical text, on CPU, GPU and TPU."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biomamba_jax.tasks.model import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Only when it is asked for: workers that read data import this package, and need none of jax.
    if name == "load":
        from biomamba_jax.tasks.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
