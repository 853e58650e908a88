"""The progress of a training run: one live line in a terminal, a plain line every few seconds anywhere else.

    step 1,200/4,000 (30 %)  loss 3.2140  0:04:12 left  51,234 tokens/s  41.2 % of peak  data wait 0.3 %

Both go to stderr, from the first process only. Log messages appear above the live line.
"""

import time
from datetime import timedelta
from typing import Self

import jax
from rich.console import Console
from rich.live import Live
from rich.text import Text

from biomamba_jax.train.meters import Speed

PLAIN_SECONDS = 10.0
"""Seconds between lines where stderr is not a terminal: often enough to see life, rare enough to keep logs short."""

LIVE_SECONDS = 0.1
"""Seconds between redraws of the live line."""


class Progress:
    """The progress of one run, as a context manager.

    The line is redrawn by `update` itself, without a thread: nothing can deadlock at Ctrl-C or a fork, and leaving the
    context, by whatever exception, restores the terminal.
    """

    def __init__(self, total_steps: int, console: Console | None = None) -> None:
        """Prepare the line.

        Args:
          total_steps: step at which the run ends.
          console: where to write; stderr by default.
        """
        self._total = total_steps
        self._console = console or Console(stderr=True, highlight=False, quiet=jax.process_index() != 0)
        is_live = self._console.is_terminal and not self._console.quiet
        self._live = Live(console=self._console, auto_refresh=False) if is_live else None
        # The time left is estimated from the first update on, since the step before it includes compilation.
        self._first: tuple[int, float] | None = None
        self._drawn = -float("inf")
        self._line = self._shown = ""

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.update(Text(self._line), refresh=True)
            self._live.stop()
        elif self._line != self._shown:
            self.log(self._line)

    def update(self, step: int, loss: float, speed: Speed) -> None:
        """Update the line, and redraw it if it is time to.

        Args:
          step: steps done.
          loss: training loss, in nats per token.
          speed: throughput of the interval.
        """
        now = time.monotonic()
        first_step, first_time = self._first = self._first or (step, now)
        left = (now - first_time) / max(step - first_step, 1) * (self._total - step)
        parts = (  # a narrow terminal cuts the end off, so what matters most comes first
            f"step {step:,}/{self._total:,} ({100 * step / max(self._total, 1):.0f} %)",
            f"loss {loss:.4f}",
            f"{timedelta(seconds=round(left))} left" if step > first_step else "",
            "" if speed.tokens_per_second is None else f"{speed.tokens_per_second:,.0f} tokens/s",
            "" if speed.share_of_peak is None else f"{100 * speed.share_of_peak:.1f} % of peak",
            "" if speed.data_wait_share is None else f"data wait {100 * speed.data_wait_share:.1f} %",
        )
        self._line = "  ".join(filter(None, parts))
        if now - self._drawn < (LIVE_SECONDS if self._live else PLAIN_SECONDS):
            return
        self._drawn, self._shown = now, self._line
        if self._live is not None:
            self._live.update(Text(self._line, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            self.log(self._line)

    def log(self, message: str) -> None:
        """Print a line of its own, above the live line."""
        # soft_wrap: a log file's lines are not wrapped at 80 columns. markup and emoji off: "[...]" and ":x:" are text.
        self._console.print(message, markup=False, emoji=False, soft_wrap=True)
