"""Prints the compiler's estimates for the ops on TPU next to their roofline bounds; needs no TPU."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, get_args

from biomamba_jax.config.checks import Limit, PositiveFloat, PositiveInt, Settings
from biomamba_jax.errors import UserError
from biomamba_jax.planning.ahead_of_time import Estimate, Request, estimates
from biomamba_jax.planning.kernels import HEADDIM, SMALLEST, SSD_D_STATE, kernel_costs
from biomamba_jax.planning.topology import Topology, parse_topology
from biomamba_jax.tables import Table, print_tables

Target = Literal["v5e", "v5p", "v6e", "gpu", "sm_80", "sm_90", "sm_100"]
_SSD_CHUNK = 128
_DIRECTIONS = ("forward", "forward and backward")
_WHOLE_HEADS = Limit(f"a multiple of the head size {HEADDIM}", lambda x: x % HEADDIM == 0)
OPS = ("selective_scan", "ssd", "ssd_mamba3", "causal_conv1d")
Op = Literal[
    "selective_scan", "ssd", "ssd_mamba3", "causal_conv1d", "rotary_embedding", "mamba3", "linear_cross_entropy"
]
_MIXER: Op = "mamba3"
_MIXER_KERNELS: tuple[Op, ...] = ("ssd_mamba3", "rotary_embedding")
_UNPROFILED: Op = "linear_cross_entropy"  # the static profile ends the compiler's process


@dataclasses.dataclass(frozen=True)
class KernelsBenchmark(Settings):
    """Settings of `python -m benchmarks kernels`."""

    target: Target = "v5e"
    """gpu: check and time on this machine's GPU. v5e, v5p, v6e: the compiler's estimates for that TPU. sm_80, sm_90,
    sm_100: compile the Triton kernels for that NVIDIA architecture."""
    rows: PositiveInt = 8
    """Rows of the batch."""
    length: PositiveInt = 1024
    """Tokens of a row."""
    channels: Annotated[PositiveInt, _WHOLE_HEADS] = 1536
    """d_inner: 1,536 for the 130m models."""
    segments: bool = True
    """Packed rows: reset state and convolution between documents."""
    ops: list[Op] = dataclasses.field(default_factory=lambda: list(get_args(Op)))
    """TPU: these ops; mamba3 is a mixer without its projections and needs ssd_mamba3 and rotary_embedding before it."""
    limit_seconds: PositiveFloat = 600
    """Time limit of the compiler for one op."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target not in SMALLEST and self.ops != list(get_args(Op)):
            raise UserError(f"ops = {' '.join(self.ops)}: only a TPU target chooses ops, not {self.target}")
        if _MIXER in self.ops and set(_MIXER_KERNELS) - set(self.ops[: self.ops.index(_MIXER)]):
            raise UserError(f"ops = {' '.join(self.ops)}: {_MIXER} needs {' and '.join(_MIXER_KERNELS)} before it")


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of the table."""

    op: str
    """Name of the op."""
    implementation: str
    """Name of the implementation."""
    direction: str
    """Forward, backward or both."""
    seconds: float | None
    """Estimate for the whole batch; None if the compiler has none."""
    vector_floor: float | None
    """Lower bound of the vector operations in seconds."""
    matrix_floor: float | None
    """Lower bound of the matrix products in seconds."""
    memory_floor: float
    """Lower bound of the memory traffic in seconds."""
    temporary_bytes: int
    """Temporary memory."""

    @property
    def share_of_floor(self) -> float | None:
        """The highest lower bound over the estimate."""
        if not self.seconds:
            return None
        return max(self.vector_floor or 0, self.matrix_floor or 0, self.memory_floor) / self.seconds


def shape(settings: KernelsBenchmark) -> dict[str, Any]:
    """Return the shape arguments of `planning.kernels.build`."""
    return {key: getattr(settings, key) for key in ("rows", "length", "channels", "segments")}


def title(settings: KernelsBenchmark) -> str:
    """Return the part of a table's title that names the shape."""
    packed = ", packed rows" if settings.segments else ""
    return f"batch {settings.rows} x {settings.length:,}, {settings.channels:,} channels, bfloat16{packed}"


def measure_kernels(settings: KernelsBenchmark) -> None:
    """Print the table of estimates."""
    rows = []
    for line in lines(settings):
        seconds = (line.seconds, line.vector_floor, line.matrix_floor, line.memory_floor)
        milliseconds = (None if figure is None else f"{figure * 1e3:.3f}" for figure in seconds)
        share = None if line.share_of_floor is None else f"{line.share_of_floor:.0%}"
        rows.append(
            (line.op, line.implementation, line.direction, *milliseconds, share, f"{line.temporary_bytes / 1e6:.0f}")
        )
    columns = ("op", "implementation", "direction", "ms", "vector", "matrix", "memory", "share", "temporary MB")
    heading = f"{settings.target}, {title(settings)}: compiler estimates, not measured"
    print_tables([Table(columns, rows, heading, left=range(3))])
    print(
        "vector, matrix, memory: roofline bounds in ms; share: the highest of them over the estimate. Pallas kernels: "
        "the static profile of the schedule, without stalls on memory. XLA forms: XLA's own cost model, which can be a "
        "few times off; the profile does not work for them. mamba3: the mixer without projections, its kernels as "
        "above and the rest by XLA's model. linear_cross_entropy: of half as many channels and the published "
        "vocabulary; its kernels cannot be profiled. Temporary memory: of the program with the forward pass alone, and "
        "of the one with both passes, which the rows of the backward pass show too."
    )


