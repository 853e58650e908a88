"""Mamba-1, Mamba-2 and Mamba-3 language models for biomedical text in JAX, on CPU, GPU and TPU."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from biomamba_jax.tasks.model import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on first use: the worker processes that read data import this package and don't need jax.
    if name == "load":
        from biomamba_jax.tasks.model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), "load"]
