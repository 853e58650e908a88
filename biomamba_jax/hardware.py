"""Peak FLOP/s, memory and bandwidth of accelerators, by the name that JAX gives to the device.

Figures are per `jax.Device`, which is not always one chip. A device that is not in the table has no peak: callers then
leave the share of peak out.
"""

import dataclasses
import functools
import re
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from biomamba_jax import processor

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of `jax.Device`."""

    name: str
    """Common name."""
    device_kind: str
    """Regular expression for the whole of `jax.Device.device_kind`."""
    flops: Mapping[str, float]
    """FLOP/s of dense matrix products (no structured sparsity) by the operands' dtype, accumulated in float32, at JAX's
    default precision: a float32 product takes one bfloat16 pass on TPU, and TF32 on GPUs that have it."""
    memory_bytes: int
    """TPU: memory that the compiler lets one program use. GPU: the datasheet's size, of which the driver and ECC keep
    1 to 7 %."""
    bandwidth: float
    """Bytes/s between that memory and the chip."""
    cores: int = 1
    """TensorCores that act as this one device and share its figures evenly."""
    clock: float | None = None
    """Hz of a TensorCore, derived from its peak FLOP/s; None where no static profile needs it."""
    sparse_cores: bool = False
    """True if the compiler can run collectives on its SparseCores, beside the TensorCore."""


def _chip(name: str, device_kind: str, teraflops: Mapping[str, float], gib: float, gbps: float, **details: Any) -> Chip:
    flops = {dtype: value * 1e12 for dtype, value in teraflops.items()}
    return Chip(name, device_kind, flops, int(gib * GIB), gbps * 1e9, **details)


def _tpu(name: str, device_kind: str, teraflops: float, gib: float, gbps: float, **details: Any) -> Chip:
    return _chip(name, device_kind, {"bfloat16": teraflops, "float32": teraflops}, gib, gbps, **details)


def _gpu(name: str, device_kind: str, half: float, single: float, gib: float, gbps: float) -> Chip:
    return _chip(name, device_kind, {"bfloat16": half, "float16": half, "float32": single}, gib, gbps)


def _volta(name: str, device_kind: str, half: float, single: float, gib: float) -> Chip:
    return _chip(name, device_kind, {"float16": half, "float32": single}, gib, 900)  # no bfloat16 in its tensor cores


# TPU: FLOP/s and bandwidth from https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; memory is the "available
# HBM" that libtpu 0.0.52 reports when it refuses a program; names as in the same libtpu. On Cloud TPU a v4 or
# v5p chip is one JAX device (megacore: two cores act as one). TPU7x has no megacore: each of the chip's two cores is a
# device of its own, with half of the chip's 2,307 TFLOP/s, 192 GiB and 7,380 GB/s.
# GPU: NVIDIA's datasheets, halved where they quote sparsity: V100 (1165301), A100 (1758950), H100 (2022 for PCIe, 2024
# for SXM and NVL), H200, L4, Blackwell architecture brief (HGX B200 per GPU, GB200 NVL72 per GPU); RTX 3090: GA102
# whitepaper, RTX 4090: Ada whitepaper, both with fp32 sums; A10G: baseten.co/blog/nvidia-a10-vs-a10g-for-ml-model-
# inference (its tensor cores run at 70, not at the A10's 125).
CHIPS = (
    _tpu("TPU v4", r"TPU v4", 275, 30.75, 1228, cores=2),
    _tpu("TPU v5e", r"TPU v5 lite|TPU v5e", 197, 15.75, 819, clock=1.5e9),
    _tpu("TPU v5p", r"TPU v5p?", 459, 95.73, 2765, cores=2, clock=1.75e9, sparse_cores=True),
    _tpu("TPU v6e", r"TPU v6 lite|TPU v6e", 918, 31.24, 1638, clock=1.75e9, sparse_cores=True),
    _tpu("TPU7x (one core)", r"TPU7x", 2307 / 2, 94.74, 7380 / 2, sparse_cores=True),
    _volta("V100 SXM2 16 GB", r"Tesla V100-SXM2-16GB", 125, 15.7, 16),
    _volta("V100 SXM2 32 GB", r"Tesla V100-SXM[23]-32GB", 125, 15.7, 32),
    _volta("V100 PCIe 16 GB", r"Tesla V100-PCIE-16GB", 112, 14, 16),
    _volta("V100 PCIe 32 GB", r"Tesla V100-PCIE-32GB", 112, 14, 32),
    _gpu("A100 40 GB", r"(NVIDIA )?A100-(SXM4|PCIE)-40GB", 312, 156, 40, 1555),
    _gpu("A100 SXM 80 GB", r"(NVIDIA )?A100-SXM4-80GB", 312, 156, 80, 2039),
    _gpu("A100 PCIe 80 GB", r"(NVIDIA )?A100 80GB PCIe", 312, 156, 80, 1935),
    _gpu("H100 SXM", r"NVIDIA H100 80GB HBM3", 989.4, 494.7, 80, 3352),
    _gpu("H100 PCIe", r"NVIDIA H100 PCIe", 756.5, 378, 80, 2039),
    _gpu("H100 NVL", r"NVIDIA H100 NVL", 835.5, 417.5, 94, 3938),
    _gpu("H200", r"NVIDIA H200", 989.4, 494.7, 141, 4800),
    _gpu("B200", r"NVIDIA B200", 2250, 1100, 180, 8000),
    _gpu("GB200", r"NVIDIA GB200", 2500, 1250, 186, 8000),
    _gpu("L4", r"NVIDIA L4", 121, 60, 24, 300),
    _gpu("A10G", r"NVIDIA A10G", 70, 35, 24, 600),
    _gpu("RTX 3090", r"(NVIDIA )?GeForce RTX 3090", 71, 35.6, 24, 936),
    _gpu("RTX 4090", r"NVIDIA GeForce RTX 4090", 165.2, 82.6, 24, 1008),
)


def find_chip(device_kind: str) -> Chip | None:
    """Return the table's row for `jax.Device.device_kind`, or None for an unknown device."""
    return next((chip for chip in CHIPS if re.fullmatch(chip.device_kind, device_kind)), None)


