"""Reads operations and collectives of a compiled program, with their counts and bytes, from its text.

The text is `jax.stages.Compiled.as_text()`: one device's program, loops with their trip counts. Operations inside a
fusion cause no memory traffic; a slice of a stacked array counts as the slice, not as the array; buffers in on-chip
memory do not count.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from biomamba_jax.planning import hlo
from biomamba_jax.planning.costs import Operation
from biomamba_jax.planning.hlo import Instruction

_BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "opaque": 0}
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id iota opt-barrier domain "
    "copy-done slice-done dynamic-slice-done async-done async-update all-gather-done all-reduce-done "
    "collective-permute-done recv-done send-done".split()
)
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Operations that update their first operand in place -> position of the operand that they write."""
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^{}]*\})?")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind and shape."""

    kind: str
    """all-gather, all-reduce, reduce-scatter, collective-permute or all-to-all."""
    calls: int
    """Calls in a step."""
    bytes: int
    """Bytes of the full array that one call gathers, reduces or moves, on one device."""
    group: int
    """Devices in a replica group."""
    between_slices: bool
    """True if a group spans slices."""
    overlaps: bool
    """True if it is asynchronous: other work can overlap with it."""

    @property
    def sent(self) -> float:
        """Bytes that each device must send in one call, by any algorithm."""
        whole = self.bytes * (self.group - 1) / max(self.group, 1)
        return {"all-reduce": 2 * whole, "collective-permute": float(self.bytes)}.get(self.kind, whole)


