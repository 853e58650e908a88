"""Tests on several devices: virtual ones of the CPU. Their number is fixed when JAX starts, so such tests run in a
process of their own, which all of them share."""

import functools
import importlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path


def on_devices(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test, whose arguments are plain values, in a process with `count` CPU devices.

    A test must leave JAX's settings as they were: the next one finds them.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**arguments: object) -> None:
            folder = str(Path(sys.modules[test.__module__].__file__ or "").parent)
            try:
                _process(count).submit(_call, folder, test.__module__, test.__name__, arguments).result()
            except BrokenProcessPool:  # it takes no further test
                _process.cache_clear()
                raise

        return run

    return decorate


@functools.cache
def _process(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_prepare, initargs=(count,))


def _prepare(count: int) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"


def _call(folder: str, module: str, name: str, arguments: dict[str, object]) -> None:
    """The test itself, in its process."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    getattr(importlib.import_module(module.rpartition(".")[2]), name).__wrapped__(**arguments)
