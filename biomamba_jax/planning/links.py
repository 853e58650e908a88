"""Which links of a torus a collective has, from the coordinates of the devices that take part.

A ring along an axis of the torus sends both ways: a device has two links of that axis. Where the ends of the axis are
not joined the devices form a line, whose last device has one. A collective over several axes splits its array and works
on them at the same time, so their links add up. Devices that are not neighbours share the links between them with the
groups that lie there. See chapters 2 and 3 of "How to Scale Your Model" (Austin et al. 2025).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from biomamba_jax.planning.topology import Topology

Coordinates = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Route:
    """The links that the groups of a collective use."""

    axes: str
    """Axes of the torus, as "x" or "x y"; "switch" in a GPU node, "network" between slices or nodes."""
    links: float
    """Links that a device sends on at the same time; those shared with other groups count by their share."""
    hops: int = 0
    """Devices that data passes one after the other, at least."""


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the devices of a program are, in the order of its partitions."""

    slices: Sequence[int]
    """Slice or GPU node of each device."""
    coordinates: Sequence[Coordinates]
    """Coordinates in the torus of each device's chip; () for GPUs, whose node has a switch."""
    shape: tuple[int, ...] = ()
    """Chips along each axis of a slice."""
    joined: tuple[bool, ...] = ()
    """True for each axis whose last chip is a neighbour of the first."""

    @classmethod
    def of_devices(cls, devices: Sequence[Any], topology: Topology) -> "Places":
        """Return the places of `jax.Device`s."""
        if not topology.is_tpu:
            nodes = [device.process_index for device in devices]
            per_node = math.prod(topology.shape)
            nodes = [k // per_node for k in range(len(devices))] if len(set(nodes)) == 1 else nodes
            return cls(nodes, [()] * len(devices))
        slices = [getattr(device, "slice_index", 0) for device in devices]
        coordinates = [tuple(device.coords[: len(topology.shape)]) for device in devices]
        return cls(slices, coordinates, topology.shape, topology.joined)

    def route(self, groups: Sequence[Sequence[int]], pairs: bool = False) -> Route:
        """Return the route of a collective.

        Args:
          groups: partitions of each group, or source and target of each permuted pair.
          pairs: True for pairs.
        """
        if any(len({self.slices[k] for k in group}) > 1 for group in groups):
            return Route("network", 1.0)
        if not self.shape:
            return Route("switch", 1.0)
        if pairs:
            return self._pairs(groups)
        return self._group([self.coordinates[k] for k in groups[0]])  # the others are the same shape

    def _group(self, group: Sequence[Coordinates]) -> Route:
        axes, links, hops, covered = [], 0.0, 0, 1
        for axis, (size, joined) in enumerate(zip(self.shape, self.joined, strict=True)):
            at = sorted({place[axis] for place in group})
            if len(at) == 1:
                continue
            gap = max(b - a for a, b in itertools.pairwise(at))
            span = at[-1] - at[0]
            ring = joined and size - span <= gap
            axes.append("xyz"[axis])
            links += (2 if ring else 1) / min(gap, size // len(at))
            hops += size // 2 if ring else span
            covered *= len(at)
        if not axes:  # the cores of one chip
            return Route("chip", 2.0 * len(self.shape))
        # Groups that are no boxes of the torus share the links of one.
        return Route(" ".join(axes), links * min(len(group) / covered, 1), hops)

    def _pairs(self, pairs: Sequence[Sequence[int]]) -> Route:
        axes, furthest = set(), 0
        for source, target in pairs:
            ends = zip(self.coordinates[source], self.coordinates[target], self.shape, self.joined, strict=True)
            for axis, (a, b, size, joined) in enumerate(ends):
                if a != b:
                    axes.add("xyz"[axis])
                    furthest = max(furthest, min(abs(a - b), size - abs(a - b)) if joined else abs(a - b))
        # A shift by n sends what n devices have over each link.
        return Route(" ".join(sorted(axes)) or "chip", 1 / max(furthest, 1), furthest)
