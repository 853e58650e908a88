"""Checks and times the ops on this machine's GPU; prints registers and spills for an absent one.

On a GPU, one process checks every implementation against the reference loop in float64 and then times those that
agree, and the CUDA baselines if they are installed. Failures are named and the rest is still measured.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cuda_baselines import CUDA_BASELINES
from benchmarks.kernels import OPS, KernelsBenchmark, shape, title
from biomamba_jax.errors import UserError
from biomamba_jax.hardware import find_chip
from biomamba_jax.ops import dispatch
from biomamba_jax.planning.kernels import D_STATE, HEADDIM, SSD_D_STATE, build
from biomamba_jax.tables import Table, print_tables

_IMPLEMENTATIONS = ("xla", "pallas_gpu", "triton")
_CHUNK = 64
_CHECK: Mapping[str, Any] = {"rows": 2, "length": 300, "channels": 256, "segments": True}
# Relative to the largest value: inputs and products are rounded to 8 bits; A's gradient sums terms of both signs.
_TOLERANCE = 2**-5
_REPEATS, _LEAST_SECONDS = 5, 0.2
_DIRECTIONS = ("forward", "forward and backward")
_SETS = 8  # of arguments used in turns, so that none is still in the GPU's cache


@dataclasses.dataclass(frozen=True)
class Timing:
    """Time of one implementation."""

    op: str
    """Name of the op."""
    implementation: str
    """Name of the implementation or of another project."""
    direction: str
    """One of `_DIRECTIONS`."""
    seconds: float
    """Seconds of one call, the fastest of several rounds."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """An implementation that raised an exception."""

    op: str
    """Name of the op."""
    implementation: str
    """Name of the implementation."""
    reason: str
    """First line of the exception."""

    def __str__(self) -> str:
        return f"{self.op} by {self.implementation} fails: {self.reason}"


def measure_kernels_gpu(settings: KernelsBenchmark) -> None:
    """Print error and speed of every implementation.

    Raises:
      UserError: JAX finds no GPU, or, after everything is printed, an implementation is inaccurate or fails.
    """
    if jax.default_backend() not in ("gpu", "cuda"):
        raise UserError(
            f"target gpu: JAX finds no GPU in this machine (it runs on {jax.default_backend()});"
            " for the registers and spills of kernels without one give --target sm_80, sm_90 or sm_100"
        )
    device = jax.devices()[0]
    print(f"{device.device_kind}, compute capability {dispatch.compute_capability()}")
    for op in OPS:
        for name in _IMPLEMENTATIONS:
            if reason := _why_absent(op, name):
                print(f"{op}, {name}: left out: {reason}")
    checks: list[tuple[str, ...]] = []
    faults: list[str] = []
    right: list[tuple[str, str]] = []
    for op, name, errors in _errors():
        if isinstance(errors, Failure):
            faults.append(str(errors))
            continue
        worst = max((k for k in errors if k != "y"), key=lambda k: errors[k])
        checks.append((op, name, f"{errors['y']:.1e}", f"{errors[worst]:.1e}", worst))
        if all(error <= _TOLERANCE for error in errors.values()):  # NaN is wrong too
            right.append((op, name))
        else:
            faults.append(f"{op} by {name} is wrong by more than {_TOLERANCE:.0e}")
    columns = ("op", "implementation", "y", "worst gradient", "of")
    heading = "largest error over largest value of the float64 reference, bfloat16 inputs"
    print_tables([Table(columns, checks, heading, left=range(5))])
    timings: list[Timing] = []
    for found in _timings(settings, right):
        if isinstance(found, Timing):
            timings.append(found)
        else:
            faults.append(str(found))
    timings += _baseline_timings(settings)
    _show_timings(settings, timings)
    if faults:
        raise UserError("; ".join(faults))


def _why_absent(op: str, implementation: str) -> str | None:
    """Return why an implementation is not available here, or None."""
    try:
        function, arguments = build(op, implementation, gradient=False, devices=None, **_CHECK)
        jax.eval_shape(lambda *a: function(*a), *arguments)
    except UserError as e:
        return str(e)
    return None


def _present(op: str) -> list[str]:
    return [name for name in _IMPLEMENTATIONS if _why_absent(op, name) is None]


def random_arguments(op: str, seed: int, **shape: Any) -> tuple[Any, ...]:
    """Draw arguments of the functions that `build` returns: typical magnitudes, documents of about 100 tokens."""
    random = np.random.default_rng(seed)
    arrays, ids, *rest = build(op, None, gradient=True, devices=None, **shape)[1]

    def draw(name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        values = random.standard_normal(like.shape, np.float32)
        if name == "A":
            values = -np.exp(values)
        if name == "dt":
            values = values - 2
        return jnp.asarray(values, like.dtype)

    made = {name: draw(name, like) for name, like in arrays.items()}
    if ids is not None:
        ids = jnp.asarray(np.cumsum(random.random(ids.shape) < 0.01, axis=1), jnp.int32)
    return made, ids, *(draw("dy", like) for like in rest)


def _errors() -> Iterator[tuple[str, str, Mapping[str, float] | Failure]]:
    """Yield for every implementation max|got - want| / max|want| of y and of each gradient."""
    for op in OPS:
        arguments = random_arguments(op, 0, **_CHECK)
        with jax.enable_x64(True):
            double = jax.tree.map(lambda v: v.astype(jnp.float64) if v.dtype != jnp.int32 else v, arguments)
            want = _named(_function(op, "reference", _CHECK)(*double))
        for name in _present(op):
            try:
                got = _named(_function(op, name, _CHECK)(*arguments))
            except Exception as e:  # of the compiler or the driver; the other implementations are still measured
                yield op, name, Failure(op, name, _first_line(e))
                continue
            yield op, name, {k: float(np.max(np.abs(got[k] - v)) / np.max(np.abs(v))) for k, v in want.items()}


def _first_line(e: Exception) -> str:
    return f"{type(e).__name__}: {(str(e).splitlines() or ['no message'])[0]}"


def _function(op: str, implementation: str, shape: Mapping[str, Any], gradient: bool = True) -> Callable[..., Any]:
    return jax.jit(build(op, implementation, gradient=gradient, devices=None, **shape)[0])


def _named(results: Any) -> dict[str, np.ndarray]:
    y, (gradients,) = results
    return {"y": np.asarray(y, np.float64)} | {k: np.asarray(v, np.float64) for k, v in gradients.items()}


def _timings(settings: KernelsBenchmark, right: Sequence[tuple[str, str]]) -> Iterator[Timing | Failure]:
    """Time each (op, implementation) in `right`."""
    for op in dict.fromkeys(op for op, _ in right):
        sets = _argument_sets(op, settings)
        for name in (name for of_op, name in right if of_op == op):
            alone, both = (_function(op, name, shape(settings), gradient) for gradient in (False, True))
            runs = (_in_turns(alone, [s[:2] for s in sets]), _in_turns(both, sets))
            try:
                seconds = [_seconds(run, jax.block_until_ready) / _SETS for run in runs]
            except Exception as e:  # for instance out of memory, at a larger shape than `_CHECK`
                yield Failure(op, name, _first_line(e))
            else:
                yield from (Timing(op, name, *found) for found in zip(_DIRECTIONS, seconds, strict=True))


def _baseline_timings(settings: KernelsBenchmark) -> Iterator[Timing]:
    for op, baseline in CUDA_BASELINES.items():
        if reason := baseline.why_absent():
            print(f"{op}, {baseline.name}: left out: {reason}")
            continue
        try:
            sets = [baseline.build(*arguments) for arguments in _argument_sets(op, settings)]
            runs = ([s.forward for s in sets], [s.both for s in sets])
            seconds = [_seconds(partial(_call_all, run), sets[0].wait) / _SETS for run in runs]
        except Exception as e:  # another project's code, whose installation may be broken
            print(f"{op}, {baseline.name}: left out: {_first_line(e)}")
        else:
            yield from (Timing(op, baseline.name, *found) for found in zip(_DIRECTIONS, seconds, strict=True))


def _call_all(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    return [call() for call in calls]


def _argument_sets(op: str, settings: KernelsBenchmark) -> list[tuple[Any, ...]]:
    """Return copies of the same values."""
    arguments = random_arguments(op, 0, **shape(settings))
    return [jax.tree.map(jnp.copy, arguments) for _ in range(_SETS)]


def _in_turns(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Callable[[], Any]:
    """Return one program that calls a function on each set in turn, so that launch overhead is negligible.

    A barrier makes each call wait for the previous call's results, so that temporary memory is that of one call.
    """

    @jax.jit
    def run(sets: Sequence[tuple[Any, ...]]) -> list[Any]:
        results: list[Any] = []
        for arguments in sets:
            if results:
                arguments, results[-1] = jax.lax.optimization_barrier((arguments, results[-1]))
            results.append(function(*arguments))
        return results

    return partial(run, sets)


def _seconds(run: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Return the seconds of one call while the next is already queued, as in training: launches are hidden.

    The results of at most two calls are alive: a longer queue would not fit into memory.
    """
    wait(run())
    start = time.perf_counter()
    wait(run())
    calls = max(2, math.ceil(_LEAST_SECONDS / (time.perf_counter() - start)))
    fastest = math.inf
    for _ in range(_REPEATS):
        start = time.perf_counter()
        before = run()
        for _ in range(calls - 1):
            before, last = run(), before
            wait(last)
            del last
        wait(before)
        del before
        fastest = min(fastest, (time.perf_counter() - start) / calls)
    return fastest


