"""Name, cores and instruction sets of this machine's CPU."""

import functools
import hashlib
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from itertools import takewhile

_VECTORS = (("avx512f", "AVX-512"), ("avx2", "AVX2"), ("avx", "AVX"), ("sve", "SVE"), ("asimd", "NEON"))


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
