"""Reads the cost of a program on one device from its jaxpr: FLOPs, kernels, saved activations.

The jaxpr rather than the compiled program, since kernels state their costs and loops their lengths there. Inside
`shard_map` shapes are per device; work outside is divided evenly over the devices.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import Literal

_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min")
_ELEMENTWISE = frozenset(
    "add sub mul div neg abs max min exp exp2 log log1p logistic tanh rsqrt sqrt pow integer_pow select_n and or xor "
    "not eq ne lt le gt ge convert_element_type".split()
)
_KERNELS = ("pallas_call", "mpmd_map", "triton_kernel_call")  # Pallas for TPU, Mosaic GPU, jax-triton


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a compiled program, or all calls of a kernel at one shape."""

    name: str
    """Name of the HLO instruction or of the kernel."""
    calls: int
    """Executions in a step."""
    flops: float
    """FLOPs of the matrix products of one execution."""
    bytes: float
    """Bytes that one execution reads and writes in device memory; of a kernel those of its operands and results."""
    vector_operations: float = 0.0
    """Float32 operations of one call of a kernel in vector units; without products, and a lower bound."""
    parallel: int = 1
    """Blocks of a kernel that several cores can share."""
    is_kernel: bool = False
    """True for a call of a kernel in a compiled program."""


@dataclasses.dataclass
class Costs:
    """Cost of one step on one device."""

    flops: float = 0.0
    """FLOPs of all matrix products, kernels and recomputation included."""
    kernels: list[Operation] = dataclasses.field(default_factory=list)
    """All calls of kernels."""
    saved_bytes: float = 0.0
    """Activations that loops over layers save in the forward pass for the backward pass."""


def program_costs(jaxpr: Any, devices: int = 1, layers: int | None = None) -> Costs:
    """Return the costs of a traced program on one device.

    Args:
      jaxpr: from `jax.jit(f).trace(...).jaxpr` or `jax.make_jaxpr`.
      devices: number of devices that work outside `shard_map` is divided over.
      layers: length of the loops whose stacked results are saved activations; None: no loop's are.
    """
    costs, calls = Costs(), collections.Counter[Operation]()
    for equation, times, share in _executed(getattr(jaxpr, "jaxpr", jaxpr), 1, 1 / devices):
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            costs.flops += times * share * _dot_flops(equation)
        elif name == "wgmma_ref":
            costs.flops += times * share * _tensor_core_flops(equation)
        elif name in _KERNELS:
            kernel = _kernel(equation)
            calls[kernel] += times
            costs.flops += times * kernel.flops
        elif name == "scan" and parameters["length"] == layers and share == 1 and not parameters["reverse"]:
            costs.saved_bytes += _stacked_bytes(equation)
    costs.kernels = [dataclasses.replace(kernel, calls=number) for kernel, number in calls.items()]
    return costs


def _executed(jaxpr: Any, times: int, share: float) -> Iterator[tuple[Any, int, float]]:
    """Yield every equation with how often it runs and the share of it that this device does."""
    for equation in jaxpr.eqns:
        yield equation, times, share
        name, parameters = equation.primitive.name, equation.params
        if name == "scan":
            yield from _executed(parameters["jaxpr"].jaxpr, times * parameters["length"], share)
        elif name == "cond":
            most_expensive = max(parameters["branches"], key=lambda branch: program_costs(branch).flops)
            yield from _executed(most_expensive.jaxpr, times, share)
        elif name not in _KERNELS:
            for inner in _inner_jaxprs(parameters):
                yield from _executed(inner, times, 1.0 if name == "shard_map" else share)


def _inner_jaxprs(parameters: Mapping[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _stacked_bytes(scan: Any) -> int:
    """Return the bytes of a scan's stacked outputs, which have one axis more than the body's; carries do not."""
    pairs = zip(scan.outvars, scan.params["jaxpr"].jaxpr.outvars, strict=True)
    return sum(_bytes(v) for v, of_step in pairs if v.aval.shape != of_step.aval.shape)


def _dot_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _tensor_core_flops(equation: Any) -> float:
    """Return the FLOPs of Hopper's `wgmma`: accumulator += left @ right; left may be a transformed reference."""
    total, left, trees = equation.invars[0].aval, equation.invars[1].aval, equation.params
    if (tree := trees["a_transforms_tree"]) is not None:
        first = 3 + (trees["acc_transforms_tree"].num_leaves if trees["acc_transforms_tree"] is not None else 0)
        leaves = [getattr(v, "val", v.aval) for v in equation.invars[first : first + tree.num_leaves]]
        for transform in jax.tree.unflatten(tree, leaves):
            left = transform.transform_type(left)
    return 2.0 * math.prod(total.shape) * left.shape[-1]


def _kernel(equation: Any) -> Operation:
    """Return one call of a kernel."""
    parameters, moved = equation.params, _all_bytes(equation)
    if equation.primitive.name == "triton_kernel_call":  # states no cost: only its bytes are known
        return Operation(str(parameters.get("name") or "triton"), 1, 0.0, moved, is_kernel=True)
    name = parameters.get("name") or getattr(parameters.get("name_and_src_info"), "name", None) or "kernel"
    if "meshes" in parameters:  # each warpgroup of a block has its own branch: all of them count
        ((mesh, jaxpr),) = zip(parameters["meshes"], parameters["jaxprs"], strict=True)
        return Operation(name, 1, program_costs(jaxpr).flops * math.prod(mesh.grid), moved, is_kernel=True)
    jaxpr, grid = parameters["jaxpr"], parameters["grid_mapping"].grid
    flops, vector = (math.prod(grid) * count for count in (program_costs(jaxpr).flops, vector_operations(jaxpr)))
    semantics = getattr(parameters["compiler_params"], "dimension_semantics", None) or ("arbitrary",) * len(grid)
    shared = (size for size, kind in zip(grid, semantics, strict=True) if kind in ("parallel", pltpu.PARALLEL))
    return Operation(name, 1, flops, moved, 0.0 if flops else vector, math.prod(shared), is_kernel=True)


def vector_operations(jaxpr: Any) -> float:
    """Return the least number of element operations in vector units that one run of a TPU kernel's body needs.

    What `pl.when` guards is left out, and so are copies, broadcasts and products with matrix units. A reduction takes
    as many operations as it removes elements; a read of a result of the transcendental unit is one.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        result: Any = equation.outvars[0].aval if equation.outvars else None
        if name == "scan":
            total += parameters["length"] * vector_operations(parameters["jaxpr"].jaxpr)
        elif name in _REDUCTIONS:
            total += equation.invars[0].aval.size - result.size
        elif name in _ELEMENTWISE and not any(isinstance(v, Literal) and v.val == 0 for v in equation.invars):
            total += result.size if result.size > 1 else 0  # scalars have a unit of their own
        elif name != "cond" and name not in _KERNELS:
            total += sum(map(vector_operations, _inner_jaxprs(parameters)))
    return total


def _all_bytes(equation: Any) -> float:
    return float(sum(map(_bytes, (*equation.invars, *equation.outvars))))


def _bytes(variable: Any) -> int:
    aval = variable.aval
    return math.prod(aval.shape) * jax.dtypes.itemsize_bits(aval.dtype) // 8 if hasattr(aval, "shape") else 0
