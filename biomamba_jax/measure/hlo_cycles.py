"""Cycles that the TPU compiler wrote into the text of an optimised module: of Pallas calls, and of all else."""

import re
from collections.abc import Mapping, Sequence

from biomamba_jax.measure.plan_hlo import Instruction, called_computations, parse

_Computations = Mapping[str, Sequence[Instruction]]
_BRANCHES = ("branch_computations", "true_computation", "false_computation")


class _UnknownTripCountError(Exception):
    """The text does not tell how often a loop runs."""


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
    except _UnknownTripCountError:
        return None


def _cycles_within(name: str, computations: _Computations) -> int:
    total = 0
    for i in computations[name]:
        called = called_computations(i)
        if i.opcode == "while":
            if once := _cycles_within(called["body"][0], computations):
                total += once * _trip_count(i, computations[name], computations)
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


def _trip_count(loop: Instruction, around: Sequence[Instruction], computations: _Computations) -> int:
    """As the loop states it, which optimised TPU programs do not; or of a counter that is element k of its state:
    a constant at first, raised by a constant in each turn, compared with a constant."""
    if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(stated[1])
    called = called_computations(loop)
    condition, body = computations[called["condition"][0]], computations[called["body"][0]]
    compare = _root(condition, "compare")
    if "direction=LT" not in compare.attributes:
        raise _UnknownTripCountError
    counter, bound = (_source(name, condition) for name in compare.operands)
    k = _element(counter)
    start = _source(_source(loop.operands[0], around, "tuple").operands[k], around)
    raised = _source(_root(body, "tuple").operands[k], body, "add")
    before, step = sorted((_source(name, body) for name in raised.operands), key=lambda i: i.opcode == "constant")
    if _element(before) != k or _constant(step) < 1:
        raise _UnknownTripCountError
    return max(0, -(-(_constant(bound) - _constant(start)) // _constant(step)))


def _root(computation: Sequence[Instruction], opcode: str) -> Instruction:
    return _source(next(i.name for i in computation if i.is_root), computation, opcode)


def _source(name: str, computation: Sequence[Instruction], opcode: str | None = None) -> Instruction:
    """The instruction that computes a value, whatever copies it went through; it must be of `opcode`, if given."""
    named = {i.name: i for i in computation}
    found = named[name]
    while found.opcode in ("copy", "bitcast"):
        found = named[found.operands[0]]
    if opcode not in (None, found.opcode):
        raise _UnknownTripCountError
    return found


def _element(i: Instruction) -> int:
    """Which element of the loop's state this is."""
    index = re.search(r"\bindex=(\d+)", i.attributes)
    if i.opcode != "get-tuple-element" or index is None:
        raise _UnknownTripCountError
    return int(index[1])


def _constant(i: Instruction) -> int:
    if i.opcode != "constant" or not re.fullmatch(r"-?\d+", i.arguments):
        raise _UnknownTripCountError
    return int(i.arguments)
