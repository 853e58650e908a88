"""A roofline model of a step's time: lower bounds and an estimate. Nothing here is measured.

The bounds assume that everything else is free: products at peak FLOP/s, bytes at the full bandwidth of memory and
links. The estimate sums, per operation, the larger of compute and memory time, then the kernels, then the exposed
collectives. Overlapped (asynchronous) collectives count only where they take longer than all computation.
"""

import dataclasses
from collections.abc import Mapping

from biomamba_jax.planning.compile import Compiled
from biomamba_jax.planning.costs import Operation
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
        return getattr(self, self.bound)

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

    def seconds(one: Operation) -> float:
        stated = one.vector_operations / kind.vector if kind.vector else 0.0
        return max(one.flops / peak, one.bytes / chip.bandwidth, stated, one.bytes * rates.get(one.name, 0.0))

    def collective_seconds(between: bool, overlaps: tuple[bool, ...] = (False, True)) -> float:
        speed = kind.network if between else kind.link
        chosen = (c for c in compiled.collectives if c.between_slices == between and c.overlaps in overlaps)
        return sum(c.calls * c.sent for c in chosen) / speed

    kernels = sum(kernel.calls * seconds(kernel) for kernel in compiled.costs.kernels)
    work = sum(one.calls * seconds(one) for one in compiled.work)
    traffic = sum(one.calls * one.bytes for one in (*compiled.work, *compiled.costs.kernels))
    exposed = collective_seconds(False, (False,)) + collective_seconds(True, (False,))
    overlapped = max(collective_seconds(False, (True,)), collective_seconds(True, (True,)))
    bounds = {"compute": compiled.costs.flops / peak, "memory": traffic / chip.bandwidth}
    bounds |= {"links": collective_seconds(False), "network": collective_seconds(True)}
    step = max(max(work + kernels, overlapped) + exposed, *bounds.values())
    unprofiled = {kernel.name for kernel in compiled.costs.kernels} - set(rates)
    return Times(**bounds, kernels=kernels, step=step, unprofiled=tuple(sorted(unprofiled)))
