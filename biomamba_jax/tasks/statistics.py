"""How sure a figure is: bootstrap over documents or questions, Wilson's interval, McNemar's test. Computed by SciPy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_NUMBERS_AT_ONCE = 2_000_000
"""Resampled values in memory at one time."""

Statistic = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval."""

    value: float
    low: float | None = None
    """Lower end; None where there is too little to resample."""
    high: float | None = None
    """Upper end."""

    def map(self, function: Callable[[float], float]) -> "Estimate":
        """The estimate of an increasing function of the figure."""
        ends = (None if end is None else function(end) for end in (self.low, self.high))
        return Estimate(function(self.value), *ends)


@dataclass(frozen=True)
class Resampling:
    """How intervals are made."""

    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0


def bootstrap(statistic: Statistic, *samples: np.ndarray, resampling: Resampling) -> Estimate:
    """A statistic of whole items and its percentile bootstrap interval (Efron 1979): items are drawn with return.

    Args:
      statistic: takes arrays [..., items] and `axis`, and reduces that axis; for instance `ratio_of_sums`.
      samples: arrays [items], whose values at one place belong to the same item and are drawn together.
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
        batch=max(1, _NUMBERS_AT_ONCE // items),
        vectorized=True,
        paired=True,
        axis=-1,
        confidence_level=resampling.confidence,
        method="percentile",
        rng=np.random.default_rng(resampling.seed),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def ratio_of_sums(numerator: np.ndarray, denominator: np.ndarray, axis: int = -1) -> np.ndarray:
    """Sum over sum: a mean weighted by the denominator, such as nats per token, however long the documents are."""
    return numerator.sum(axis) / denominator.sum(axis)


def difference_of_ratios(first: np.ndarray, second: np.ndarray, denominator: np.ndarray, axis: int = -1) -> np.ndarray:
    """The ratio of `first` minus that of `second`, of the same items."""
    return (first.sum(axis) - second.sum(axis)) / denominator.sum(axis)


def mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """The plain mean over items."""
    return values.mean(axis)


def wilson(successes: int, trials: int, confidence: float) -> Estimate:
    """A share and its interval by Wilson (1927), which stays inside [0, 1] and holds for small counts."""
    if trials == 0:
        return Estimate(float("nan"))
    interval = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Estimate(successes / trials, float(interval.low), float(interval.high))


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int, float]:
    """The exact test of McNemar (1947): do two models err equally often on the same questions?

    Args:
      first: whether each answer of one model is right.
      second: the same of the other.

    Returns:
      Questions that only the first got right, that only the second did, and the two-sided p value.
    """
    pairs = list(zip(first, second, strict=True))
    only_first, only_second = pairs.count((True, False)), pairs.count((False, True))
    if only_first + only_second == 0:
        return 0, 0, 1.0
    return only_first, only_second, float(stats.binomtest(only_first, only_first + only_second).pvalue)
