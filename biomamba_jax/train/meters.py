"""What is gathered between two lines of metrics.jsonl: sums of the loss, and how the time was spent."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from biomamba_jax.train.step import StepMetrics


@dataclasses.dataclass
class Totals:
    """What a checkpoint keeps of the line in progress, so that a resumed run writes the same line."""

    tokens: int = 0
    """Tokens read since the run began."""
    nll: float = 0.0
    """Summed negative log-likelihood of this interval."""
    loss: float = 0.0
    """The same of what is minimised: smoothing and z-loss included."""
    correct: float = 0.0
    """Tokens of this interval that were the model's first guess."""
    weight: float = 0.0
    """Tokens of this interval that the loss counts."""


@dataclasses.dataclass
class Best:
    """The evaluation with the lowest held-out loss; a checkpoint keeps it."""

    step: int | None = None
    """Where it was; None before the first."""
    loss: float | None = None
    """Its loss."""
    since: int = 0
    """Evaluations since then."""

    def add(self, step: int, loss: float) -> None:
        """Takes the loss of an evaluation. One that is not a number is never the best."""
        if loss < (math.inf if self.loss is None else self.loss):
            self.step, self.loss, self.since = step, loss, 0
        else:
            self.since += 1

    def is_stale(self, patience: int | None) -> bool:
        """Whether `patience` evaluations have passed since; never for None."""
        return patience is not None and self.since >= patience


class Interval:
    """Sums the reports of steps. Reports are read one step late, so that the device never waits for the host."""

    def __init__(self, totals: Totals | None = None):
        self.totals = totals or Totals()
        self.gradient_norm = float("nan")
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.last_loss = float("nan")
        self._pending: list[StepMetrics] = []

    @property
    def tokens(self) -> int:
        """Tokens trained on since the run began, as far as reports have been read."""
        return self.totals.tokens

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
            self.totals.tokens += int(report.tokens)
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


class Speed(NamedTuple):
    """How fast a run is."""

    tokens_per_second: float
    share_of_peak: float | None
    """Model FLOP/s over the devices' peak; None where the peak is not known."""
    data_wait_share: float
    """Share of the time spent waiting for batches."""


class Stopwatch:
    """Speed since the last line; pauses (evaluation, saving) do not count."""

    def __init__(self, flops_per_token: float, peak_flops: float | None) -> None:
        self._share = flops_per_token / peak_flops if peak_flops else None
        self._tokens_per_second = 0.0  # of this stretch, or of the one before while this one has nothing to show
        self.restart(0)

    def restart(self, tokens: int) -> None:
        """Begins a new stretch, at `tokens` tokens since the run began."""
        self._start = self._paused = time.perf_counter()
        self._waited, self._tokens = 0.0, tokens

    def update(self, tokens: int) -> None:
        """Takes the tokens since the run began."""
        if tokens > self._tokens:
            self._tokens_per_second = (tokens - self._tokens) / self._elapsed

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here does not count."""
        self._paused = time.perf_counter()
        yield
        self._start += time.perf_counter() - self._paused

    @property
    def speed(self) -> Speed:
        """Of this stretch."""
        share = None if self._share is None else self._share * self._tokens_per_second
        return Speed(self._tokens_per_second, share, self._waited / self._elapsed)

    @property
    def _elapsed(self) -> float:
        return max(time.perf_counter() - self._start, 1e-9)
