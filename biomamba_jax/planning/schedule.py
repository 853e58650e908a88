"""A device's schedule: what it runs in a step, in order."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

from biomamba_jax.planning.costs import Operation
from biomamba_jax.planning.links import Route


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective, or all collectives of one kind and shape."""

    kind: str
    """all-gather, all-reduce, reduce-scatter, collective-permute or all-to-all."""
    calls: int
    """Calls in a step."""
    bytes: int
    """Bytes of the full array that one call gathers, reduces or moves, on one device."""
    group: int
    """Devices in a replica group."""
    route: Route
    """The links that it uses."""
    overlaps: bool
    """True if it is asynchronous: it runs beside what is scheduled until it is awaited."""
    name: str = ""
    """In a schedule: name of the HLO instruction that starts it."""

    @property
    def sent(self) -> float:
        """Bytes that each device must send in one call, by any algorithm."""
        whole = self.bytes * (self.group - 1) / max(self.group, 1)
        return {"all-reduce": 2 * whole, "collective-permute": float(self.bytes)}.get(self.kind, whole)

    @property
    def hops(self) -> int:
        """Hops of one call: an all-reduce is a reduce-scatter and an all-gather."""
        return self.route.hops * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Wait:
    """A point where what an asynchronous collective returns is needed."""

    name: str
    """Name of the collective; others, such as copies, are not in the schedule."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop."""

    calls: int
    """Trip count."""
    body: "Schedule"
    """Items of one iteration."""


Item = Operation | Collective | Wait | Loop
Schedule = Sequence[Item]


def _flat(schedule: Schedule, times: int = 1) -> Iterator[tuple[Operation | Collective, int]]:
    for item in schedule:
        if isinstance(item, Loop):
            yield from _flat(item.body, times * item.calls)
        elif not isinstance(item, Wait):
            yield item, times * item.calls


def operations(schedule: Schedule) -> list[Operation]:
    """Return all operations other than kernels and collectives, with their calls in a step."""
    found = _flat(schedule)
    return [dataclasses.replace(o, calls=n) for o, n in found if isinstance(o, Operation) and not o.is_kernel]


def collectives(schedule: Schedule) -> list[Collective]:
    """Return the collectives, each kind and shape once, with their calls in a step."""
    calls = collections.Counter[Collective]()
    for item, times in _flat(schedule):
        if isinstance(item, Collective):
            calls[one_call(item)] += times
    return [dataclasses.replace(collective, calls=times) for collective, times in calls.items()]


def one_call(collective: Collective) -> Collective:
    """Return what is the same in all collectives of one kind and shape."""
    return dataclasses.replace(collective, calls=1, name="")
