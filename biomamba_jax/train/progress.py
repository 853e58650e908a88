"""What a person sees while a run trains: one live line in a terminal, a plain line every few seconds anywhere else.

    step 1,200/4,000 (30 %)  loss 3.2140  0:04:12 left  51,234 tokens/s  41.2 % of peak  data wait 0.3 %

Both go to stderr, from the first process only. Log messages appear above the live line.
"""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Self

import jax
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

PLAIN_SECONDS = 10.0
"""Seconds between lines where stderr is no terminal: often enough to see life, rare enough to keep logs short."""

LIVE_SECONDS = 0.1
"""Seconds between redraws of the live line."""


class Progress:
    """The progress of one run, as a context manager.

    The line is redrawn from `update` itself, by no thread: nothing to deadlock when Ctrl-C or a fork comes, and leaving
    the context, by whatever exception, gives the terminal back as it was.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepares the line.

        Args:
          total_steps: step at which the run ends.
          start_step: steps that a resumed run has already done.
          console: where to write; stderr by default.
          clock: seconds; replaced in tests.
        """
        self._total = total_steps
        self._step = start_step
        self._clock = clock
        self._console = console or Console(stderr=True, highlight=False, quiet=jax.process_index() != 0)
        self._live: Live | None = None
        # The time left is judged from the first update on, since the step before it includes compilation.
        self._first: tuple[int, float] | None = None
        self._drawn = -float("inf")
        self._shown = start_step
        self._line = ""

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.quiet:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.update(Text(self._line), refresh=True)
            self._live.stop()
        elif self._line and self._shown != self._step:
            self._print(self._line)

    def update(
        self,
        step: int,
        loss: float,
        tokens_per_second: float,
        share_of_peak: float | None = None,
        data_wait_share: float | None = None,
    ) -> None:
        """Tells how far the run is.

        Args:
          step: steps done.
          loss: training loss, in nats per token.
          tokens_per_second: over all devices.
          share_of_peak: model FLOP/s over the devices' peak, 0 to 1; None where the peak is unknown.
          data_wait_share: part of the time spent waiting for batches, 0 to 1.
        """
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
        self._step = step
        parts = [
            f"step {step:,}/{self._total:,} ({100 * step / max(self._total, 1):.0f} %)",
            f"loss {loss:.4f}",
        ]
        left = self._seconds_left(step, now)
        if left is not None:
            parts.append(f"{duration(left)} left")
        parts.append(f"{tokens_per_second:,.0f} tokens/s")
        if share_of_peak is not None:
            parts.append(f"{100 * share_of_peak:.1f} % of peak")
        if data_wait_share is not None:
            parts.append(f"data wait {100 * data_wait_share:.1f} %")
        self._line = "  ".join(parts)  # a narrow terminal cuts the end off, so what matters most comes first
        if now - self._drawn >= (LIVE_SECONDS if self._live else PLAIN_SECONDS):
            self._drawn = now
            self._draw()

    def log(self, message: str) -> None:
        """Prints a line of its own, above the live line."""
        self._print(message)

    def _seconds_left(self, step: int, now: float) -> float | None:
        assert self._first is not None
        first_step, first_time = self._first
        if step == first_step:
            return None
        return (now - first_time) / (step - first_step) * (self._total - step)

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(Text(self._line, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self._shown = self._step
            self._print(self._line)

    def _print(self, line: str) -> None:
        # soft_wrap: a log file's lines are not cut at 80 columns. markup off: "[...]" in a message is text.
        self._console.print(line, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, for instance 1:04:12."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def summary_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a table to stdout: the first column to the left, the others to the right; None is shown as a dash."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*("–" if cell is None else Text(str(cell)) for cell in row))
    print_tables([table])


def print_tables(tables: Iterable[Table]) -> None:
    """Prints tables to stdout."""
    # Where stdout is no terminal rich would squeeze a table into 80 columns.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160, highlight=False)
    for table in tables:
        console.print(table)
