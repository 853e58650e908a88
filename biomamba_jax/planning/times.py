"""A model of a step's time: lower bounds and an estimate. Nothing here is measured.

The bounds assume that everything else is free: products at peak FLOP/s, bytes at the full bandwidth of memory and
links. The estimate runs through the compiled schedule. An operation takes the longer of its arithmetic and its memory
traffic; a collective takes its bytes over the links that it has, and a microsecond a hop. A synchronous collective is
exposed; an asynchronous one only as far as the device arrives where it is awaited before its end. Collectives of a
slice run one after the other, and so do those of the network.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping

from biomamba_jax.planning.compile import Compiled
from biomamba_jax.planning.costs import Operation
from biomamba_jax.planning.schedule import Collective, Loop, Schedule, Wait, one_call
from biomamba_jax.planning.topology import HOP, Topology


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
    exposed: Mapping[Collective, float] = dataclasses.field(default_factory=dict)
    """Part of the step that waits for collectives, by `one_call` of each."""
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
        """Return the time of one call; a kernel of few blocks leaves cores, and so a share of all units, idle."""
        stated = one.vector_operations / kind.vector if kind.vector else 0.0
        idle = chip.cores * -(-one.parallel // chip.cores) / one.parallel
        arithmetic = max(one.flops / peak, stated, one.bytes * rates.get(one.name, 0.0) / chip.cores)
        return max(arithmetic * idle if one.is_kernel else arithmetic, one.bytes / chip.bandwidth)

    def collective_seconds(one: Collective, per_hop: float = HOP) -> float:
        if one.route.axes == "network":
            return one.sent / kind.network
        return one.sent / (one.route.links * kind.link) + one.hops * per_hop

    def busy(axis: str) -> float:
        return sum(c.calls * collective_seconds(c, 0.0) for c in compiled.collectives if axis in c.route.axes.split())

    timeline = _Timeline(seconds, collective_seconds, compiled.costs.kernels)
    timeline.run(compiled.schedule)
    kernels = sum(kernel.calls * seconds(kernel) for kernel in compiled.costs.kernels)
    traffic = sum(one.calls * one.bytes for one in (*compiled.work, *compiled.costs.kernels))
    bounds = {"compute": compiled.costs.flops / peak, "memory": traffic / chip.bandwidth}
    bounds |= {"links": max(map(busy, ("x", "y", "z", "switch"))), "network": busy("network")}
    step = max(timeline.end() + kernels - timeline.kernels, *bounds.values())
    unprofiled = {kernel.name for kernel in compiled.costs.kernels} - set(rates)
    return Times(**bounds, kernels=kernels, step=step, exposed=timeline.exposed, unprofiled=tuple(sorted(unprofiled)))


class _Timeline:
    """Time of a device and of its links, advanced by one item of the schedule after the other."""

    def __init__(
        self,
        seconds: Callable[[Operation], float],
        collective_seconds: Callable[[Collective], float],
        kernels: list[Operation],
    ):
        self._seconds, self._collective_seconds = seconds, collective_seconds
        self._kernels = kernels
        self._now = 0.0
        self._free = {False: 0.0, True: 0.0}  # when links and network have done what was started
        self._pending: dict[str, tuple[Collective, float]] = {}
        self.exposed = collections.defaultdict[Collective, float](float)
        self.kernels = 0.0
        """Time of the kernels that the schedule has; that of GPUs has none."""

    def run(self, schedule: Schedule, times: int = 1) -> None:
        """Run `schedule`; what is exposed in it counts `times`."""
        for item in schedule:
            if isinstance(item, Loop):
                begin, before = self._now, set(self._pending)
                self.run(item.body, times * item.calls)
                for name in set(self._pending) - before:
                    self._await(name, times * item.calls)
                self._now += (item.calls - 1) * (self._now - begin)
            elif isinstance(item, Collective):
                network = item.route.axes == "network"
                self._free[network] = max(self._now, self._free[network]) + self._collective_seconds(item)
                self._pending[item.name] = item, self._free[network]
                if not item.overlaps:
                    self._await(item.name, times)
            elif isinstance(item, Wait):
                self._await(item.name, times)
            else:
                seconds = self._seconds(self._kernel(item) if item.is_kernel else item)
                self.kernels += times * seconds if item.is_kernel else 0.0
                self._now += seconds

    def end(self) -> float:
        """Return when everything is done."""
        for name in list(self._pending):
            self._await(name, 1)
        return self._now

    def _await(self, name: str, times: int) -> None:
        collective, end = self._pending.pop(name, (None, 0.0))
        if collective is not None and end > self._now:
            self.exposed[one_call(collective)] += times * (end - self._now)
            self._now = end

    def _kernel(self, call: Operation) -> Operation:
        """Return the kernel that a call in the compiled program runs: that of its name, and of its size."""
        named = [kernel for kernel in self._kernels if kernel.name in call.name]
        return min(named, key=lambda kernel: abs(kernel.bytes - call.bytes), default=call)
