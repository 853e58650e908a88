"""Tests on several devices: virtual ones of the CPU. Their number is fixed when JAX starts: each test has its own
process."""

import functools
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def on_devices(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test, whose arguments are plain values, in a process with `count` CPU devices."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**arguments: object) -> None:
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
            call = f"from devices import call; call({test.__module__!r}, {test.__name__!r}, {arguments!r})"
            folders = [str(ROOT), str(ROOT / "tests"), str(Path(sys.modules[test.__module__].__file__ or "").parent)]
            done = subprocess.run(
                [sys.executable, "-c", call],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(folders), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
                capture_output=True,
                text=True,
            )
            print(done.stdout)
            assert done.returncode == 0, done.stderr[-4000:]

        return run

    return decorate


def call(module: str, name: str, arguments: dict[str, object]) -> None:
    """The test itself, in its process."""
    getattr(importlib.import_module(module.rpartition(".")[2]), name).__wrapped__(**arguments)
