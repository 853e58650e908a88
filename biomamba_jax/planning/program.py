"""Reads the schedule of a compiled program from its text: operations and collectives in the order of execution.

The text is `jax.stages.Compiled.as_text()`: one device's program, loops with their trip counts. Operations inside a
fusion cause no memory traffic; a slice of a stacked array counts as the slice, not as the array; buffers in on-chip
memory do not count.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from biomamba_jax.planning import hlo
from biomamba_jax.planning.costs import Operation
from biomamba_jax.planning.hlo import Instruction
from biomamba_jax.planning.links import Places, Route
from biomamba_jax.planning.schedule import Collective, Item, Loop, Wait

_BITS = {"pred": 8, "s4": 4, "u4": 4, "token": 0, "opaque": 0}
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id iota opt-barrier domain "
    "async-update recv".split()
)
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""Operations that update their first operand in place -> position of the operand that they write."""
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "ragged-all-to-all")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^{}]*\})?")


def shape_bytes(text: str, everywhere: bool = False) -> int:
    """Return the bytes of all arrays in a shape, tuples included; arrays in on-chip memory only if `everywhere`.

    Arrays of TPUs with the padding of their tiles, which is stored and sent like the rest.
    """
    arrays = (array for array in _SHAPE.finditer(text) if everywhere or not re.search(r"S\([1-9]", array[3] or ""))
    return sum(math.prod(_tiled(_dimensions(array[0]), array[3] or "")) * _bits(array[1]) // 8 for array in arrays)


def _tiled(sizes: list[int], layout: str) -> list[int]:
    """Return the sizes of an array padded to whole tiles: `layout` is {minor to major:T(sizes of a tile)...}."""
    order, tile = (re.search(pattern, layout) for pattern in (r"\{([\d,]+)", r":T\(([\d,]+)\)"))
    if not order or not tile:
        return sizes
    padded = list(sizes)
    for axis, size in zip(map(int, order[1].split(",")), map(int, reversed(tile[1].split(","))), strict=False):
        padded[axis] = -(-sizes[axis] // size) * size
    return padded


def _bits(dtype: str) -> int:
    width = re.search(r"\d+", dtype)
    return _BITS.get(dtype, int(width[0]) if width else 32)


def _dimensions(text: str) -> list[int]:
    """Return the dimensions of the first array in a shape."""
    match = _SHAPE.search(text)
    return [int(size) for size in match[2].split(",") if size] if match else []


class Program:
    """Schedule of one device in one step; of kernels only their names and bytes, since their costs are in the jaxpr."""

    def __init__(self, text: str, places: Places) -> None:
        """Read a compiled module.

        Args:
          text: text of the optimized module.
          places: where its devices are.
        """
        self._computations, entry = hlo.parse(text)
        self._named = {name: {i.name: i for i in body} for name, body in self._computations.items()}
        self._places = places
        self.schedule = self._walk(entry)
        """Items that the device runs, in order."""

    def _walk(self, computation: str, on_sparse_core: bool = False) -> tuple[Item, ...]:
        """Return the schedule of a computation; collectives that run on SparseCores end where they are awaited."""
        instructions = self._computations.get(computation, ())
        return tuple(item for i in instructions for item in self._items(i, computation, on_sparse_core))

    def _items(self, i: Instruction, computation: str, on_sparse_core: bool) -> Sequence[Item]:
        """Return the schedule of an instruction."""
        called = hlo.called_computations(i)
        if hlo.is_kernel(i):
            sizes = (shape_bytes(self._type(name, computation), everywhere=True) for name in i.operands)
            size = sum(sizes) + shape_bytes(i.results, everywhere=True)
            return [Operation(i.name, 1, 0.0, size, is_kernel=True)]
        if i.opcode == "while":
            return [Loop(self._trips(i, computation), self._walk(called["body"][0], on_sparse_core))]
        if i.opcode in ("call", "async-start") or "called_computations" in called:
            return self._called(i, next(iter(called.values()), []), on_sparse_core)
        if i.opcode == "conditional":
            branches = [*called.get("branch_computations", ()), *called.get("true_computation", ())]
            return self._walk(branches[0], on_sparse_core) if branches else ()
        if kind := _collective_kind(i.opcode):
            return self._collective(i, kind, computation, on_sparse_core or i.opcode.endswith("-start"))
        if i.opcode.endswith("-done") and i.operands:
            return [Wait(self._started_by(i, computation))]
        if i.opcode == "send":
            return self._send(i, computation)
        if i.opcode == "fusion":
            return self._fusion(i, computation, called["calls"][0])
        if i.opcode in _FREE:
            return ()
        return self._operation(i, self._flops(i, computation), self._moved(i, computation))

    def _called(self, i: Instruction, computations: Sequence[str], on_sparse_core: bool) -> list[Item]:
        """Return the schedule of a call; collectives that it starts are awaited by its own name."""
        starts = i.opcode == "async-start"
        items = [item for name in computations for item in self._walk(name, on_sparse_core or starts)]
        if not starts:
            return items
        return [dataclasses.replace(item, name=i.name) if isinstance(item, Collective) else item for item in items]

    def _operation(self, i: Instruction, flops: float, moved: float) -> list[Item]:
        return [Operation(i.name, 1, flops, moved)] if flops or moved else []

    def _trips(self, i: Instruction, computation: str) -> int:
        """Return the trip count; if it is unknown, the bound in the loop's condition: a plan is an estimate."""
        try:
            return hlo.trip_count(i, self._computations[computation], self._computations)
        except hlo.UnknownTripCountError:
            condition = self._computations[hlo.called_computations(i)["condition"][0]]
            bounds = [int(j.arguments) for j in condition if j.opcode == "constant" and j.arguments.isdigit()]
            return max(bounds, default=1)

    # --- Collectives -------------------------------------------------------------------------------------------------

    def _collective(self, i: Instruction, kind: str, computation: str, overlaps: bool) -> list[Collective]:
        operands = sum(shape_bytes(self._type(name, computation), everywhere=True) for name in i.operands)
        results = shape_bytes(i.results, everywhere=True)
        size = results if kind == "all-gather" else operands
        if kind == "all-gather" and i.opcode.endswith("-start"):  # its result includes its operand
            size -= operands
        groups = replica_groups(i.attributes) or [list(range(len(self._places.slices)))]
        pairs = kind == "collective-permute"
        group = max(map(len, groups)) if not pairs else 2
        return self._found(i.name, kind, size, group, self._places.route(groups, pairs), overlaps)

    def _send(self, i: Instruction, computation: str) -> list[Collective]:
        """Return a collective between TPU slices, which goes through the hosts: each device sends its shard."""
        name, slices = _rendezvous(i), len(set(self._places.slices))
        if slices > 1 and (kind := _collective_kind(re.sub(r"[-.\d_]*$", "", name))):
            size = shape_bytes(self._type(i.operands[0], computation), everywhere=True)
            return self._found(name, kind, size, slices, Route("network", 1.0), True)
        return []

    def _found(self, name: str, kind: str, size: int, group: int, route: Route, overlaps: bool) -> list[Collective]:
        return [Collective(kind, 1, size, group, route, overlaps, name)] if group > 1 and size else []

    def _started_by(self, i: Instruction, computation: str) -> str:
        """Return the name of the collective that `i` awaits, if it is one."""
        if i.opcode == "fusion":  # between the two stand the fusions that it overlaps with
            return i.name.replace("-done", "-start")
        while i.operands and i.opcode not in ("send", "recv") and not i.opcode.endswith("-start"):
            i = self._named[computation][i.operands[0]]
        return _rendezvous(i) or i.name

    # --- Work --------------------------------------------------------------------------------------------------------

    def _fusion(self, i: Instruction, computation: str, fused: str) -> list[Item]:
        inside = self._computations[fused]
        root = next(j for j in inside if j.is_root)
        # TPU: a collective that overlaps with products appears in the fusion that starts it, in each fusion that it
        # overlaps with, and in the fusion that awaits it.
        starts, awaits = (i.name.startswith(f"async-collective-{end}") for end in ("start", "done"))
        if awaits:
            return [Wait(self._started_by(i, computation))]
        found: list[Item] = []
        if not fused.startswith("async_collective_fusion"):
            for j in inside:
                if kind := _collective_kind(j.opcode):
                    # TPU: an all-reduce of which the fusion keeps one shard is a reduce-scatter.
                    scatters = kind == "all-reduce" and root.opcode == "dynamic-slice" and root.operands[0] == j.name
                    each = self._collective(j, "reduce-scatter" if scatters else kind, fused, overlaps=starts)
                    found += (dataclasses.replace(c, name=i.name) for c in each)
        if starts:
            return found
        pairs = zip(self._parameters(fused), i.operands, strict=True)
        moved = sum(self._read(j, fused, self._type(o, computation)) for j, o in pairs)
        moved += self._written(root, fused, i.results)
        return found + self._operation(i, self._all_flops(fused), moved)

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
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
        if labels is None:
            return 0.0
        array, kernel, product = (
            dict(zip(names, sizes, strict=True))
            for names, sizes in zip(labels.groups(), (left, right, _dimensions(i.results)), strict=True)
        )
        # Each output element sums over the kernel's input features and those of its window that lie in the array.
        inside = _window_positions(i.attributes, array, kernel, product)
        return 2.0 * product["b"] * product["f"] * kernel["i"] * inside

    def _type(self, name: str, computation: str) -> str:
        found = self._named[computation].get(name)
        return found.results if found else ""


def _window_positions(attributes: str, array: dict[str, int], kernel: dict[str, int], out: dict[str, int]) -> int:
    """Return the number of (output position, window position) pairs of a convolution that read an element.

    On TPU a product over heads is a convolution whose window is as large as its padding: most of it reads nothing.

    Args:
      attributes: of the instruction, with its window.
      array: size of each dimension, by its label; spatial ones are digits.
      kernel: likewise.
      out: likewise.
    """
    window = re.search(r"window=\{([^}]*)\}", attributes)
    stated = dict(re.findall(r"(\w+)=([\w-]+)", window[1] if window else ""))
    total = 1
    for axis in sorted(label for label in out if label.isdigit()):

        def of(key: str, default: str, at: int = int(axis)) -> str:
            return stated[key].split("x")[at] if key in stated else default

        stride, dilation, spread = (int(of(key, "1")) for key in ("stride", "rhs_dilate", "lhs_dilate"))
        first = np.arange(out[axis])[:, None] * stride - int(of("pad", "0_0").split("_")[0])
        read = first + np.arange(kernel[axis]) * dilation
        total *= int(((read >= 0) & (read <= (array[axis] - 1) * spread) & (read % spread == 0)).sum())
    return total


def _is_product(i: Instruction) -> bool:
    return i.opcode == "custom-call" and re.search(r'custom_call_target="[^"]*(gemm|matmul)', i.attributes) is not None


def _rendezvous(i: Instruction) -> str:
    """Return the name that the two ends of a host transfer share; "" if it is none."""
    found = re.search(r'host_transfer_rendezvous="([^"]+)', i.attributes)
    return found[1] if found else ""


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
