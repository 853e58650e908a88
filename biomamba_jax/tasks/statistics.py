"""Uncertainty of figures, computed by SciPy: bootstrap intervals, Wilson intervals, McNemar's test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_BATCH_VALUES = 2_000_000
"""Resampled values in memory at one time."""

Statistic = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A figure and its confidence interval."""

    value: float
    """The figure of the sample itself."""
    low: float | None = None
    """Lower end; None without an interval."""
    high: float | None = None
    """Upper end; None without an interval."""

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """Return the estimate of an increasing function of the figure."""
        ends = (None if end is None else function(end) for end in (self.low, self.high))
        return Estimate(function(self.value), *ends)


@dataclass(frozen=True)
class Resampling:
    """Settings of confidence intervals."""

    resamples: int = 2000
    """Bootstrap resamples."""
    confidence: float = 0.95
    """Confidence level."""
    seed: int = 0
    """Seed of the resamples."""


def bootstrap(statistic: Statistic, *samples: np.ndarray, resampling: Resampling) -> Estimate:
    """Return a statistic and its percentile bootstrap interval (Efron 1979): items are drawn with replacement.

    Args:
      statistic: reduces `axis` of arrays [..., items]; for instance `ratio_of_sums`.
      samples: arrays [items]; the values at one index belong to the same item and are drawn together.
      resampling: number of resamples, confidence level and seed.

    Returns:
      The estimate; without an interval if there are fewer than two items or the value is not finite.
    """
    columns = [np.asarray(sample) for sample in samples]
    value = float(statistic(*columns, axis=-1))
    items = len(columns[0])
    if items < 2 or not np.isfinite(value):
        return Estimate(value)
    interval = stats.bootstrap(
        columns,
        statistic,
        n_resamples=resampling.resamples,
        batch=max(1, _BATCH_VALUES // items),
        vectorized=True,
        paired=True,
        axis=-1,
        confidence_level=resampling.confidence,
        method="percentile",
        rng=np.random.default_rng(resampling.seed),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def ratio_of_sums(numerator: np.ndarray, denominator: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return sum over sum: a mean weighted by the denominator, such as nats per token over documents of any length."""
    return numerator.sum(axis) / denominator.sum(axis)


def difference_of_ratios(first: np.ndarray, second: np.ndarray, denominator: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the ratio of `first` minus that of `second`, of the same items."""
    return (first.sum(axis) - second.sum(axis)) / denominator.sum(axis)


def wilson(successes: int, trials: int, confidence: float) -> Estimate:
    """Return a proportion and its Wilson (1927) interval, which stays inside [0, 1] and holds for small counts."""
    if trials == 0:
        return Estimate(float("nan"))
    interval = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Estimate(successes / trials, float(interval.low), float(interval.high))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """Run the exact test of McNemar (1947): do two models err equally often on the same questions?

    Args:
      first: correctness of each answer of one model.
      second: correctness of the other model's answers to the same questions.

    Returns:
      The number of questions that only the first answered correctly, the number that only the second did, and the
      two-sided p-value.
    """
    pairs = list(zip(first, second, strict=True))
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    if only_first + only_second == 0:
        return 0, 0, 1.0
    return only_first, only_second, float(stats.binomtest(only_first, only_first + only_second).pvalue)
