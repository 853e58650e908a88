"""What the heavy operations cost on TPU by the compiler's estimate, against their floors; needs no TPU."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

from rich.table import Table

from biomamba_jax.errors import UserError
from biomamba_jax.hardware import Chip
from biomamba_jax.planning.ahead_of_time import Estimate, Request, estimates
from biomamba_jax.planning.kernels import D_STATE, HEADDIM, SMALLEST, SSD_D_STATE
from biomamba_jax.planning.topology import parse_topology
from biomamba_jax.tables import print_tables

Target = Literal["v5e", "v5p", "v6e", "gpu", "sm_80", "sm_90", "sm_100"]
_SSD_CHUNK = 128


_VECTOR_SLOTS = 4  # vector operations of 8 x 128 values that one bundle holds
# Vector operations of the selective scan for 8 states of 128 channels in one step, counted in the kernels; taking a
# result from the transcendental unit is one. The sums over d_state and over lanes are shared by two or four registers.
_SCAN_OPERATIONS = {"forward": 6.5, "backward": 20.0}


@dataclasses.dataclass(frozen=True)
class KernelsBenchmark:
    """What to measure or compile."""

    target: Target = "v5e"
    """gpu: this machine's, checked and timed. v5e, v5p, v6e: a TPU that the compiler is asked about. sm_80, sm_90,
    sm_100: an NVIDIA architecture that Triton's kernels are compiled for."""
    rows: int = 8
    """Rows of the batch."""
    length: int = 1024
    """Tokens of a row."""
    channels: int = 1536
    """d_inner: 1,536 for the 130m models."""
    segments: bool = True
    """Packed rows: state and convolution are reset between documents."""
    limit_seconds: float = 600
    """The compiler is given up after this long for one table."""

    def __post_init__(self) -> None:
        if min(self.rows, self.length, self.channels) < 1:
            raise UserError("rows, length and channels must be positive")
        if self.channels % HEADDIM:
            raise UserError(f"channels = {self.channels}: must be a multiple of the head size {HEADDIM}")


@dataclasses.dataclass(frozen=True)
class Line:
    """One row of the table. Seconds for the whole batch."""

    op: str
    implementation: str
    direction: str
    seconds: float | None  # None: the compiler does not tell
    vector_floor: float | None
    matrix_floor: float | None
    memory_floor: float
    temporary_bytes: int

    @property
    def share_of_floor(self) -> float | None:
        if not self.seconds:
            return None
        return max(self.vector_floor or 0, self.matrix_floor or 0, self.memory_floor) / self.seconds


def measure_kernels(settings: KernelsBenchmark) -> None:
    """Prints the table."""
    table = Table(
        title=f"{settings.target}, batch {settings.rows} x {settings.length:,}, {settings.channels:,} channels, "
        f"bfloat16{', packed rows' if settings.segments else ''}: compiler estimates, not measured"
    )
    for column in (
        "op",
        "implementation",
        "direction",
        "ms",
        "vector floor",
        "matrix floor",
        "memory floor",
        "share",
        "temporary MB",
    ):
        table.add_column(column, justify="left" if column in ("op", "implementation", "direction") else "right")
    for line in lines(settings):
        floors = (line.vector_floor, line.matrix_floor, line.memory_floor)
        table.add_row(
            line.op,
            line.implementation,
            line.direction,
            "unknown" if line.seconds is None else f"{line.seconds * 1e3:.3f}",
            *("" if floor is None else f"{floor * 1e3:.3f}" for floor in floors),
            "" if line.share_of_floor is None else f"{line.share_of_floor:.0%}",
            f"{line.temporary_bytes / 1e6:.0f}",
        )
    print_tables([table])
    print(
        "Pallas kernels: the static profile of the schedule, without waiting for memory. XLA forms: XLA's own model, "
        "which can be a few times off; the profile does not run on them. Share: the highest floor over the time. "
        "Temporary memory: of the program with the forward pass alone, and of the one with both passes, which also "
        "stands in the lines of the backward pass."
    )


def lines(settings: KernelsBenchmark) -> Iterator[Line]:
    """Each kernel and its alternative. Raises as `aot.estimates`."""
    chip = parse_topology(f"{settings.target}:{SMALLEST[settings.target]}").chip
    assert chip.clock is not None
    for op in ("selective_scan", "ssd", "causal_conv1d"):
        yield from _pallas_lines(op, settings, chip)
        forward, both = _estimates(op, "xla", settings, settings.rows, [settings.length], profile=False)[0]
        for direction, estimate in (("forward", forward), ("forward and backward", both)):
            memory = (estimate.argument_bytes + estimate.output_bytes) / chip.bandwidth
            seconds = None if estimate.xla_cycles is None else estimate.xla_cycles / chip.clock
            yield Line(op, "xla", direction, seconds, None, None, memory, estimate.temporary_bytes)