def lines(settings: KernelsBenchmark) -> Iterator[Line]:
    """Yield the rows of each kernel and its alternative; raises like `estimates`."""
    topology = parse_topology(f"{settings.target}:{SMALLEST[settings.target]}")
    chip = topology.chip
    assert chip.clock is not None
    kernels = dict.fromkeys(_DIRECTIONS, 0.0)
    for op in settings.ops:
        if op not in (_MIXER, _UNPROFILED):
            for line in _pallas_lines(op, settings, topology):
                yield line
                if op in _MIXER_KERNELS and line.direction in kernels:
                    assert line.seconds is not None  # of the static profile
                    kernels[line.direction] += line.seconds
        for implementation in {_MIXER: ["pallas_tpu"], _UNPROFILED: ["pallas_tpu", "xla"]}.get(op, ["xla"]):
            found = _estimates(op, implementation, settings, settings.rows, [settings.length], profile=False)[0]
            for direction, estimate in zip(_DIRECTIONS, found, strict=True):
                memory = (estimate.argument_bytes + estimate.output_bytes) / chip.bandwidth
                seconds = None if estimate.xla_cycles is None else estimate.xla_cycles / chip.clock
                if op == _UNPROFILED and implementation == "pallas_tpu":
                    seconds = None  # XLA's model leaves out kernels
                if seconds is not None and op == _MIXER:
                    seconds += kernels[direction]
                yield Line(op, implementation, direction, seconds, None, None, memory, estimate.temporary_bytes)


def _estimates(
    op: str, implementation: str, settings: KernelsBenchmark, rows: int, lengths: list[int], profile: bool
) -> list[tuple[Estimate, Estimate]]:
    """Return (forward, forward and backward) at each length."""

    def request(length: int, gradient: bool) -> Request:
        arguments = {"op": op, "implementation": implementation, "gradient": gradient, **shape(settings)}
        topology = f"{settings.target}:{SMALLEST[settings.target]}"
        return Request(topology, "biomamba_jax.planning.kernels:build", arguments | {"rows": rows, "length": length})

    requests = [request(length, gradient) for length in lengths for gradient in (False, True)]
    found = estimates(requests, profile=profile, timeout=settings.limit_seconds)
    for estimate in found:
        if estimate.error:
            raise UserError(f"{op}, {implementation}: the compiler refused the program: {estimate.error}")
    return list(zip(found[::2], found[1::2], strict=True))


_SHORT_LENGTHS = [256, 512]  # multiples of every kernel's chunk


def _pallas_lines(op: str, settings: KernelsBenchmark, topology: Topology) -> Iterator[Line]:
    """Yield rows from the slope between two short lengths, which excludes the fixed cost of a call."""
    short, long = _estimates(op, "pallas_tpu", settings, 1, _SHORT_LENGTHS, profile=True)
    whole = _estimates(op, "pallas_tpu", settings, settings.rows, [settings.length], profile=False)[0]
    tokens, chip = settings.rows * settings.length, topology.chip
    memory = [(e.argument_bytes + e.output_bytes) / chip.bandwidth for e in whole]
    assert chip.clock is not None  # known for every generation in SMALLEST
    cycle_rate = chip.clock * chip.cores  # rows are sharded over the cores
    costs = kernel_costs({"op": op, "implementation": "pallas_tpu", "gradient": True, **shape(settings)})
    fused = {kernel.name.rpartition("_")[2]: kernel.vector_operations for kernel in costs}
    lines = []
    for i, direction in enumerate(("forward", "backward")):
        cycles = [_kernel_cycles(pair[1].static_cycles, direction) for pair in (short, long)]
        seconds = (cycles[1] - cycles[0]) / (_SHORT_LENGTHS[1] - _SHORT_LENGTHS[0]) * tokens / cycle_rate
        vector = fused[direction] / topology.kind.vector if topology.kind.vector and fused[direction] else None
        matrix = None
        if op in ("ssd", "ssd_mamba3"):
            groups = 1 if op == "ssd" else settings.channels // HEADDIM
            matrix = 2 * tokens * _ssd_products(settings.channels, groups)[direction] / chip.flops["bfloat16"]
        lines.append(Line(op, "pallas_tpu", direction, seconds, vector, matrix, memory[i], whole[i].temporary_bytes))
    yield from lines
    yield both_directions(*lines)


def _ssd_products(channels: int, groups: int) -> dict[str, int]:
    """Return the multiplications per token in the products of the chunked form: the fewest of each pass.

    Forward: each group's scores; per channel the values within the chunk, into the state and out of it. Backward: the
    scores again and the two products of their gradient; per channel the gradients of scores and values within the
    chunk, and of B, C, values and state through the state.
    """
    scores, within, through = groups * _SSD_CHUNK * SSD_D_STATE, channels * _SSD_CHUNK, channels * SSD_D_STATE
    return {"forward": scores + within + 2 * through, "backward": 3 * scores + 2 * within + 4 * through}


def both_directions(forward: Line, backward: Line) -> Line:
    """Return the sum of both passes, for comparison with an alternative; memory is that of the program with both."""

    def total(name: str) -> float | None:
        parts = [getattr(line, name) for line in (forward, backward)]
        return None if None in parts else sum(parts)

    summed: dict[str, Any] = {name: total(name) for name in ("seconds", "vector_floor", "matrix_floor")}
    return dataclasses.replace(backward, direction="forward and backward", **summed)


def _kernel_cycles(cycles: Mapping[str, int], direction: str) -> int:
    found = [v for name, v in cycles.items() if direction in name]
    if not found:
        raise UserError(f"the compiler's profile names no {direction} kernel, only: {', '.join(cycles) or 'none'}")
    return sum(found)
