"""Ours beside another project's: the settings each was tried under, then the two in turns, as tables."""

from collections.abc import Mapping

from benchmarks.paired_timing import TRIAL_STEPS, Candidate, Spread, Timing, alternate
from biomamba_jax.tables import summary_table

_COLUMNS = ("side", "allocator", "tokens/s", "slowest–fastest", "peak memory")


def tokens_per_second(tokens: int, seconds: Spread) -> tuple[str, str]:
    """Median and range, as text."""
    return f"{tokens / seconds.median:,.1f}", f"{tokens / seconds.most:,.1f}–{tokens / seconds.least:,.1f}"


def print_tried(tokens: int, tried: Mapping[Candidate, Timing | str], chosen: tuple[Candidate, Candidate]) -> None:
    """Prints what each setting gave, or why nothing.

    Args:
      tokens: tokens of one run.
    """
    rows = [_row(tokens, candidate, trial, mark=candidate in chosen) for candidate, trial in tried.items()]
    summary_table(f"Settings tried, {TRIAL_STEPS} runs each; * fastest of a side", _COLUMNS, rows)


def compare(title: str, tokens: int, ours: Candidate, theirs: Candidate, rounds: int, limit_seconds: float) -> None:
    """Times the two in turns and prints both, and the ratio of each pair.

    Args:
      tokens: tokens of one run.
      limit_seconds: longest time for one to prepare itself and run once.

    Raises:
      UserError: one could not be run.
    """
    results = alternate((ours, theirs), rounds, limit_seconds)
    rows = [_row(tokens, candidate, timing) for candidate, timing in zip((ours, theirs), results, strict=True)]
    ratio = Spread.of(slow / fast for fast, slow in zip(*(timing.each for timing in results), strict=True))
    rows.append(["ratio, pair by pair", None, f"{ratio.median:.2f}", f"{ratio.least:.2f}–{ratio.most:.2f}", None])
    summary_table(f"{title}: {rounds} pairs, in turns", _COLUMNS, rows)


def _row(tokens: int, candidate: Candidate, timing: Timing | str, mark: bool = False) -> list[str | None]:
    name = candidate.name + (" *" if mark else "")
    if isinstance(timing, str):
        return [name, candidate.allocator, timing, None, None]
    figures = tokens_per_second(tokens, timing.seconds)
    return [name, candidate.allocator, *figures, f"{timing.peak_memory / 1e9:.2f} GB"]
