"""A record of where and how this process runs."""

import importlib.metadata
import os
import platform
import shlex
import sys
import time
from typing import Any

import jax

import biomamba_jax
from biomamba_jax import processor

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece", "tokenizers")


def environment() -> dict[str, Any]:
    """Return versions, devices, host and command line of this process; no environment variables."""
    devices = jax.devices()
    versions = {"biomamba-jax": biomamba_jax.__version__, "python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(sys.orig_argv),
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": processor.name(),
        "cpu_cores": os.cpu_count(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
        "versions": versions,
    }
