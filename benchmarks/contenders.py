"""Prints paired timings of two contenders next to what the CPU allows, and the settings that were tried for each."""

from collections.abc import Mapping
from typing import NamedTuple, Self

from benchmarks.paired_timing import TRIAL_STEPS, Contender, Spread, Timing, alternate
from biomamba_jax import processor
from biomamba_jax.hardware import measure_matmul_flops, measure_read_bandwidth
from biomamba_jax.tables import summary_table

_COLUMNS = ("contender", "allocator", "tokens/s", "slowest–fastest", "peak memory")


class Machine(NamedTuple):
    """The CPU and its bare speeds: the floor of a run's time is what they alone would take."""

    name: str
    """Name of the CPU."""
    flops: float
    """FLOP/s of float32 matrix products."""
    bandwidth: float
    """Bytes/s of reading memory."""

    @classmethod
    def measured(cls) -> Self:
        """Return this machine, measured now."""
        return cls(processor.name(), measure_matmul_flops(), measure_read_bandwidth())

    def __str__(self) -> str:
        """Return a line for a table's title."""
        speeds = f"products {self.flops / 1e9:,.0f} GFLOP/s, reads {self.bandwidth / 1e9:,.1f} GB/s"
        return f"{self.name}; float32 {speeds}, measured in this run"


def tokens_per_second(tokens: int, seconds: Spread) -> tuple[str, str]:
    """Return median and range of tokens/s as text."""
    return f"{tokens / seconds.median:,.1f}", f"{tokens / seconds.most:,.1f}–{tokens / seconds.least:,.1f}"


def print_tried(tokens: int, tried: Mapping[Contender, Timing | str], chosen: tuple[Contender, Contender]) -> None:
    """Print the timing of every setting, or why there is none.

    Args:
      tokens: tokens of one run.
      tried: timing, or reason for its absence, of each setting.
      chosen: the fastest setting of each contender.
    """
    rows = [_row(tokens, contender, trial, mark=contender in chosen) for contender, trial in tried.items()]
    summary_table(f"Settings tried, {TRIAL_STEPS} runs each; * the fastest of a contender", _COLUMNS, rows)


def compare(
    title: str,
    tokens: int,
    floors: tuple[float, float],
    contenders: tuple[Contender, Contender],
    rounds: int,
    limit_seconds: float,
) -> None:
    """Time two contenders in turns and print both and the ratio within pairs.

    Args:
      title: title of the table.
      tokens: tokens of one run.
      floors: seconds of one run of each contender that the machine's bare speeds alone would take.
      contenders: the two.
      rounds: number of pairs.
      limit_seconds: time limit for a contender's preparation and first run.

    Raises:
      UserError: a contender failed.
    """
    results = alternate(contenders, rounds, limit_seconds)
    rows = [
        [*_row(tokens, contender, timing), f"{floor / timing.seconds.median:.0%}"]
        for floor, contender, timing in zip(floors, contenders, results, strict=True)
    ]
    ratio = Spread.of(slow / fast for fast, slow in zip(*(timing.each for timing in results), strict=True))
    rows.append(["ratio within pairs", None, f"{ratio.median:.2f}", f"{ratio.least:.2f}–{ratio.most:.2f}", None, None])
    summary_table(f"{title}: {rounds} pairs", (*_COLUMNS, "share of floor"), rows)


def _row(tokens: int, contender: Contender, timing: Timing | str, mark: bool = False) -> list[str | None]:
    name = contender.name + (" *" if mark else "")
    if isinstance(timing, str):
        return [name, contender.allocator, timing, None, None]
    figures = tokens_per_second(tokens, timing.seconds)
    return [name, contender.allocator, *figures, f"{timing.peak_memory / 1e9:.2f} GB"]
