"""Sums the cycle estimates that the TPU compiler writes into an optimized module: Pallas calls, and all else."""

import re

from biomamba_jax.planning import hlo
from biomamba_jax.planning.hlo import Computations, Instruction

_BRANCHES = ("branch_computations", "true_computation", "false_computation")


def kernel_cycles(text: str) -> dict[str, int]:
    """Return the cycles of each Pallas call by its HLO name, if the static profile was requested."""
    computations, _ = hlo.parse(text)
    calls = {i.name: _own_cycles(i) for body in computations.values() for i in body if hlo.is_kernel(i)}
    return {name: cycles for name, cycles in calls.items() if cycles}


def other_cycles(text: str) -> int | None:
    """Return the cycles of all other operations: loops times their trip counts, of branches the most expensive.

    None if the trip count of a loop with cycles in it is unknown: counting it once would be far too low.
    """
    computations, entry = hlo.parse(text)
    try:
        return _cycles_within(entry, computations)
    except hlo.UnknownTripCountError:
        return None


def _cycles_within(name: str, computations: Computations) -> int:
    total = 0
    for i in computations[name]:
        called = hlo.called_computations(i)
        if i.opcode == "while":
            if once := _cycles_within(called["body"][0], computations):
                total += once * hlo.trip_count(i, computations[name], computations)
        elif i.opcode == "conditional":
            branches = [branch for key in _BRANCHES for branch in called.get(key, ())]
            total += max(_cycles_within(branch, computations) for branch in branches)
        elif i.opcode == "call":
            total += _cycles_within(called["to_apply"][0], computations)
        elif not hlo.is_kernel(i):
            total += _own_cycles(i)
    return total


def _own_cycles(i: Instruction) -> int:
    stated = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
    return int(stated[1]) if stated else 0