def _estimates(
    op: str, implementation: str, settings: KernelsBenchmark, rows: int, lengths: list[int], profile: bool
) -> list[tuple[Estimate, Estimate]]:
    """(forward, forward and backward) at each length."""

    def request(length: int, gradient: bool) -> Request:
        shape = {"rows": rows, "length": length, "channels": settings.channels, "segments": settings.segments}
        arguments = {"op": op, "implementation": implementation, "gradient": gradient, **shape}
        return Request(
            f"{settings.target}:{SMALLEST[settings.target]}", "biomamba_jax.planning.kernels:build", arguments
        )

    requests = [request(length, gradient) for length in lengths for gradient in (False, True)]
    found = estimates(requests, profile=profile, timeout=settings.limit_seconds)
    for estimate in found:
        if estimate.error:
            raise UserError(f"{op}, {implementation}: the compiler refused the program: {estimate.error}")
    return list(zip(found[::2], found[1::2], strict=True))


_SHORT_LENGTHS = [256, 512]  # multiples of every kernel's chunk


def _pallas_lines(op: str, settings: KernelsBenchmark, chip: Chip) -> Iterator[Line]:
    """From the slope between two short lengths, which leaves out what a call costs however little it does."""
    short, long = _estimates(op, "pallas_tpu", settings, 1, _SHORT_LENGTHS, profile=True)
    whole = _estimates(op, "pallas_tpu", settings, settings.rows, [settings.length], profile=False)[0]
    tokens = settings.rows * settings.length
    memory = [(e.argument_bytes + e.output_bytes) / chip.bandwidth for e in whole]
    assert chip.clock is not None  # of every generation in SMALLEST
    cycle_rate = chip.clock * chip.cores  # rows are spread over the cores
    lines = []
    for i, direction in enumerate(("forward", "backward")):
        cycles = [_kernel_cycles(pair[1].static_cycles, direction) for pair in (short, long)]
        seconds = (cycles[1] - cycles[0]) / (_SHORT_LENGTHS[1] - _SHORT_LENGTHS[0]) * tokens / cycle_rate
        vector = matrix = None
        if op == "selective_scan":
            registers = tokens * settings.channels * D_STATE / 1024
            vector = registers * _SCAN_OPERATIONS[direction] / _VECTOR_SLOTS / cycle_rate
        if op == "ssd":
            matrix = 2 * tokens * _ssd_products(settings.channels)[direction] / chip.flops["bfloat16"]
        lines.append(Line(op, "pallas_tpu", direction, seconds, vector, matrix, memory[i], whole[i].temporary_bytes))
    yield from lines
    yield both_directions(*lines)


def _ssd_products(channels: int) -> dict[str, int]:
    """Multiplications a token in the products of the chunked form, one group: the fewest of each pass.

    Forward: scores of the group; values within the chunk, into the state and out of it of each channel. Backward: the
    scores again and the two products of their gradient; of each channel the gradients of scores and values within the
    chunk, and of B, C, values and state through the state.
    """
    scores, within, through = _SSD_CHUNK * SSD_D_STATE, channels * _SSD_CHUNK, channels * SSD_D_STATE
    return {"forward": scores + within + 2 * through, "backward": 3 * scores + 2 * within + 4 * through}


def both_directions(forward: Line, backward: Line) -> Line:
    """To stand beside the same of an alternative. Memory is that of the program with both."""

    def total(name: str) -> float | None:
        parts = [getattr(line, name) for line in (forward, backward)]
        return None if None in parts else sum(parts)

    floors = total("vector_floor"), total("matrix_floor"), backward.memory_floor
    return Line(
        forward.op,
        forward.implementation,
        "forward and backward",
        total("seconds"),
        *floors,
        temporary_bytes=backward.temporary_bytes,
    )


def _kernel_cycles(cycles: Mapping[str, int], direction: str) -> int:
    found = [v for name, v in cycles.items() if direction in name]
    if not found:
        raise UserError(f"the compiler's profile names no {direction} kernel, only: {', '.join(cycles) or 'none'}")
    return sum(found)
