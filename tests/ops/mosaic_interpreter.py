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


def in_threads(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in another process, where XLA has threads enough: warpgroups of one block wait for each
    other, each in a thread of XLA's, of which there are as many as the machine has cores.

    Arguments and results are copied, so let them be numpy arrays.
    """
    return _process().submit(function, *arguments).result()


@functools.cache
def _process() -> concurrent.futures.ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_give_threads)


def _give_threads() -> None:
    os.environ["PJRT_NPROC"] = "16"
