"""Meters that are read between two lines of metrics.jsonl: sums of the loss, throughput, and the best evaluation."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from biomamba_jax.train.step import StepMetrics


@dataclasses.dataclass
class IntervalTotals:
    """Sums of the interval in progress; saved with checkpoints, so that a resumed run writes the same line."""

    tokens: int = 0
    """Tokens read since the run began."""
    nll: float = 0.0
    """Negative log-likelihood of the interval, in nats."""
    loss: float = 0.0
    """Training objective of the interval: with smoothing and z-loss."""
    correct: float = 0.0
    """Tokens of the interval whose most probable prediction was right."""
    weight: float = 0.0
    """Tokens of the interval that the loss counts."""


@dataclasses.dataclass
class BestEvaluation:
    """The evaluation with the lowest held-out loss; saved with checkpoints."""

    step: int | None = None
    """Its step; None before the first evaluation."""
    loss: float | None = None
    """Its loss."""
    since: int = 0
    """Evaluations since then."""

    def add(self, step: int, loss: float) -> None:
        """Add an evaluation; a loss of NaN is never the best."""
        if loss < (math.inf if self.loss is None else self.loss):
            self.step, self.loss, self.since = step, loss, 0
        else:
            self.since += 1

    def is_stale(self, patience: int | None) -> bool:
        """Return True if `patience` evaluations were no better; never for None."""
        return patience is not None and self.since >= patience


class IntervalMeter:
    """Accumulates step metrics, one step late: the device never waits for the host."""

    def __init__(self, totals: IntervalTotals, on_skipped: Callable[[Any, float, float], None] = lambda *_: None):
        """Begin with the totals of a checkpoint.

        Args:
          totals: sums of the interval in progress.
          on_skipped: called with (origin, loss per token, gradient norm) of each step whose update was skipped.
        """
        self.totals = totals
        self._on_skipped = on_skipped
        self.gradient_norm = float("nan")
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.last_loss = float("nan")
        self._pending: tuple[StepMetrics, Any] | None = None

    def add(self, metrics: StepMetrics, origin: Any = None) -> None:
        """Add the metrics of a step, which may still be running; waits for the step before.

        Args:
          metrics: arrays on the devices.
          origin: what identifies the step and its batch, for `on_skipped`.
        """
        self.finish()
        self._pending = metrics, origin

    def finish(self) -> None:
        """Wait for the newest step and accumulate its metrics."""
        if self._pending is None:
            return
        (metrics, origin), self._pending = self._pending, None
        metrics = jax.device_get(metrics)
        self.gradient_norm = float(metrics.gradient_norm)
        self.skipped, self.skipped_in_a_row = int(metrics.skipped), int(metrics.skipped_in_a_row)
        sums = {name: float(value) for name, value in metrics.sums._asdict().items()}
        self.last_loss = sums["nll"] / max(sums["weight"], 1)
        self.totals.tokens += int(metrics.tokens)
        if self.skipped_in_a_row:  # a skipped step says nothing about the model
            self._on_skipped(origin, sums["loss"] / max(sums["weight"], 1), self.gradient_norm)
        else:
            for name in ("nll", "loss", "correct", "weight"):
                setattr(self.totals, name, getattr(self.totals, name) + sums[name])

    def values(self) -> dict[str, float | int]:
        """Return the values of a metrics line, and begin the next interval."""
        self.finish()
        totals = self.totals
        per_token = 1 / totals.weight if totals.weight else float("nan")
        self.totals = IntervalTotals(tokens=totals.tokens)
        return {
            "loss": totals.nll * per_token,
            "objective": totals.loss * per_token,
            "accuracy": totals.correct * per_token,
            "gradient_norm": self.gradient_norm,
            "tokens": totals.tokens,
            "skipped_updates": self.skipped,
        }

    def state(self) -> dict[str, Any]:
        """Return the totals, for a checkpoint."""
        self.finish()
        return dataclasses.asdict(self.totals)


class Speed(NamedTuple):
    """Throughput of a run; None until a step after the first one, which compiles, is measured."""

    tokens_per_second: float | None
    """Tokens per second, over all devices."""
    share_of_peak: float | None
    """Model FLOP/s over the devices' peak (MFU), 0 to 1; None where the peak is unknown."""
    data_wait_share: float | None
    """Share of the time spent waiting for batches, 0 to 1."""


class ThroughputMeter:
    """Measures throughput since the last restart, without pauses for evaluation and checkpoints."""

    def __init__(self, flops_per_token: float, peak_flops: float | None) -> None:
        self._share = flops_per_token / peak_flops if peak_flops else None
        self._tokens_per_second: float | None = None  # kept from the interval before until this one has tokens
        self.restart(0)

    def restart(self, tokens: int) -> None:
        """Begin a new interval, at `tokens` tokens since the run began."""
        self._start = time.perf_counter()
        self._waited, self._tokens = 0.0, tokens

    def update(self, tokens: int) -> None:
        """Update the throughput, at `tokens` tokens since the run began."""
        if tokens > self._tokens:
            self._tokens_per_second = (tokens - self._tokens) / self._elapsed

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the block as waiting for data."""
        begin = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begin

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leave the time of the block out; it may begin a new interval."""
        begin = time.perf_counter()
        yield
        self._start += time.perf_counter() - max(begin, self._start)

    @property
    def speed(self) -> Speed:
        """Throughput of the interval."""
        if self._tokens_per_second is None:
            return Speed(None, None, None)
        share = self._share and self._share * self._tokens_per_second
        return Speed(self._tokens_per_second, share, self._waited / self._elapsed)

    @property
    def _elapsed(self) -> float:
        return max(time.perf_counter() - self._start, 1e-9)
