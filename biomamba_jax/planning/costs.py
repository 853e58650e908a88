"""Reads the cost of a program on one device from its jaxpr: FLOPs, kernels, saved activations.

The jaxpr rather than the compiled program, since kernels state their costs and loops their lengths there. Inside
`shard_map` shapes are per device; work outside is divided evenly over the devices.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """Calls of one kernel at one shape."""

    name: str
    """Name of the kernel."""
    calls: int
    """Calls in a step."""
    flops: float
    """FLOPs of the matrix products of one call."""
    vector_operations: float
    """Vector operations of one call, as the kernel states them; 0 if it states none."""
    bytes: float
    """Bytes of the operands and results of one call."""


@dataclasses.dataclass
class Costs:
    """Cost of one step on one device."""

    flops: float = 0.0
    """FLOPs of all matrix products, kernels and recomputation included."""
    kernels: list[KernelCall] = dataclasses.field(default_factory=list)
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
    costs = Costs()
    found: dict[tuple[Any, ...], int] = {}
    _walk(getattr(jaxpr, "jaxpr", jaxpr), 1, 1 / devices, layers, costs, found)
    costs.kernels = [KernelCall(key[0], calls, *key[1:]) for key, calls in found.items()]
    return costs


def _walk(jaxpr: Any, times: int, share: float, layers: int | None, costs: Costs, found: dict[Any, int]) -> None:
    """Add `times` runs of `jaxpr`, of which this device does `share`."""
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            costs.flops += times * share * _dot_flops(equation)
        elif name == "wgmma_ref":
            costs.flops += times * share * _tensor_core_flops(equation)
        elif name in ("pallas_call", "mpmd_map"):  # Pallas for TPU; Mosaic GPU
            kernel = _kernel(equation)
            found[kernel] = found.get(kernel, 0) + times
            costs.flops += times * kernel[1]
        elif name == "triton_kernel_call":  # states no cost: only its bytes are known
            kernel = str(parameters.get("name") or "triton"), 0.0, 0.0, _all_bytes(equation)
            found[kernel] = found.get(kernel, 0) + times
        elif name == "scan":
            body = parameters["jaxpr"].jaxpr
            if parameters["length"] == layers and share == 1 and not parameters["reverse"]:
                costs.saved_bytes += sum(map(_bytes, _stacked(equation, body)))
            _walk(body, times * parameters["length"], share, layers, costs, found)
        elif name == "cond":  # the most expensive branch
            branches = [program_costs(branch) for branch in parameters["branches"]]
            heaviest = max(range(len(branches)), key=lambda i: branches[i].flops)
            _walk(parameters["branches"][heaviest].jaxpr, times, share, layers, costs, found)
        else:
            for inner in _inner_jaxprs(parameters):
                _walk(inner, times, 1.0 if name == "shard_map" else share, layers, costs, found)


def _inner_jaxprs(parameters: Mapping[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


def _stacked(equation: Any, body: Any) -> Iterator[Any]:
    """Yield a scan's stacked outputs, which have one axis more than the body's; carries have the same shape."""
    for variable, of_step in zip(equation.outvars, body.outvars, strict=True):
        if variable.aval.shape != of_step.aval.shape:
            yield variable


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


def _kernel(equation: Any) -> tuple[str, float, float, float]:
    """Return name, FLOPs of matrix products, vector operations and bytes of one call."""
    parameters = equation.params
    name = parameters.get("name") or parameters["name_and_src_info"].name
    if "meshes" in parameters:  # each warpgroup of a block has its own branch: all of them count
        ((mesh, jaxpr),) = zip(parameters["meshes"], parameters["jaxprs"], strict=True)
        grid = mesh.grid
    else:
        jaxpr, grid = parameters["jaxpr"], parameters["grid_mapping"].grid
    inside = program_costs(jaxpr)
    flops = inside.flops * math.prod(grid)
    stated = parameters.get("cost_estimate")
    vector = 0.0 if stated is None or flops else float(stated.flops)
    return name, flops, vector, _all_bytes(equation)


def _all_bytes(equation: Any) -> float:
    return float(sum(map(_bytes, (*equation.invars, *equation.outvars))))


def _bytes(variable: Any) -> int:
    aval = variable.aval
    return math.prod(aval.shape) * jax.dtypes.itemsize_bits(aval.dtype) // 8 if hasattr(aval, "shape") else 0