def work(op: str, direction: str, settings: KernelsBenchmark) -> tuple[float, float]:
    """Return the least (bytes, FLOPs of matrix products) that an op needs.

    Bytes: every large input and result once, two bytes each, without small arrays and residuals. FLOPs: those of the
    chunked algorithm with chunks of 64; gradients cost twice the forward pass.
    """
    tokens = settings.rows * settings.length
    heads = settings.channels // HEADDIM
    groups = heads if op == "ssd_mamba3" else 1
    ssd = (2, 3, groups * SSD_D_STATE)
    width = {"selective_scan": (4, 7, D_STATE), "ssd": ssd, "ssd_mamba3": ssd, "causal_conv1d": (2, 3, 0)}[op]
    both = direction != "forward"
    moved = width[0] + (width[1] if both else 0)
    states = (2 + (4 if both else 0)) * width[2]
    per_token = 0.0
    if op in ("ssd", "ssd_mamba3"):
        per_token = 2 * (heads * (_CHUNK * HEADDIM + 2 * SSD_D_STATE * HEADDIM) + groups * _CHUNK * SSD_D_STATE)
    return 2.0 * tokens * (moved * settings.channels + states), tokens * per_token * (3 if both else 1)


def _show_timings(settings: KernelsBenchmark, timings: list[Timing]) -> None:
    chip = find_chip(jax.devices()[0].device_kind)
    peak = chip.flops.get("bfloat16") if chip else None
    rows = []
    for timing in timings:
        moved, flops = work(timing.op, timing.direction, settings)
        bandwidth = f"{moved / timing.seconds / chip.bandwidth:.0%}" if chip else "unknown"
        tensor_cores = f"{flops / timing.seconds / peak:.0%}" if peak else "unknown"
        speeds = f"{timing.seconds * 1e3:.3f}", f"{settings.rows * settings.length / timing.seconds:,.0f}"
        shares = bandwidth, tensor_cores if flops else None
        rows.append((timing.op, timing.implementation, timing.direction, *speeds, *shares))
    columns = ("op", "implementation", "direction", "ms", "tokens/s", "share of bandwidth", "share of tensor cores")
    print_tables([Table(columns, rows, f"{title(settings)}: fastest of {_REPEATS} rounds", left=range(3))])


def print_static(settings: KernelsBenchmark) -> None:
    """Print the resources that the Triton kernels use on the architecture `settings.target`; needs no GPU.

    Raises:
      UserError: triton is not installed.
    """
    from benchmarks.triton_static import usages

    capability = int(settings.target.removeprefix("sm_"))
    rows = []
    for op, usage in usages(OPS, capability, **shape(settings)):
        figures = (f"{v:,}" if isinstance(v, int) else v for v in dataclasses.astuple(usage)[1:])
        rows.append((op, usage.kernel, *figures))
    columns = ("op", "Triton kernel", "programs", "warps", "registers", "shared bytes", "spilled bytes", "PTX")
    heading = f"{settings.target}, {title(settings)}: as compiled, not measured"
    print_tables([Table(columns, rows, heading, left=range(2))])
