"""Calling Triton kernels from JAX through jax-triton, whose two versions in use differ; all that is common to the ops.

Nothing here or in the modules of the ops imports triton until a kernel is called: the package works without it.
"""

import contextlib
import contextvars
import importlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import vary_over, varying_axes

Sizes = TypeVar("Sizes")

PTX_VERSION = 88
"""The newest that the assembler of CUDA 12.9 knows. Triton 3.9 would write 9.4 for sm_90 and newer."""


class Launch(NamedTuple):
    """How a kernel is spread over the GPU; `stages` is the depth of Triton's own pipelines of loads."""

    warps: int
    stages: int = 1


class Call(NamedTuple):
    """One kernel at one set of sizes, as `call` takes it; arrays stand as shapes and dtypes."""

    kernel: Any
    arguments: tuple[jax.ShapeDtypeStruct | int, ...]
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    grid: tuple[int, ...]
    launch: Launch
    constants: Mapping[str, Any]


_recorded: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar("recorded", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """Inside, kernels are not called but listed, and their outputs are zeros: to compile them by themselves."""
    calls: list[Call] = []
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


def kernels(module: str) -> Any:
    """The module of Triton kernels of that name.

    Raises:
      UserError: triton is not installed.
    """
    try:
        _keep_to_ptx_version()
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name != "triton":
            raise
        raise UserError("Triton kernels need triton and jax-triton: pip install 'biomamba-jax[gpu]'") from None


def _keep_to_ptx_version() -> None:
    """Triton writes PTX for the assembler that it would call: let that be the bundled one of CUDA 12.9 everywhere.

    jax-triton 0.3 has no other way to choose the version. The environment's own choice is kept.
    """
    from triton import knobs

    os.environ.setdefault("TRITON_PTXAS_BLACKWELL_PATH", knobs.nvidia.ptxas.path)


def call(
    kernel: Any,
    *arguments: Array | int,
    outputs: Sequence[jax.ShapeDtypeStruct],
    grid: tuple[int, ...],
    launch: Launch,
    constants: Mapping[str, Any],
) -> list[Array]:
    """Runs a Triton kernel inside a JAX program.

    Args:
      kernel: a function under `triton.jit`; its parameters are the arguments, the outputs and the constants, in order.
      arguments: arrays, passed as pointers, and integers.
      outputs: shapes and dtypes; a kernel writes all of each.
      grid: programs along each of up to three axes.
      launch: warps and stages.
      constants: values of the parameters that are `tl.constexpr`.

    Returns:
      The outputs, inside `shard_map` varying over all mesh axes that any argument varies over.
    """
    calls = _recorded.get()
    if calls is not None:
        like = tuple(v if isinstance(v, int) else jax.ShapeDtypeStruct(v.shape, v.dtype) for v in arguments)
        calls.append(Call(kernel, like, tuple(outputs), grid, launch, constants))
        return [jnp.zeros(v.shape, v.dtype) for v in outputs]
    run, options = _triton_call()
    results = run(
        *arguments,
        kernel=kernel,
        name=kernel.__name__,
        grid=grid,
        num_warps=launch.warps,
        num_stages=launch.stages,
        compute_capability=dispatch.compute_capability(),
        **options(list(outputs)),
        **constants,
    )
    axes = varying_axes(arguments)
    return [vary_over(v, axes) for v in results]


def _triton_call() -> tuple[Callable[..., Any], Callable[[list[jax.ShapeDtypeStruct]], dict[str, Any]]]:
    """jax-triton's function, and what its version wants to be told besides."""
    jax_triton = importlib.import_module("jax_triton")

    def new(outputs: list[jax.ShapeDtypeStruct]) -> dict[str, Any]:
        options = {"ptx_version": PTX_VERSION, "enable_fp_fusion": True}
        return {"out_type": outputs, "backend_options": options}

    def old(outputs: list[jax.ShapeDtypeStruct]) -> dict[str, Any]:
        return {"out_shape": outputs}

    return jax_triton.triton_call, old if jax_triton.__version__.startswith("0.3.") else new


def for_device(table: Mapping[int, Sizes]) -> Sizes:
    """The entry of a table by least compute capability, for the GPU that programs are being built for."""
    capability = dispatch.compute_capability() or 0
    return table[max((least for least in table if least <= capability), default=min(table))]
