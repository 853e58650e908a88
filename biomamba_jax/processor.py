"""This machine's CPU: its name, cores and instruction sets, and how a process on it keeps its memory."""

import ctypes
import functools
import hashlib
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from itertools import takewhile

_VECTORS = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX"), ("sve", "SVE"), ("asimd", "NEON"))
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


@functools.cache
def description() -> Mapping[str, str]:
    """Return what /proc/cpuinfo says of the first core, or on other systems the name that Python knows."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        fields = (line.partition(":") for line in takewhile(str.strip, file))
        return {key.strip(): value.strip() for key, _, value in fields}
    return {"model name": platform.processor()}


def cores() -> int:
    """Return the number of cores available to this process; in a container fewer than the machine may have."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def name() -> str:
    """Return the CPU's name with its family and model, its widest vectors, and the number of cores of this process."""
    cpu = description()
    known = [f"{key.removeprefix('cpu ')} {cpu[key]}" for key in ("cpu family", "model", "CPU part") if key in cpu]
    features = (cpu.get("flags") or cpu.get("Features", "")).split()
    vectors = next((shown for flag, shown in _VECTORS if flag in features), None)
    model = cpu.get("model name") or platform.machine()
    parts = [f"{model} ({', '.join(known)})" if known else model, vectors, f"{cores()} cores"]
    return ", ".join(part for part in parts if part)


def kind() -> str:
    """Return an identifier that only CPUs with the same instruction sets share, for names of compiled files."""
    cpu = description()
    of_kind = [cpu.get(key, "") for key in ("model name", "cpu family", "model", "flags", "CPU part", "Features")]
    return f"{platform.machine()}-{hashlib.sha256('|'.join(of_kind).encode()).hexdigest()[:8]}"


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation instead of returning it to the system.

    XLA frees its buffers after every step; returned, they are mapped again page by page, a fifth to a third of a small
    model's step on a CPU. One arena, since only the first may hold a block of more than 64 MB: so it must come before
    any library starts threads. Their small allocations then wait for each other: training a tokenizer takes half as
    long again. Does nothing where JAX has an accelerator's plugin, or where MALLOC_* or GLIBC_TUNABLES of the
    environment say what to do.
    """
    stated = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if stated or (os.environ.get("JAX_PLATFORMS") != "cpu" and (find_spec("libtpu") or find_spec("jax_plugins"))):
        return
    with suppress(AttributeError, TypeError):  # another C library than glibc
        set_option = ctypes.CDLL(None).mallopt
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            set_option(option, value)
