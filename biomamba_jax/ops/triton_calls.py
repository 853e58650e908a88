"""Calls of Triton kernels from JAX programs through jax-triton, whose two supported versions differ.

Neither this module nor the ops import triton before a kernel is called: the package works without it.
"""

import contextlib
import contextvars
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import vary_over, varying_axes

PTX_VERSION = 88
"""Newest PTX ISA that the assembler of CUDA 12.9 accepts. Triton 3.9 would emit 9.4 for sm_90 and newer."""


class Launch(NamedTuple):
    """Launch parameters of a kernel."""

    warps: int
    """Warps of a program."""
    stages: int = 1
    """Depth of Triton's software pipelines of loads."""


class Call(NamedTuple):
    """One recorded `call`."""

    kernel: Any
    """The function under `triton.jit`."""
    arguments: tuple[jax.ShapeDtypeStruct | int, ...]
    """Arrays by shape and dtype, and integers."""
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    """Shapes and dtypes."""
    grid: tuple[int, ...]
    """Programs along each axis."""
    launch: Launch
    """Warps and stages."""
    constants: Mapping[str, Any]
    """Values of the constexpr parameters."""


_recorded: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar("recorded", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """Record kernel calls inside the context instead of running them, to compile them separately; outputs are zeros."""
    calls: list[Call] = []
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


def kernels(module: str) -> Any:
    """Import and return the module of Triton kernels of that name.

    Raises:
      UserError: triton is not installed.
    """
    try:
        _use_bundled_assembler()
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name != "triton":
            raise
        raise UserError("Triton kernels need triton and jax-triton: pip install 'biomamba-jax[gpu]'") from None


def _use_bundled_assembler() -> None:
    """Make Triton emit PTX for the bundled assembler of CUDA 12.9 on every architecture.

    Triton chooses the PTX version by the assembler that it would call, and jax-triton 0.3 cannot override the version.
    A path set in the environment is kept.
    """
    from triton import knobs

    os.environ.setdefault("TRITON_PTXAS_BLACKWELL_PATH", knobs.nvidia.ptxas.path)


def call(
    kernel: Any,
    arguments: Sequence[Array | int],
    *,
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    launch: Launch,
    constants: Mapping[str, Any],
) -> list[Array]:
    """Run a Triton kernel inside a JAX program.

    Args:
      kernel: a function under `triton.jit`; its parameters are the arguments, the outputs and the constants, in order.
      arguments: arrays, passed as pointers, and integers.
      outputs: shapes and dtypes; a kernel writes every element.
      grid: programs along each of up to three axes.
      launch: warps and stages.
      constants: values of the constexpr parameters.

    Returns:
      The outputs; inside `shard_map` they vary over all mesh axes that any argument varies over.
    """
    calls = _recorded.get()
    if calls is not None:
        like = tuple(v if isinstance(v, int) else jax.ShapeDtypeStruct(v.shape, v.dtype) for v in arguments)
        calls.append(Call(kernel, like, tuple(outputs), grid, launch, constants))
        return [jnp.zeros(v.shape, v.dtype) for v in outputs]
    jax_triton = importlib.import_module("jax_triton")
    options: dict[str, Any] = {"out_shape": list(outputs)}
    if not jax_triton.__version__.startswith("0.3."):
        options = {"out_type": list(outputs), "backend_options": {"ptx_version": PTX_VERSION, "enable_fp_fusion": True}}
    results = jax_triton.triton_call(
        *arguments,
        kernel=kernel,
        name=kernel.__name__,
        grid=grid,
        num_warps=launch.warps,
        num_stages=launch.stages,
        compute_capability=dispatch.compute_capability(),
        **options,
        **constants,
    )
    axes = varying_axes(arguments)
    return [vary_over(v, axes) for v in results]
