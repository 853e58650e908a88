"""What the Mosaic GPU kernels of all ops share: how they are called, where values lie, and small arithmetic.

A kernel's arrays lie in the registers of a warpgroup, 128 threads, as a layout says; `plgpu.TilingTransform` and
`SwizzleTransform` say how they lie in shared memory.
"""

import contextvars
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxpr_as_fun

from biomamba_jax.ops.array_typing import Array

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453

_interpreted: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)


def call(
    kernel: Callable[[Any, Any, Any], None],
    inputs: Any,
    outputs: Any,
    scratch: Any,
    grid: dict[str, int],
    *,
    name: str,
    interpret: Any,
    warpgroups: int = 1,
) -> Any:
    """Runs kernel(inputs, outputs, scratch), called with trees of references in place of what is given here.

    Args:
      inputs: tree of arrays; inside `shard_map` all varying over the same mesh axes.
      outputs: tree of `jax.ShapeDtypeStruct`.
      scratch: tree of shared memory and barriers of a block.
      grid: sizes by the names that the kernel asks `lax.axis_index` for.
      interpret: falsy, or parameters of the interpreter.
      warpgroups: of a block; above 1 the kernel finds its own with `lax.axis_index("warpgroup")`.

    Returns:
      The arrays, as a tree like `outputs`.
    """
    arrays, in_tree = jax.tree.flatten(inputs)
    out_types, out_tree = jax.tree.flatten(outputs)
    allocations, scratch_tree = jax.tree.flatten(scratch)
    first_scratch = len(arrays) + len(out_types)

    def body(*refs: Any) -> None:
        kernel(
            jax.tree.unflatten(in_tree, refs[: len(arrays)]),
            jax.tree.unflatten(out_tree, refs[len(arrays) : first_scratch]),
            jax.tree.unflatten(scratch_tree, refs[first_scratch:]),
        )

    threads: dict[str, Any] = {} if warpgroups == 1 else {"num_threads": warpgroups, "thread_name": "warpgroup"}
    token = _interpreted.set(bool(interpret))
    try:
        run = plgpu.kernel(
            body,
            out_type=tuple(out_types),
            scratch_types=tuple(allocations),
            grid=tuple(grid.values()),
            grid_names=tuple(grid),
            compiler_params=plgpu.CompilerParams(
                approx_math=True,
                # Barriers stand where memory changes hands: one at every store would take most of the time.
                unsafe_no_auto_barriers=True,
                # Layouts are chosen by hand.
                lowering_semantics=plgpu.LoweringSemantics.Lane,
            ),
            interpret=interpret or None,
            kernel_name=name,
            **threads,
        )
        results = _hide_varying(run, arrays)
    finally:
        _interpreted.reset(token)
    return jax.tree.unflatten(out_tree, results)


def _hide_varying(run: Callable[..., Any], arrays: list[Array]) -> Any:
    """run(*arrays), where `shard_map` follows which values vary: inside a kernel none of that is known.

    References to arrays that vary would give values that vary, and scratch memory would not.
    """
    axes = jax.typeof(arrays[0]).manual_axis_type.varying
    if not axes:
        return run(*arrays)
    traced = jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in arrays))
    return [jax.lax.pcast(v, tuple(axes), to="varying") for v in jaxpr_as_fun(traced)(*arrays)]


def interpreted() -> bool:
    """Whether the kernel being traced is for the interpreter."""
    return _interpreted.get()


def lay(v: Array, layout: Any) -> Array:
    """v laid out in registers as said; right where it is loaded or made, the layout in which that is done."""
    return v if _interpreted.get() else plgpu.layout_cast(v, layout)  # the interpreter knows no layouts


def read(ref: Any, layout: Any = None) -> Array:
    """A reference's values in registers, of global memory too; a scalar needs no layout."""
    return ref[...] if _interpreted.get() else plgpu.load(ref, (), layout=layout, optimized=False)


def broadcast(v: Array, shape: tuple[int, ...], axes: tuple[int, ...], layout: Any) -> Array:
    """v along `axes` of an array of `shape`; `layout` is that of the result."""
    return lay(jax.lax.broadcast_in_dim(v, shape, axes), layout)


def zeros(shape: tuple[int, ...], layout: Any) -> Array:
    return lay(jnp.zeros(shape, jnp.float32), layout)


def ds(index: Any, size: int) -> Any:
    """Block number `index` of blocks of `size`."""
    return pl.ds(index * size, size)


def reciprocal(v: Array) -> Array:
    """1 / v of positive v, to 3e-7 relative: an exact division takes several times as long."""
    root = jax.lax.rsqrt(v)
    return root * root


def sigmoid(v: Array) -> Array:
    return reciprocal(1 + jnp.exp2(v * -LOG2_E))


def softplus(raw: Array) -> Array:
    """log(1 + exp(raw)), to 4e-7 relative: log(1 + e) = 2 atanh(e / (2 + e)), as a series. Small steps keep digits."""
    e = jnp.exp2(jnp.abs(raw) * -LOG2_E)
    s = e * reciprocal(2 + e)
    square = s * s
    series = jnp.full_like(s, 1 / 11)
    for denominator in (9, 7, 5, 3, 1):
        series = series * square + 1 / denominator
    return jnp.maximum(raw, 0) + 2 * s * series
