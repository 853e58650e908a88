"""Pallas's interpreter for Mosaic GPU kernels, which moved between the versions of JAX in use."""

import concurrent.futures
import functools
import multiprocessing
import os
from collections.abc import Callable
from typing import Any

COMPILER_OPTIONS = {"xla_backend_optimization_level": 0}
"""Compiling what is interpreted takes most of the time."""


def parameters(**options: Any) -> Any:
    """What the kernels take as `interpret`."""
    try:
        from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
    except ImportError:
        from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
    return InterpretGPUParams(**options)


def losses(kind: str, steps: int) -> list[float]:
    """`kernel_training.losses` with the kernels."""
    return in_threads(_losses, kind, steps)


def in_threads(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in another process, where XLA has threads enough: warpgroups of one block wait for each
    other, each in a thread of XLA's, of which there are as many as the machine has cores.

    Arguments and results are copied, so let them be numpy arrays.
    """
    return _process().submit(function, *arguments).result()


@functools.cache
def _process() -> concurrent.futures.ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_prepare)


def _prepare() -> None:
    os.environ["PJRT_NPROC"] = "16"

    # JAX 0.10 compiles a kernel again for each of its blocks and warpgroups, by a function of its own every time.
    from jax._src.pallas.mosaic.interpret import thread_map

    if not hasattr(thread_map, "_run"):  # as JAX 0.11 has it
        thread_map._run_jaxpr = _run_jaxpr


def _run_jaxpr(jaxpr: Any, consts: Any, *arguments: Any) -> None:
    _program(jaxpr)(consts, *arguments)


@functools.cache
def _program(jaxpr: Any) -> Callable[..., Any]:
    import jax

    return jax.jit(
        lambda consts, *arguments: jax.core.eval_jaxpr(jaxpr, consts, *arguments), compiler_options=COMPILER_OPTIONS
    )


def _losses(kind: str, steps: int) -> list[float]:
    from tests.ops import kernel_training

    return kernel_training.losses(
        kind,
        "pallas_gpu",
        steps,
        kernel_training.SIZES["pallas_gpu"],
        options={"interpret": parameters()},
        compiler_options=COMPILER_OPTIONS,
    )
