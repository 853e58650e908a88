"""Launching, layouts and arithmetic of the Mosaic GPU kernels of all ops.

A layout maps an array to the registers of a warpgroup (128 threads); `plgpu.TilingTransform` and `SwizzleTransform` map
it to shared memory.
"""

import contextvars
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import jaxpr_as_fun

from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import LOG2_E

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
    """Run kernel(inputs, outputs, scratch), which receives trees of refs in place of the arguments given here.

    Args:
      kernel: the body of one block.
      inputs: tree of arrays; inside `shard_map` all must vary over the same mesh axes.
      outputs: tree of `jax.ShapeDtypeStruct`.
      scratch: tree of a block's shared memory and barriers.
      grid: axis name -> size; the kernel reads its index with `lax.axis_index`.
      name: the kernel's name in profiles.
      interpret: falsy, or parameters of the interpreter.
      warpgroups: warpgroups of a block; above 1 the kernel reads its own index with `lax.axis_index("warpgroup")`.

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
                # The kernels place barriers where memory is reused: one at every store would take most of the time.
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
    """Return run(*arrays), traced without the varying mesh axes that `shard_map` tracks.

    Inside the kernel, values read from refs of varying arrays would vary, and those from scratch would not.
    """
    axes = jax.typeof(arrays[0]).manual_axis_type.varying
    if not axes:
        return run(*arrays)
    traced = jax.make_jaxpr(run)(*(jax.ShapeDtypeStruct(v.shape, v.dtype) for v in arrays))
    return [jax.lax.pcast(v, tuple(axes), to="varying") for v in jaxpr_as_fun(traced)(*arrays)]


def interpreted() -> bool:
    """Return True if the kernel being traced is for the interpreter."""
    return _interpreted.get()


def slot(buffers: Any, index: Any) -> Any:
    """Return the refs of one slot of a tree of multi-buffered allocations; None stays None."""
    return type(buffers)(*(None if buffer is None else buffer.at[index] for buffer in buffers))


def to_layout(v: Array, layout: Any) -> Array:
    """Cast v to a register layout; directly after a load or a constructor, it is materialized in that layout."""
    return v if _interpreted.get() else plgpu.layout_cast(v, layout)  # the interpreter knows no layouts


def read(ref: Any, layout: Any = None) -> Array:
    """Load a ref, of global memory too, to registers; a scalar needs no layout."""
    if _interpreted.get():
        return ref[...]
    index = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()  # jax 0.12 takes none
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def broadcast(v: Array, shape: tuple[int, ...], axes: tuple[int, ...], layout: Any) -> Array:
    """Broadcast v, whose axes are `axes` of the result, to `shape` in `layout`."""
    return to_layout(jax.lax.broadcast_in_dim(v, shape, axes), layout)


def zeros(shape: tuple[int, ...], layout: Any) -> Array:
    """Return float32 zeros in a register layout."""
    return to_layout(jnp.zeros(shape, jnp.float32), layout)


def ds(index: Any, size: int) -> Any:
    """Return the slice of block `index` of blocks of `size`."""
    return pl.ds(index * size, size)


def reciprocal(v: Array) -> Array:
    """Return 1 / v of positive v to 3e-7 relative; an exact division takes several times as long."""
    root = jax.lax.rsqrt(v)
    return root * root


def sigmoid(v: Array) -> Array:
    """Return 1 / (1 + exp(-v))."""
    return reciprocal(1 + jnp.exp2(v * -LOG2_E))


def softplus(raw: Array) -> Array:
    """Return log(1 + exp(raw)) to 4e-7 relative, small steps included: log(1 + e) = 2 atanh(e / (2 + e)), a series."""
    e = jnp.exp2(jnp.abs(raw) * -LOG2_E)
    s = e * reciprocal(2 + e)
    square = s * s
    series = jnp.full_like(s, 1 / 11)
    for denominator in (9, 7, 5, 3, 1):
        series = series * square + 1 / denominator
    return jnp.maximum(raw, 0) + 2 * s * series
