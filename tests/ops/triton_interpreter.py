"""Triton kernels on the CPU by Triton's own interpreter, which a process has to ask for before it imports triton.

The op runs in a second process; there, the kernels get numpy arrays and all around them is the op's own code.
"""

import concurrent.futures
import functools
import importlib
import multiprocessing
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from biomamba_jax.ops import triton_calls


def values_and_gradients(
    op: str,
    inputs: Mapping[str, jax.Array],
    names: Sequence[str],
    segment_ids: np.ndarray | None,
    constants: Mapping[str, int] | None = None,
    **rest: Any,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values and gradients by name of an op's Triton form; those of `names` that are not in `inputs` are left out.

    `constants` of the module are set to other values, since interpreting takes a millisecond for each operation.
    """
    arrays = {name: np.asarray(inputs[name]) for name in names if name in inputs}
    cotangents = (np.asarray(inputs["dy"]), np.asarray(inputs["d_final_state"]))
    return _process().submit(_compute, op, arrays, cotangents, segment_ids, constants or {}, rest).result()


def values_at_once(op: str, calls: Sequence[Mapping[str, jax.Array]], **rest: Any) -> list[np.ndarray]:
    """The op's first result for each of the inputs by name, by independent kernels of one compiled program."""
    return _process().submit(_compute_at_once, op, [jax.tree.map(np.asarray, dict(c)) for c in calls], rest).result()


def losses(kind: str, steps: int) -> list[float]:
    """`kernel_training.losses` with the kernels."""
    return _process().submit(_losses, kind, steps).result()


@functools.cache
def _process() -> concurrent.futures.ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=_interpret)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    triton_calls.call = _call

    # bfloat16 is kept as its bits, and triton 3.9.0 multiplies those: widen the factors of a product first.
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(factor: Any) -> Any:
        if factor.dtype.scalar != bfloat16:
            return factor
        return TensorHandle((factor.data.astype(np.uint32) << 16).view(np.float32), float32)

    def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(builder, widened(a), widened(b), *rest)

    InterpreterBuilder.create_dot = dot


class _Pointer:
    """What the interpreter asks of an argument that is an array."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype = array, str(array.dtype)

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "_Pointer":
        return self

    def cpu(self) -> "_Pointer":
        return self

    def copy_(self, other: Any) -> None:
        pass

    def new_empty(self, *_: Any, **__: Any) -> "_Pointer":
        return _Pointer(self.array)

    def set_(self, *_: Any) -> None:
        pass

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides


# For a kernel's time the interpreter puts functions of its own in place of triton.language's and keeps the place in the
# grid, for the whole process; but XLA may run a program's independent callbacks at the same time.
_one_kernel = threading.Lock()


def _call(kernel: Any, arguments: Any, *, outputs: Any, grid: Any, launch: Any, constants: Mapping[str, Any]) -> Any:
    """As `triton_calls.call`; what a kernel leaves unwritten is NaN."""

    def interpret(*arrays: Any) -> list[np.ndarray]:
        results = [np.full(o.shape, np.nan, o.dtype) for o in outputs]
        rest = iter([_Pointer(np.ascontiguousarray(np.asarray(v))) for v in arrays])
        given = [v if isinstance(v, int) else next(rest) for v in arguments]
        with _one_kernel:
            kernel[grid](*given, *map(_Pointer, results), **constants)
        return results

    arrays = [v for v in arguments if not isinstance(v, int)]
    if any(isinstance(v, jax.core.Tracer) for v in arrays):
        return jax.pure_callback(interpret, list(outputs), *arrays)
    return [jnp.asarray(v) for v in interpret(*arrays)]


def _compute(
    op: str,
    arrays: Mapping[str, np.ndarray],
    cotangents: tuple[np.ndarray, np.ndarray],
    segment_ids: np.ndarray | None,
    constants: Mapping[str, int],
    rest: Mapping[str, Any],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    module = importlib.import_module(f"biomamba_jax.ops.{op}.triton")
    Inputs = importlib.import_module(f"biomamba_jax.ops.{op}.inputs").Inputs
    for constant, value in constants.items():
        setattr(module, constant, value)
    run = functools.partial(getattr(module, op), **rest)
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    given = {k: jnp.asarray(v) for k, v in arrays.items()}
    left_out = {"dt": None} if "dt" in Inputs._fields else {}
    (y, state), pull_back = jax.vjp(lambda a: run(Inputs(**left_out | a, segment_ids=ids)), given)
    (gradients,) = pull_back(tuple(map(jnp.asarray, cotangents)))
    values = {"y": np.asarray(y), "final_state": np.asarray(state)}
    return values, {k: np.asarray(v) for k, v in gradients.items()}


def _compute_at_once(op: str, calls: Sequence[Mapping[str, np.ndarray]], rest: Mapping[str, Any]) -> list[np.ndarray]:
    run = functools.partial(getattr(importlib.import_module(f"biomamba_jax.ops.{op}.triton"), op), **rest)
    Inputs = importlib.import_module(f"biomamba_jax.ops.{op}.inputs").Inputs
    program = jax.jit(lambda all: [run(Inputs(**{"segment_ids": None, **given}))[0] for given in all])
    return [np.asarray(value) for value in program(calls)]


def _losses(kind: str, steps: int) -> list[float]:
    from biomamba_jax.ops.selective_scan import triton
    from tests.ops import kernel_training

    triton.CHUNK = kernel_training.LENGTH
    return kernel_training.losses(kind, "triton", steps, kernel_training.SIZES["triton"])
