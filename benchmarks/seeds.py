"""Figures of several training runs that differ in their seed: an interval over documents, and the range over seeds."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from biomamba_jax.errors import UserError
from biomamba_jax.tasks.statistics import Estimate, Resampling, bootstrap, ratio_of_sums

Shown = Callable[[float], float]


class OfSeeds(NamedTuple):
    """Sums over the items of a document, of each seed; a figure is the ratio of their totals."""

    over: np.ndarray
    """float64 [seeds documents]."""
    under: np.ndarray
    """float64 [seeds documents]."""

    def estimate(self, resampling: Resampling) -> Estimate:
        """Return the ratio over all seeds, with an interval over documents."""
        return bootstrap(_ratio, self.over.mean(0), self.under.mean(0), resampling=resampling)

    def by_seed(self) -> np.ndarray:
        """Return the ratio of each seed."""
        return _ratio(self.over, self.under)

    def cell(self, resampling: Resampling, shown: Shown = float) -> str:
        """Return "figure (interval over documents) [range over seeds]"."""
        ratios = [shown(float(each)) for each in self.by_seed()]
        return f"{with_interval(self.estimate(resampling).map(shown))} [{min(ratios):.1f}-{max(ratios):.1f}]"


def difference(first: OfSeeds, second: OfSeeds, resampling: Resampling) -> tuple[Estimate, np.ndarray]:
    """Return the first ratio minus the second, of the same documents: with its interval, and of each seed."""
    means = (sums.mean(0) for sums in (*first, *second))
    return bootstrap(_difference, *means, resampling=resampling), first.by_seed() - second.by_seed()


def _difference(over: np.ndarray, under: np.ndarray, over_2: np.ndarray, under_2: np.ndarray, axis: int) -> np.ndarray:
    return _ratio(over, under, axis) - _ratio(over_2, under_2, axis)


def _ratio(over: np.ndarray, under: np.ndarray, axis: int = -1) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # a resample of documents without any item
        return np.nan_to_num(ratio_of_sums(over, under, axis))


def verdict(found: Estimate, by_seed: np.ndarray) -> str:
    """Return whether an effect is larger than its range over seeds, as the end of a sentence."""
    larger = abs(found.value) > np.ptp(by_seed)
    return f"the effect is {'larger' if larger else 'NOT larger'} than the spread over seeds."


def with_interval(found: Estimate, digits: int = 1) -> str:
    """Return "figure (low-high)", without brackets where there is no interval."""
    if found.low is None or found.high is None:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} ({found.low:.{digits}f}-{found.high:.{digits}f})"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table, the first one its head."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def run(command: Sequence[str]) -> None:
    """Print and run a command of the package.

    Raises:
      UserError: it ended with an error, which it has printed.
    """
    print("$", *command, flush=True)
    if subprocess.run([sys.executable, "-m", *command], check=False).returncode:
        raise UserError(f"{command[0]} has failed, see above; the same benchmark goes on from there")


def run_on_cores(chains: Sequence[Sequence[Sequence[str]]]) -> None:
    """Run chains of commands of the package, one chain on each core of this process: small models gain little from two.

    Raises:
      UserError: see `run`; chains that are running are waited for.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    free = iter(cores)

    def pin() -> None:  # this thread, and with it the processes that it starts
        if cores:
            os.sched_setaffinity(0, {next(free)})

    def run_chain(chain: Sequence[Sequence[str]]) -> None:
        for command in chain:
            run(command)

    with ThreadPoolExecutor(len(cores) or 1, initializer=pin) as pool:
        list(pool.map(run_chain, chains))
