"""What is gathered between two lines of metrics.jsonl: sums of the loss, and how the time was spent."""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax

from biomamba_jax.train.step import StepMetrics


@dataclasses.dataclass
class Totals:
    """What a checkpoint keeps of the line in progress, so that a resumed run writes the same line."""

    tokens: int = 0
    """Tokens trained on since the run began."""
    nll: float = 0.0
    """Summed negative log-likelihood of this interval."""
    loss: float = 0.0
    """The same of what is minimised: smoothing and z-loss included."""
    correct: float = 0.0
    """Tokens of this interval that were the model's first guess."""
    weight: float = 0.0
    """Tokens of this interval."""


class Interval:
    """Sums the reports of steps. Reports are read one step late, so that the device never waits for the host."""

    def __init__(self, totals: Totals | None = None):
        self.totals = totals or Totals()
        self.gradient_norm = float("nan")
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.last_loss = float("nan")
        self._pending: list[StepMetrics] = []

    def add(self, report: StepMetrics) -> None:
        """Takes a step's report, whose arrays may still be in the making."""
        self._read()
        self._pending.append(report)

    def finish(self) -> None:
        """Waits for the newest report."""
        self._read()

    def _read(self) -> None:
        while self._pending:
            report = jax.device_get(self._pending.pop())
            self.gradient_norm = float(report.gradient_norm)
            self.skipped, self.skipped_in_a_row = int(report.skipped), int(report.skipped_in_a_row)
            weight = float(report.sums.weight)
            self.last_loss = float(report.sums.nll) / max(weight, 1)
            self.totals.tokens += int(weight)
            if not self.skipped_in_a_row:  # a step that was left out says nothing of the model
                self.totals.nll += float(report.sums.nll)
                self.totals.loss += float(report.sums.loss)
                self.totals.correct += float(report.sums.correct)
                self.totals.weight += weight

    def line(self) -> dict[str, float | int]:
        """The values of a metrics line; begins the next interval."""
        self.finish()
        totals = self.totals
        per_token = 1 / totals.weight if totals.weight else float("nan")
        self.totals = Totals(tokens=totals.tokens)
        return {
            "loss": totals.nll * per_token,
            "objective": totals.loss * per_token,
            "accuracy": totals.correct * per_token,
            "gradient_norm": self.gradient_norm,
            "tokens": totals.tokens,
            "skipped_updates": self.skipped,
        }

    def state(self) -> dict[str, Any]:
        """The totals, for a checkpoint."""
        self.finish()
        return dataclasses.asdict(self.totals)


class Stopwatch:
    """Speed since the last line: steps, waiting for data, and pauses (evaluation, saving) that do not count."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins a new stretch."""
        self._start = time.perf_counter()
        self._waited = self._tokens = 0.0

    def add(self, tokens: int) -> None:
        """Counts a step's tokens."""
        self._tokens += tokens

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here does not count."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - begin

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of this stretch."""
        return self._tokens / max(time.perf_counter() - self._start, 1e-9)

    @property
    def waiting_share(self) -> float:
        """Share of this stretch spent waiting for data."""
        return self._waited / max(time.perf_counter() - self._start, 1e-9)
