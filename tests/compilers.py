"""Compilers for chips that are not there: `make test-long` installs them; without, the tests that need them skip."""

import importlib.util

import pytest

from biomamba_jax.ops import dispatch


def installed(module: str) -> bool:
    """Whether the module could be imported, found without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


needs_libtpu = pytest.mark.skipif(
    not installed("libtpu"), reason="needs libtpu: make test-long, or pip install 'biomamba-jax[tpu-compiler]'"
)
needs_jax_triton = pytest.mark.skipif(
    not (installed("jax_triton") and installed("jax_cuda12_plugin")),
    reason="needs jax-triton and jax's plugin for CUDA: make test-long, or pip install 'biomamba-jax[gpu]'",
)
needs_triton = pytest.mark.skipif(
    not installed("triton"), reason="needs triton: pip install triton==3.9.0 (or the [gpu] extra)"
)
needs_traceable_triton = pytest.mark.skipif(
    dispatch.triton_unavailable_reason() is not None, reason=f"Triton kernels: {dispatch.triton_unavailable_reason()}"
)


def require_cuda_compiler() -> None:
    """Skips the test that calls it where JAX's plugin for CUDA or its assembler is missing."""
    for module in ("jax_cuda12_plugin", "jax_plugins.xla_cuda12", "nvidia.cuda_nvcc"):
        if not installed(module):
            pytest.skip(f"needs {module}: make test-long, or pip install 'biomamba-jax[gpu]'")
