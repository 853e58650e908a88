"""Parses the text of an optimized HLO module (`jax.stages.Compiled.as_text()`) into computations of instructions."""

import dataclasses
import re
from collections.abc import Mapping, Sequence


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    """Without the leading %."""
    results: str
    """Text of the result's shape, a tuple included."""
    opcode: str
    """For instance "fusion"."""
    arguments: str
    """Text between the parentheses after the opcode."""
    attributes: str
    """Text after those parentheses."""
    is_root: bool
    """True if its result is the computation's result."""

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it uses."""
        return re.findall(r"%([\w.\-]+)", self.arguments)


Computations = Mapping[str, Sequence[Instruction]]


class UnknownTripCountError(Exception):
    """The trip count of a loop cannot be read from the text."""


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Return all computations by name, and the name of the entry computation."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    entry = ""
    for line in text.splitlines():
        if header := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            current = computations.setdefault(header[2], [])
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line)):
            current.append(instruction)
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    head = re.match(r"^\s*(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    start = head.end()
    stop = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    rest = line[stop:].lstrip()
    opcode, _, _ = rest.partition("(")
    first = line.index("(", stop)
    last = _closing(line, first)
    return Instruction(head[2], line[start:stop], opcode, line[first + 1 : last - 1], line[last:], bool(head[1]))


def _closing(line: str, start: int) -> int:
    """Return the position after the parenthesis that closes the one at `start`."""
    depth = 0
    for position in range(start, len(line)):
        depth += (line[position] == "(") - (line[position] == ")")
        if depth == 0:
            return position + 1
    return len(line)


def called_computations(i: Instruction) -> dict[str, list[str]]:
    """Return the names of the computations that an instruction calls, by the attribute that names them."""
    found: dict[str, list[str]] = {}
    pattern = r"\b(body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)"
    for key, name in re.findall(pattern, i.attributes):
        found.setdefault(key, []).append(name)
    for key in ("branch_computations", "called_computations"):
        if listed := re.search(key + r"=\{([^}]*)\}", i.attributes):
            found[key] = re.findall(r"%?([\w.\-]+)", listed[1])
    return found


def is_kernel(i: Instruction) -> bool:
    """Return True for a Pallas call on TPU."""
    return 'custom_call_target="tpu_custom_call"' in i.attributes


def trip_count(loop: Instruction, around: Sequence[Instruction], computations: Computations) -> int:
    """Return the trip count of a while loop.

    Either the loop states it, which optimized TPU programs do not, or it follows from a counter, element k of the
    loop's state, that starts at a constant, is incremented by a constant and is compared with a constant.

    Args:
      loop: the while instruction.
      around: the computation that contains the loop.
      computations: all computations of the module.

    Raises:
      UnknownTripCountError: neither applies.
    """
    if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(stated[1])
    called = called_computations(loop)
    condition, body = computations[called["condition"][0]], computations[called["body"][0]]
    compare = _root(condition, "compare")
    if "direction=LT" not in compare.attributes:
        raise UnknownTripCountError
    counter, bound = (_source(name, condition) for name in compare.operands)
    k = _element(counter)
    start = _source(_source(loop.operands[0], around, "tuple").operands[k], around)
    incremented = _source(_root(body, "tuple").operands[k], body, "add")
    before, step = sorted((_source(name, body) for name in incremented.operands), key=lambda i: i.opcode == "constant")
    if _element(before) != k or _constant(step) < 1:
        raise UnknownTripCountError
    return max(0, -(-(_constant(bound) - _constant(start)) // _constant(step)))


def _root(computation: Sequence[Instruction], opcode: str) -> Instruction:
    return _source(next(i.name for i in computation if i.is_root), computation, opcode)


def _source(name: str, computation: Sequence[Instruction], opcode: str | None = None) -> Instruction:
    """Return the instruction that computes a value, looking through copies; it must be of `opcode`, if given."""
    named = {i.name: i for i in computation}
    found = named[name]
    while found.opcode in ("copy", "bitcast"):
        found = named[found.operands[0]]
    if opcode not in (None, found.opcode):
        raise UnknownTripCountError
    return found


def _element(i: Instruction) -> int:
    """Return the index of a get-tuple-element."""
    index = re.search(r"\bindex=(\d+)", i.attributes)
    if i.opcode != "get-tuple-element" or index is None:
        raise UnknownTripCountError
    return int(index[1])


def _constant(i: Instruction) -> int:
    if i.opcode != "constant" or not re.fullmatch(r"-?\d+", i.arguments):
        raise UnknownTripCountError
    return int(i.arguments)
