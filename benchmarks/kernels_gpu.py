"""The heavy operations on GPU: right and fast, on the one at hand; registers and spills, for one that is not there.

On a GPU, one process checks every implementation against the plain loop in float64 and then times those that are right,
and `mamba_ssm`'s CUDA kernels where they are installed. What fails is named and the rest is still measured.
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
from rich.table import Table

from benchmarks.cuda_baselines import CUDA_BASELINES
from benchmarks.kernels import KernelsBenchmark
from biomamba_jax.errors import UserError
from biomamba_jax.hardware import find_chip
from biomamba_jax.ops import dispatch
from biomamba_jax.planning.kernels import build
from biomamba_jax.tables import print_tables

_OPS = ("selective_scan", "ssd", "causal_conv1d")
_IMPLEMENTATIONS = ("xla", "pallas_gpu", "triton")
_D_STATE, _SSD_D_STATE, _HEADDIM, _CHUNK = 16, 128, 64, 64
_CHECK: Mapping[str, Any] = {"rows": 2, "length": 300, "channels": 256, "segments": True}
# Of the largest value: inputs and products are rounded to 8 bits, and the gradient of A sums terms of both signs.
_TOLERANCE = 2**-5
_REPEATS, _LEAST_SECONDS = 5, 0.2
_DIRECTIONS = ("forward", "forward and backward")
_SETS = 8  # of arguments that take turns: none is still in the GPU's cache from the time before


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call at the benchmark's shape, the fastest of several rounds."""

    op: str
    implementation: str
    direction: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Failure:
    """An implementation that ended with an exception."""

    op: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} by {self.implementation} fails: {self.reason}"


def measure_kernels_gpu(settings: KernelsBenchmark) -> None:
    """Prints whether every implementation is right, and how fast it is.

    Raises:
      UserError: JAX has no GPU here, or, after all else is printed, an implementation is wrong or fails.
    """
    if jax.default_backend() not in ("gpu", "cuda"):
        raise UserError(
            f"target gpu: JAX finds no GPU in this machine (it runs on {jax.default_backend()});"
            " for the registers and spills of kernels without one give --target sm_80, sm_90 or sm_100"
        )
    device = jax.devices()[0]
    print(f"{device.device_kind}, compute capability {dispatch.compute_capability()}")
    for op in _OPS:
        for name in _IMPLEMENTATIONS:
            if reason := _why_absent(op, name):
                print(f"{op}, {name}: left out: {reason}")
    check = Table(title="largest error beside the largest value of the plain loop in float64, bfloat16 inputs")
    for column in ("op", "implementation", "y", "worst gradient", "of"):
        check.add_column(column)
    faults: list[str] = []
    right: list[tuple[str, str]] = []
    for op, name, errors in _errors():
        if isinstance(errors, Failure):
            faults.append(str(errors))
            continue
        worst = max((k for k in errors if k != "y"), key=lambda k: errors[k])
        check.add_row(op, name, f"{errors['y']:.1e}", f"{errors[worst]:.1e}", worst)
        if all(error <= _TOLERANCE for error in errors.values()):  # NaN is wrong too
            right.append((op, name))
        else:
            faults.append(f"{op} by {name} is wrong by more than {_TOLERANCE:.0e}")
    print_tables([check])
    timings: list[Timing] = []
    for found in _timings(settings, right):
        if isinstance(found, Timing):
            timings.append(found)
        else:
            faults.append(str(found))
    timings += _peer_timings(settings)
    print_tables([_timings_table(settings, timings)])
    if faults:
        raise UserError("; ".join(faults))


def _why_absent(op: str, implementation: str) -> str | None:
    """Why an implementation can't be had here."""
    try:
        function, arguments = build(op, implementation, gradient=False, devices=None, **_CHECK)
        jax.eval_shape(lambda *a: function(*a), *arguments)
    except UserError as e:
        return str(e)
    return None


def _present(op: str) -> list[str]:
    return [name for name in _IMPLEMENTATIONS if _why_absent(op, name) is None]


def random_arguments(op: str, seed: int, **shape: Any) -> tuple[Any, ...]:
    """Values for what `kernels.build` takes: of a model's size, decays negative, documents of about 100 tokens."""
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
    """For every implementation: max|got - want| / max|want| of y and of each gradient."""
    for op in _OPS:
        arguments = random_arguments(op, 0, **_CHECK)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda v: v.astype(jnp.float64) if v.dtype != jnp.int32 else v, arguments)
            want = _named(_function(op, "reference", _CHECK)(*wide))
        for name in _present(op):
            try:
                got = _named(_function(op, name, _CHECK)(*arguments))
            except Exception as e:  # of the compiler or the driver: the others are of interest all the same
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
    """Of the (op, implementation) in `right`."""
    for op in dict.fromkeys(op for op, _ in right):
        sets = _argument_sets(op, settings)
        for name in (name for of_op, name in right if of_op == op):
            alone, both = (_function(op, name, _shape(settings), gradient) for gradient in (False, True))
            runs = (_in_turns(alone, [s[:2] for s in sets]), _in_turns(both, sets))
            try:
                seconds = [_seconds(run, jax.block_until_ready) / _SETS for run in runs]
            except Exception as e:  # out of memory, say, at a shape that `_CHECK` did not have
                yield Failure(op, name, _first_line(e))
            else:
                yield from (Timing(op, name, *found) for found in zip(_DIRECTIONS, seconds, strict=True))


