"""Cycles that the TPU compiler wrote into the text of an optimised module: of Pallas calls, and of all else."""

import re

from biomamba_jax.planning.hlo import (
    Computations,
    Instruction,
    UnknownTripCountError,
    called_computations,
    parse,
    trip_count,
)

_BRANCHES = ("branch_computations", "true_computation", "false_computation")


def kernel_cycles(text: str) -> dict[str, int]:
    """Of each Pallas call by its HLO name, where the compiler was asked for its static profile."""
    computations, _ = parse(text)
    calls = [i for body in computations.values() for i in body if _is_kernel(i)]
    return {i.name: cycles for i in calls if (cycles := _own_cycles(i))}


def other_cycles(text: str) -> int | None:
    """Of all else together: loops as often as they run, of branches the costliest.

    None where a loop with cycles in it does not tell how often it runs: counting it once would be far too few.
    """
    computations, entry = parse(text)
    try:
        return _cycles_within(entry, computations)
    except UnknownTripCountError:
        return None


def _cycles_within(name: str, computations: Computations) -> int:
    total = 0
    for i in computations[name]:
        called = called_computations(i)
        if i.opcode == "while":
            if once := _cycles_within(called["body"][0], computations):
                total += once * trip_count(i, computations[name], computations)
        elif i.opcode == "conditional":
            branches = [branch for key in _BRANCHES for branch in called.get(key, ())]
            total += max(_cycles_within(branch, computations) for branch in branches)
        elif i.opcode == "call":
            total += _cycles_within(called["to_apply"][0], computations)
        elif not _is_kernel(i):
            total += _own_cycles(i)
    return total


def _is_kernel(i: Instruction) -> bool:
    return 'custom_call_target="tpu_custom_call"' in i.attributes


def _own_cycles(i: Instruction) -> int:
    stated = re.search(r'"estimated_cycles":"(\d+)"', i.attributes)
    return int(stated[1]) if stated else 0
