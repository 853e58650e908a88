"""A roofline model of a step's time: lower bounds and an estimate. Nothing here is measured.

The bounds assume that everything else is free: products at peak FLOP/s, bytes at the full bandwidth of memory and
links. The estimate sums, per operation, the larger of compute and memory time, then the kernels, then the exposed
collectives. Overlapped (asynchronous) collectives count only where they take longer than all computation.
"""

import dataclasses
from collections.abc import Mapping

from biomamba_jax.planning.compile import Compiled
from biomamba_jax.planning.costs import KernelCall
from biomamba_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step."""

    compute: float
    """Lower bound of the matrix products."""
    memory: float
    """Lower bound of the device memory traffic."""
    links: float
    """Lower bound of the communication inside a slice or node."""
    network: float
    """Lower bound of the communication between slices or nodes."""
    kernels: float
    """Estimate for all kernels."""
    step: float
    """Estimate for the whole step."""
    unprofiled: tuple[str, ...] = ()
    """Kernels without a static profile: their estimate is only a lower bound."""

    @property
    def floor(self) -> float:
        """Lower bound of the step."""
        return max(self.compute, self.memory, self.links, self.network)

    @property
    def bound(self) -> str:
        """The resource that sets the lower bound."""
        return max(("compute", "memory", "links", "network"), key=lambda name: getattr(self, name))


def step_times(
    compiled: Compiled, topology: Topology, dtype: str = "bfloat16", rates: Mapping[str, float] | None = None
) -> Times:
    """Return lower bounds and the estimate for a compiled step.

    Args:
      compiled: the step.
      topology: the machine.
      dtype: operand dtype of the matrix products.
      rates: seconds per byte of operands and results, by kernel, from the compiler's static profile; other kernels are
        estimated from their own cost estimates.
    """
    kind, chip, rates = topology.kind, topology.chip, rates or {}
    peak = chip.flops[dtype]

    def kernel_seconds(kernel: KernelCall) -> float:
        stated = kernel.vector_operations / kind.vector if kind.vector else 0.0
        profiled = kernel.bytes * rates.get(kernel.name, 0.0)
        return max(kernel.flops / peak, kernel.bytes / chip.bandwidth, stated, profiled)

    def collective_seconds(between: bool, overlaps: tuple[bool, ...] = (False, True)) -> float:
        speed = kind.network if between else kind.link
        chosen = (c for c in compiled.collectives if c.between_slices == between and c.overlaps in overlaps)
        return sum(c.calls * c.sent for c in chosen) / speed

    kernels = sum(kernel.calls * kernel_seconds(kernel) for kernel in compiled.costs.kernels)
    work = sum(item.calls * max(item.flops / peak, item.bytes / chip.bandwidth) for item in compiled.work)
    traffic = sum(item.calls * item.bytes for item in compiled.work)
    traffic += sum(kernel.calls * kernel.bytes for kernel in compiled.costs.kernels)
    exposed = collective_seconds(False, (False,)) + collective_seconds(True, (False,))
    overlapped = max(collective_seconds(False, (True,)), collective_seconds(True, (True,)))
    times = Times(
        compute=compiled.costs.flops / peak,
        memory=traffic / chip.bandwidth,
        links=collective_seconds(False),
        network=collective_seconds(True),
        kernels=kernels,
        step=0.0,
        unprofiled=tuple(sorted({kernel.name for kernel in compiled.costs.kernels} - set(rates))),
    )
    return dataclasses.replace(times, step=max(max(work + kernels, overlapped) + exposed, times.floor))
