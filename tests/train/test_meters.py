"""Meters between two metrics lines: means over tokens, throughput without pauses, and the best evaluation."""

import math
import time

import jax.numpy as jnp
import pytest

from biomamba_jax.ops.cross_entropy import LossSums
from biomamba_jax.train.meters import BestEvaluation, IntervalMeter, IntervalTotals, ThroughputMeter
from biomamba_jax.train.step import StepMetrics


def metrics(nll: float, weight: float, skipped_in_a_row: int = 0) -> StepMetrics:
    """A step of 10 tokens, of which `weight` count; its gradient norm is its nll."""
    sums = LossSums(*map(jnp.float32, (nll + 1, nll, weight / 2, weight)))
    return StepMetrics(sums, jnp.int32(10), jnp.float32(nll), *[jnp.int32(skipped_in_a_row)] * 2)


def test_a_line_holds_means_over_counted_tokens_without_skipped_steps():
    meter = IntervalMeter(IntervalTotals(tokens=100))
    for step in (metrics(8.0, 4.0), metrics(math.inf, 4.0, skipped_in_a_row=1), metrics(6.0, 3.0)):
        meter.add(step)
    line = meter.values()
    assert line["loss"] == 14 / 7 and line["objective"] == pytest.approx(16 / 7) and line["accuracy"] == 0.5
    assert (line["tokens"], line["gradient_norm"], meter.last_loss) == (130, 6.0, 2.0)
    meter.add(metrics(5.0, 5.0))
    assert meter.values()["loss"] == 1.0  # of its own interval alone


def test_the_newest_step_is_read_only_when_the_next_one_comes_or_a_line_is_due():
    meter = IntervalMeter(IntervalTotals())
    meter.add(metrics(8.0, 4.0))
    assert meter.totals.tokens == 0
    meter.add(metrics(8.0, 4.0))
    assert meter.totals.tokens == 10
    assert meter.state()["tokens"] == 20


def test_throughput_leaves_pauses_out_and_counts_waiting_for_data(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = ThroughputMeter(flops_per_token=3.0, peak_flops=100.0)
    with meter.waiting():
        clock[0] += 1
    clock[0] += 3
    with meter.pause():
        clock[0] += 50
    meter.update(40)
    assert meter.speed == (10.0, pytest.approx(0.3), 0.25)
    with meter.pause():  # a line of the log, which begins the next interval in the middle of its work
        clock[0] += 7
        meter.restart(40)
        clock[0] += 9
    clock[0] += 2
    meter.update(50)
    assert meter.speed == (5.0, pytest.approx(0.15), 0.0)
    assert ThroughputMeter(3.0, None).speed.share_of_peak is None


def test_there_is_no_speed_before_a_step_is_measured():
    meter = ThroughputMeter(flops_per_token=3.0, peak_flops=100.0)
    meter.restart(40)  # after the first step, which compiles
    meter.update(40)
    assert meter.speed == (None, None, None)


def test_the_best_evaluation_is_that_of_the_lowest_loss_and_of_equal_ones_the_first():
    best = BestEvaluation()
    for step, loss in ((0, 3.0), (10, 2.0), (20, 2.0), (30, 2.5)):
        best.add(step, loss)
    assert best == BestEvaluation(step=10, loss=2.0, since=2)


def test_a_loss_that_is_not_a_number_is_never_the_best():
    best = BestEvaluation()
    for step, loss in ((0, math.nan), (10, 4.0), (20, math.nan)):
        best.add(step, loss)
    assert best == BestEvaluation(step=10, loss=4.0, since=1)


def test_patience_counts_evaluations_since_the_best_and_none_waits_for_ever():
    best = BestEvaluation(step=10, loss=2.0, since=2)
    assert not best.is_stale(3) and best.is_stale(2) and best.is_stale(1)
    assert not best.is_stale(None)
