"""From what one device does in a step to how long that takes: floors and an estimate. Nothing here is measured.

Floors assume that everything else is free: products at peak, bytes at the full speed of memory and links. The
estimate adds up, operation by operation, the larger of its arithmetic and its memory traffic, then the kernels, then
the exchanges that nothing can overlap with. Exchanges that are started and awaited apart count where they are longer
than all of that.
"""

import dataclasses
from collections.abc import Mapping

from biomamba_jax.planning.compile import Compiled
from biomamba_jax.planning.costs import KernelCall
from biomamba_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step.

    Attributes:
      compute: floor of the matrix products.
      memory: floor of the traffic with the device's memory.
      links: floor of what is sent inside a slice or node.
      network: floor of what is sent between slices or nodes.
      kernels: estimate for all kernels.
      step: estimate for everything.
      unprofiled: kernels of which there is no static profile: what is estimated for them is a floor.
    """

    compute: float
    memory: float
    links: float
    network: float
    kernels: float
    step: float
    unprofiled: tuple[str, ...] = ()

    @property
    def floor(self) -> float:
        """No step can be faster."""
        return max(self.compute, self.memory, self.links, self.network)

    @property
    def bound(self) -> str:
        """What the floor is made of."""
        return max(("compute", "memory", "links", "network"), key=lambda name: getattr(self, name))


def step_times(
    compiled: Compiled, topology: Topology, dtype: str = "bfloat16", rates: Mapping[str, float] | None = None
) -> Times:
    """Floors and the estimate for a compiled step.

    Args:
      dtype: of matrix products.
      rates: seconds a byte of operands and results, by kernel, from the compiler's static profile; a kernel that is not
        among them takes what its own statement of costs says.
    """
    kind, chip = topology.kind, topology.chip
    peak = chip.flops[dtype]

    def kernel_seconds(kernel: KernelCall) -> float:
        stated = kernel.vector_operations / kind.vector if kind.vector else 0.0
        least = max(kernel.flops / peak, kernel.bytes / chip.bandwidth, stated)
        return max(least, kernel.bytes * (rates or {}).get(kernel.name, 0.0))

    def exchange_seconds(between: bool, overlaps: tuple[bool, ...] = (False, True)) -> float:
        speed = kind.network if between else kind.link
        chosen = (c for c in compiled.collectives if c.between_slices == between and c.overlaps in overlaps)
        return sum(c.calls * c.sent for c in chosen) / speed

    kernels = sum(kernel.calls * kernel_seconds(kernel) for kernel in compiled.costs.kernels)
    work = sum(item.calls * max(item.flops / peak, item.bytes / chip.bandwidth) for item in compiled.work)
    traffic = sum(item.calls * item.bytes for item in compiled.work)
    traffic += sum(kernel.calls * kernel.bytes for kernel in compiled.costs.kernels)
    exposed = exchange_seconds(False, (False,)) + exchange_seconds(True, (False,))
    hidden = max(exchange_seconds(False, (True,)), exchange_seconds(True, (True,)))
    times = Times(
        compute=compiled.costs.flops / peak,
        memory=traffic / chip.bandwidth,
        links=exchange_seconds(False),
        network=exchange_seconds(True),
        kernels=kernels,
        step=0.0,
        unprofiled=tuple(sorted({kernel.name for kernel in compiled.costs.kernels} - set(rates or {}))),
    )
    return dataclasses.replace(times, step=max(max(work + kernels, hidden) + exposed, times.floor))