def peak_flops(device_kind: str, dtype: DTypeLike) -> float | None:
    """Return the peak FLOP/s of one device for matrix products of `dtype`.

    Args:
      device_kind: `jax.Device.device_kind`, for instance "TPU v5 lite" or "NVIDIA H100 80GB HBM3".
      dtype: dtype of the operands.

    Returns:
      FLOP/s, or None if the device is unknown (as is a CPU: see `measure_matmul_flops`) or has no unit for `dtype`.
    """
    chip = find_chip(device_kind)
    return chip.flops.get(jnp.dtype(dtype).name) if chip else None


@functools.cache  # of a machine that does not change
def measure_matmul_flops(seconds: float = 0.3, size: int = 1024) -> float:
    """Return the FLOP/s of the fastest square float32 product on JAX's default device within `seconds`.

    It replaces a datasheet's peak on CPUs, whose share of peak is then relative to plain matrix products. Virtual CPU
    devices share one machine: the figure is for all of them together.
    """
    # Random values, since some CPUs multiply zeros and ones at higher clocks.
    operand = jax.random.normal(jax.random.key(0), (size, size), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(operand).block_until_ready()
    fastest = float("inf")
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        product(operand).block_until_ready()
        stop = time.perf_counter()
        fastest = min(fastest, stop - start)
        if stop >= end:
            return 2 * size**3 / fastest


def measure_read_bandwidth(seconds: float = 0.5, megabytes: int = 256) -> float:
    """Return the bytes/s at which all cores read memory that is not in their caches, in the median pass of `seconds`.

    Generating a token reads every weight once, so this bounds the speed of decoding on a CPU. Speeds of decoding are
    medians too; the fastest pass of a virtual machine may be half as fast again as what lasts.
    """
    cores = processor.cores()
    parts = np.array_split(np.ones(megabytes * 2**18, np.float32), cores)
    passes, end = list[float](), time.perf_counter() + seconds
    with ThreadPoolExecutor(cores) as pool:  # NumPy releases Python's lock
        while time.perf_counter() < end:
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            passes.append(time.perf_counter() - start)
    return megabytes * 2**20 / statistics.median(passes)


def peak_memory_bytes() -> int:
    """Return the peak memory of this host's first device, or of the process if the device is the CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024  # macOS counts bytes, Linux KiB