def shape_bytes(text: str, everywhere: bool = False) -> int:
    """Return the bytes of all arrays in a shape, tuples included; arrays in on-chip memory only if `everywhere`."""
    arrays = (array for array in _SHAPE.finditer(text) if everywhere or not re.search(r"S\([1-9]", array[3] or ""))
    return sum(math.prod(_dimensions(array[0])) * _bits(array[1]) // 8 for array in arrays)


def _bits(dtype: str) -> int:
    width = re.search(r"\d+", dtype)
    return _BITS.get(dtype, int(width[0]) if width else 32)


def _dimensions(text: str) -> list[int]:
    """Return the dimensions of the first array in a shape."""
    match = _SHAPE.search(text)
    return [int(size) for size in match[2].split(",") if size] if match else []


class Program:
    """Operations of one device in one step, without kernels: their costs are in the jaxpr."""

    work: list[Operation]
    """Operations other than collectives."""

    def __init__(self, text: str, devices: int = 1, slices: int = 1) -> None:
        """Read a compiled module.

        Args:
          text: text of the optimized module.
          devices: number of devices that run it.
          slices: number of slices that the devices belong to, in order.
        """
        self._computations, entry = hlo.parse(text)
        self._named = {name: {i.name: i for i in body} for name, body in self._computations.items()}
        self._devices, self._slices = devices, slices
        self._calls = collections.Counter[tuple[str, int, int, bool, bool]]()
        self.work = []
        self._walk(entry, 1)

    @property
    def collectives(self) -> list[Collective]:
        """Collectives, each kind and shape once."""
        return [Collective(key[0], calls, *key[1:]) for key, calls in self._calls.items()]

    def _walk(self, computation: str, times: int, overlaps: bool = False) -> None:
        """Count `times` runs of a computation; it overlaps if it runs asynchronously, as on SparseCores."""
        for i in self._computations.get(computation, ()):
            if hlo.is_kernel(i):
                continue
            called = hlo.called_computations(i)
            if i.opcode == "while":
                self._walk(called["body"][0], times * self._trips(i, computation), overlaps)
            elif i.opcode in ("call", "async-start") or "called_computations" in called:
                for inner in next(iter(called.values()), ()):
                    self._walk(inner, times, overlaps or i.opcode == "async-start")
            elif i.opcode == "conditional":
                for inner in [*called.get("branch_computations", ()), *called.get("true_computation", ())][:1]:
                    self._walk(inner, times, overlaps)
            elif kind := _collective_kind(i.opcode):
                self._collective(i, kind, computation, times, overlaps)
            elif i.opcode == "send":
                self._send(i, computation, times)
            elif i.opcode == "fusion":
                self._fusion(i, computation, called["calls"][0], times)
            elif i.opcode not in _FREE:
                self._add(i, times, self._flops(i, computation), self._moved(i, computation))

    def _add(self, i: Instruction, times: int, flops: float, moved: float) -> None:
        if flops or moved:
            self.work.append(Operation(i.name, times, flops, moved))

    def _trips(self, i: Instruction, computation: str) -> int:
        """Return the trip count; if it is unknown, the bound in the loop's condition: a plan is an estimate."""
        try:
            return hlo.trip_count(i, self._computations[computation], self._computations)
        except hlo.UnknownTripCountError:
            condition = self._computations[hlo.called_computations(i)["condition"][0]]
            bounds = [int(j.arguments) for j in condition if j.opcode == "constant" and j.arguments.isdigit()]
            return max(bounds, default=1)

    # --- Collectives -------------------------------------------------------------------------------------------------

    def _collective(self, i: Instruction, kind: str, computation: str, times: int, overlaps: bool = False) -> None:
        operands = sum(shape_bytes(self._type(name, computation), everywhere=True) for name in i.operands)
        results = shape_bytes(i.results, everywhere=True)
        starts = i.opcode.endswith("-start")
        size = results if kind == "all-gather" else operands
        if kind == "all-gather" and starts:  # its result includes its operand
            size -= operands
        groups = replica_groups(i.attributes) or [list(range(self._devices))]
        group = max(map(len, groups)) if kind != "collective-permute" else 2
        per_slice = self._devices // self._slices
        between = any(len({k // per_slice for k in g}) > 1 for g in groups)
        self._count(kind, size, group, between, starts or overlaps, times)

    def _send(self, i: Instruction, computation: str, times: int) -> None:
        """Count a collective between TPU slices, which goes through the hosts: each device sends its shard."""
        original = re.search(r'host_transfer_rendezvous="([a-z\-]+)', i.attributes)
        if original and self._slices > 1 and (kind := _collective_kind(original[1].rstrip("-"))):
            size = shape_bytes(self._type(i.operands[0], computation), everywhere=True)
            self._count(kind, size, self._slices, True, True, times)

    def _count(self, kind: str, size: int, group: int, between: bool, overlaps: bool, times: int) -> None:
        if group > 1 and size:
            self._calls[kind, size, group, between, overlaps] += times

    # --- Work --------------------------------------------------------------------------------------------------------

    def _fusion(self, i: Instruction, computation: str, fused: str, times: int) -> None:
        inside = self._computations[fused]
        root = next(j for j in inside if j.is_root)
        # TPU: a collective that overlaps with products appears in the fusion that starts it, in each fusion that it
        # overlaps with, and in the fusion that awaits it.
        starts, awaits = (i.name.startswith(f"async-collective-{end}") for end in ("start", "done"))
        if not awaits and not fused.startswith("async_collective_fusion"):
            for j in inside:
                if kind := _collective_kind(j.opcode):
                    # TPU: an all-reduce of which the fusion keeps one shard is a reduce-scatter.
                    scatters = kind == "all-reduce" and root.opcode == "dynamic-slice" and root.operands[0] == j.name
                    self._collective(j, "reduce-scatter" if scatters else kind, fused, times, overlaps=starts)
        if starts or awaits:
            return
        pairs = zip(self._parameters(fused), i.operands, strict=True)
        moved = sum(self._read(j, fused, self._type(o, computation)) for j, o in pairs)
        moved += self._written(root, fused, i.results)
        self._add(i, times, self._all_flops(fused), moved)

    def _parameters(self, fused: str) -> list[Instruction]:
        parameters = (i for i in self._computations[fused] if i.opcode == "parameter")
        return sorted(parameters, key=lambda i: int(i.arguments))

    def _all_flops(self, fused: str) -> float:
        inside = self._computations[fused]
        nested = sum(self._all_flops(hlo.called_computations(j)["calls"][0]) for j in inside if j.opcode == "fusion")
        return nested + sum(self._flops(j, fused) for j in inside)

    def _read(self, parameter: Instruction, fused: str, outer: str) -> int:
        """Return the bytes that a fusion reads of one operand: of a stacked array only its slices."""
        whole = shape_bytes(outer)
        return min(self._sliced(parameter, fused, whole), whole) if whole else 0

    def _sliced(self, parameter: Instruction, fused: str, whole: int) -> int:
        total = 0
        for user, position in self._users(parameter.name, fused):
            if user.opcode in ("dynamic-slice", "gather", "slice") and position == 0:
                total += shape_bytes(user.results, everywhere=True)
            elif user.opcode == "fusion":
                nested = hlo.called_computations(user)["calls"][0]
                total += self._sliced(self._parameters(nested)[position], nested, whole)
            elif not (user.opcode in _UPDATES and position == 0):
                total += whole
        return total

    def _users(self, name: str, computation: str) -> Iterator[tuple[Instruction, int]]:
        for user in self._computations[computation]:
            if name in user.operands:
                if user.opcode == "bitcast":
                    yield from self._users(user.name, computation)
                else:
                    yield user, user.operands.index(name)

    def _written(self, root: Instruction, fused: str, results: str) -> int:
        """Return the bytes that a fusion writes: of an array updated in place only the update."""
        if not shape_bytes(results):
            return 0
        named = self._named[fused]
        while root.opcode == "bitcast" and root.operands:
            root = named[root.operands[0]]
        if root.opcode == "tuple":
            return sum(self._written(named[o], fused, named[o].results) for o in root.operands)
        if root.opcode in _UPDATES:
            return shape_bytes(named[root.operands[_UPDATES[root.opcode]]].results, everywhere=True)
        return shape_bytes(root.results)

    def _moved(self, i: Instruction, computation: str) -> int:
        results = shape_bytes(i.results)
        if i.opcode in ("dynamic-slice", "slice", "gather"):
            return results + shape_bytes(i.results, everywhere=True)
        if i.opcode in _UPDATES:
            return 2 * shape_bytes(self._type(i.operands[_UPDATES[i.opcode]], computation), everywhere=True)
        if i.opcode == "copy-start":  # its result includes source and destination
            return results
        if i.opcode.endswith("slice-start"):  # its result includes the array and the slice
            return [shape_bytes(array[0], everywhere=True) for array in _SHAPE.finditer(i.results)][1]
        if i.opcode in ("send", "recv", "infeed", "outfeed") or (i.opcode == "custom-call" and not _is_product(i)):
            return 0
        return results + sum(shape_bytes(self._type(name, computation)) for name in i.operands)

    def _flops(self, i: Instruction, computation: str) -> float:
        """Return the FLOPs of a matrix product: a convolution on TPU, a library call on GPU."""
        if i.opcode not in ("dot", "convolution") and not _is_product(i):
            return 0.0
        left, right = (_dimensions(self._type(name, computation)) for name in i.operands[:2])
        out = math.prod(_dimensions(i.results))
        if i.opcode != "convolution":
            dimensions = r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)'
            contracted = re.search(dimensions, i.attributes)
            return 2.0 * out * math.prod(left[int(d)] for d in re.findall(r"\d+", contracted[1])) if contracted else 0.0
        labels = re.search(r"dim_labels=\w+_(\w+)->", i.attributes)
        if labels is None:
            return 0.0
        # Each output element sums over the kernel's input features and its window.
        return 2.0 * out * math.prod(n for n, label in zip(right, labels[1], strict=True) if label != "o")

    def _type(self, name: str, computation: str) -> str:
        found = self._named[computation].get(name)
        return found.results if found else ""


def _is_product(i: Instruction) -> bool:
    return i.opcode == "custom-call" and re.search(r'custom_call_target="[^"]*(gemm|matmul)', i.attributes) is not None


def _collective_kind(opcode: str) -> str | None:
    name = opcode.removesuffix("-start")
    return name.removeprefix("ragged-") if name in _COLLECTIVES else None


def replica_groups(attributes: str) -> list[list[int]]:
    """Return the replica groups of a collective, in any of three notations; pairs for a permute; [] for all devices."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}\s]*\})\}", attributes):
        return [[int(k) for k in group.split(",") if k.strip()] for group in re.findall(r"\{([\d,\s]*)\}", listed[1])]
    if axes := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        return _groups_along(axes[1], axes[2])
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota is None:
        return []
    shape = [int(n) for n in iota[1].split(",")]
    sizes = [int(n) for n in iota[2].split(",")]
    order = [int(n) for n in iota[3].split(",")] if iota[3] else list(range(len(sizes)))
    return _groups(sizes, order, shape[-1])


def _groups_along(mesh: str, along: str) -> list[list[int]]:
    """Return groups along axes of a mesh: "'a'=4,'b'=2" and "'b'", or part of an axis, "'a':(2)2": size 2 after 2."""
    parts = {name: (int(before), int(size)) for name, before, size in re.findall(r"'(\w+)':\((\d+)\)(\d+)", along)}
    sizes: list[int] = []
    chosen: list[int] = []
    for name, text in re.findall(r"'(\w+)'=(\d+)", mesh):
        before, inside = parts.get(name, (1, int(text)))
        if f"'{name}'" in along:
            chosen.append(len(sizes) + 1)
        sizes += [before, inside, int(text) // (before * inside)]
    others = [axis for axis in range(len(sizes)) if axis not in chosen]
    return _groups(sizes, [*others, *chosen], math.prod(sizes[axis] for axis in chosen))


def _groups(sizes: Sequence[int], order: Sequence[int], length: int) -> list[list[int]]:
    """Enumerate the devices of an array of `sizes`, transpose it by `order`, and split it into groups of `length`."""
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(-1, length).tolist()
