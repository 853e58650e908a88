"""The heavy operations on GPU: right and fast, on the one at hand; registers and spills, for one that is not there.

On a GPU, one process checks every implementation against the plain loop in float64 and then times all of them, and
`mamba_ssm`'s CUDA kernels where they are installed.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from biomamba_jax.errors import UserError
from biomamba_jax.measure.cuda_peers import PEERS, Peer
from biomamba_jax.measure.kernels import KernelsBenchmark, build
from biomamba_jax.ops import dispatch
from biomamba_jax.parallel.hardware import find_chip
from biomamba_jax.train.progress import print_tables

_OPS = ("selective_scan", "ssd", "causal_conv1d")
_IMPLEMENTATIONS = ("xla", "pallas_gpu", "triton")
_D_STATE, _SSD_D_STATE, _HEADDIM, _CHUNK = 16, 128, 64, 64
_CHECK: Mapping[str, Any] = {"rows": 2, "length": 300, "channels": 256, "segments": True}
# Of the largest value: inputs and products are rounded to 8 bits, and the gradient of A sums terms of both signs.
_TOLERANCE = 2**-5
_REPEATS, _LEAST_SECONDS = 5, 0.2


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call at the benchmark's shape, the fastest of several rounds."""

    op: str
    implementation: str
    direction: str
    seconds: float


def measure_kernels_gpu(settings: KernelsBenchmark) -> None:
    """Prints whether every implementation is right, and how fast it is.

    Raises:
      UserError: JAX has no GPU here, or an implementation is wrong.
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
    wrong = []
    for op, name, errors in _errors():
        worst = max((k for k in errors if k != "y"), key=lambda k: errors[k])
        check.add_row(op, name, f"{errors['y']:.1e}", f"{errors[worst]:.1e}", worst)
        if not all(error <= _TOLERANCE for error in errors.values()):  # NaN is wrong too
            wrong.append(f"{op} by {name}")
    print_tables([check])
    if wrong:
        raise UserError(f"wrong by more than {_TOLERANCE:.0e}: {', '.join(wrong)}; speed is of no interest then")
    print_tables([_timings_table(settings, list(_timings(settings)))])


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


def _errors() -> Iterator[tuple[str, str, Mapping[str, float]]]:
    """For every implementation: max|got - want| / max|want| of y and of each gradient."""
    for op in _OPS:
        arguments = random_arguments(op, 0, **_CHECK)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda v: v.astype(jnp.float64) if v.dtype != jnp.int32 else v, arguments)
            want = _named(_function(op, "reference", _CHECK)(*wide))
        for name in _present(op):
            got = _named(_function(op, name, _CHECK)(*arguments))
            yield op, name, {k: float(np.max(np.abs(got[k] - v)) / np.max(np.abs(v))) for k, v in want.items()}


def _function(op: str, implementation: str, shape: Mapping[str, Any], gradient: bool = True) -> Callable[..., Any]:
    return jax.jit(build(op, implementation, gradient=gradient, devices=None, **shape)[0])


def _named(results: Any) -> dict[str, np.ndarray]:
    y, (gradients,) = results
    return {"y": np.asarray(y, np.float64)} | {k: np.asarray(v, np.float64) for k, v in gradients.items()}


def _timings(settings: KernelsBenchmark) -> Iterator[Timing]:
    shape = {k: getattr(settings, k) for k in ("rows", "length", "channels", "segments")}
    for op in _OPS:
        arguments = random_arguments(op, 0, **shape)
        for name in _present(op):
            forward = _seconds(
                partial(_function(op, name, shape, gradient=False), *arguments[:2]), jax.block_until_ready
            )
            both = _seconds(partial(_function(op, name, shape), *arguments), jax.block_until_ready)
            yield Timing(op, name, "forward", forward)
            yield Timing(op, name, "forward and backward", both)
        peer: Peer = PEERS[op]
        if reason := peer.why_not():
            print(f"{op}, {peer.name}: left out: {reason}")
            continue
        forward_peer, both_peer, wait = peer.build(*arguments)
        yield Timing(op, peer.name, "forward", _seconds(forward_peer, wait))
        yield Timing(op, peer.name, "forward and backward", _seconds(both_peer, wait))


def _seconds(run: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Seconds of one call in a queue of many, as in a training step, where launching costs no waiting."""
    wait(run())
    start = time.perf_counter()
    wait(run())
    calls = max(1, math.ceil(_LEAST_SECONDS / (time.perf_counter() - start)))
    fastest = math.inf
    for _ in range(_REPEATS):
        start = time.perf_counter()
        results = [run() for _ in range(calls)][-1]
        wait(results)
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
    from biomamba_jax.measure.triton_static import usages

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