def _peer_timings(settings: KernelsBenchmark) -> Iterator[Timing]:
    for op, peer in CUDA_BASELINES.items():
        if reason := peer.why_not():
            print(f"{op}, {peer.name}: left out: {reason}")
            continue
        try:
            sets = [peer.build(*arguments) for arguments in _argument_sets(op, settings)]
            runs = ([s.forward for s in sets], [s.both for s in sets])
            seconds = [_seconds(partial(_call_all, run), sets[0].wait) / _SETS for run in runs]
        except Exception as e:  # other people's code, in whatever state it is installed
            print(f"{op}, {peer.name}: left out: {_first_line(e)}")
        else:
            yield from (Timing(op, peer.name, *found) for found in zip(_DIRECTIONS, seconds, strict=True))


def _call_all(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    return [call() for call in calls]


def _shape(settings: KernelsBenchmark) -> dict[str, Any]:
    return {k: getattr(settings, k) for k in ("rows", "length", "channels", "segments")}


def _argument_sets(op: str, settings: KernelsBenchmark) -> list[tuple[Any, ...]]:
    """The same values in memory of their own."""
    arguments = random_arguments(op, 0, **_shape(settings))
    return [jax.tree.map(jnp.copy, arguments) for _ in range(_SETS)]


def _in_turns(function: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Callable[[], Any]:
    """One program that calls a function on each of the sets, one after the other: launching it costs next to nothing.

    The results of one call are awaited before the next one's arguments are read, so that the calls' temporary memory
    is that of one.
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
    """Seconds of one call, with the next one already waiting, as in a training step: launching it costs no time.

    No more than two calls' results are kept: those of a longer queue would not fit into memory.
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
    """(bytes, FLOPs of matrix products) that an op needs at least.

    Bytes: every input and result of the wide kind once, two bytes each; what is small or kept between the passes not.
    FLOPs: of the chunked algorithm with chunks of 64; those of the gradients are counted twice.
    """
    tokens = settings.rows * settings.length
    width = {"selective_scan": (4, 7, _D_STATE), "ssd": (2, 3, _SSD_D_STATE), "causal_conv1d": (2, 3, 0)}[op]
    both = direction != "forward"
    moved = width[0] + (width[1] if both else 0)
    narrow = (2 + (4 if both else 0)) * width[2]
    per_token = 0.0
    if op == "ssd":
        heads = settings.channels // _HEADDIM
        per_token = 2 * (heads * (_CHUNK * _HEADDIM + 2 * _SSD_D_STATE * _HEADDIM) + _CHUNK * _SSD_D_STATE)
    return 2.0 * tokens * (moved * settings.channels + narrow), tokens * per_token * (3 if both else 1)


def _timings_table(settings: KernelsBenchmark, timings: list[Timing]) -> Table:
    chip = find_chip(jax.devices()[0].device_kind)
    table = Table(
        title=f"batch {settings.rows} x {settings.length:,}, {settings.channels:,} channels, bfloat16"
        f"{', packed rows' if settings.segments else ''}: fastest of {_REPEATS} rounds"
    )
    for column in ("op", "implementation", "direction"):
        table.add_column(column)
    for column in ("ms", "tokens/s", "share of bandwidth", "share of tensor cores"):
        table.add_column(column, justify="right")
    for timing in timings:
        moved, flops = work(timing.op, timing.direction, settings)
        peak = chip.flops.get("bfloat16") if chip else None
        table.add_row(
            timing.op,
            timing.implementation,
            timing.direction,
            f"{timing.seconds * 1e3:.3f}",
            f"{settings.rows * settings.length / timing.seconds:,.0f}",
            f"{moved / timing.seconds / chip.bandwidth:.0%}" if chip else "unknown",
            "" if not flops else f"{flops / timing.seconds / peak:.0%}" if peak else "unknown",
        )
    return table


def print_static(settings: KernelsBenchmark) -> None:
    """Prints what Triton's kernels take of the architecture `settings.target`; needs no GPU.

    Raises:
      UserError: triton is not installed.
    """
    from benchmarks.triton_static import usages

    capability = int(settings.target.removeprefix("sm_"))
    shape = {k: getattr(settings, k) for k in ("rows", "length", "channels", "segments")}
    table = Table(
        title=f"{settings.target}, batch {settings.rows} x {settings.length:,}, {settings.channels:,} channels, "
        f"bfloat16{', packed rows' if settings.segments else ''}: as compiled, not measured"
    )
    for column in ("op", "Triton kernel", "programs", "warps", "registers", "shared bytes", "spilled bytes", "PTX"):
        table.add_column(column, justify="left" if column in ("op", "Triton kernel") else "right")
    for op, usage in usages(_OPS, capability, **shape):
        table.add_row(
            op, usage.kernel, *(f"{v:,}" if isinstance(v, int) else v for v in dataclasses.astuple(usage)[1:])
        )
    print_tables([table])
