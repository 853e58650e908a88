"""Intervals and tests against textbook values and simulations."""

import numpy as np
import pytest

from biomamba_jax.tasks import statistics
from biomamba_jax.tasks.statistics import Estimate, Resampling


def test_wilson_s_interval_is_that_of_the_textbook():
    # z = 1.959964: center (p + z^2/2n) / (1 + z^2/n), half width z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)
    found = statistics.wilson(8, 10, 0.95)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-6)


def test_wilson_s_interval_stays_inside_0_and_1():
    found = statistics.wilson(10, 10, 0.95)
    assert found.high == 1 and 0.7 < found.low < 0.73


def test_intervals_are_at_the_level_that_was_asked_for():
    # At 50 %: z = 0.674490; a mean of normal values is within z standard errors.
    found = statistics.wilson(8, 10, 0.5)
    assert (found.low, found.high) == pytest.approx((0.702491, 0.871401), abs=1e-6)
    values = np.random.default_rng(0).normal(size=400)
    found = statistics.bootstrap(np.mean, values, resampling=Resampling(confidence=0.5))
    assert found.high - found.low == pytest.approx(2 * 0.674490 * values.std() / 20, rel=0.1)


def test_mcnemar_looks_at_questions_that_one_model_alone_got_right():
    first = [True] * 8 + [False] * 2 + [True] * 5
    second = [False] * 8 + [True] * 2 + [True] * 5
    only_first, only_second, p = statistics.mcnemar(first, second)
    assert (only_first, only_second) == (8, 2)
    assert p == pytest.approx(2 * (1 + 10 + 45) / 2**10)  # two-sided: P(0, 1 or 2 of 10)


def test_equal_models_do_not_differ():
    assert statistics.mcnemar([True, False], [True, False]) == (0, 0, 1.0)


def test_a_ratio_of_sums_weighs_documents_by_their_length():
    nats, tokens = np.array([10.0, 90.0]), np.array([10, 30])
    assert statistics.ratio_of_sums(nats, tokens) == pytest.approx(2.5)  # not the mean of 1 and 3


def test_the_bootstrap_s_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        tokens = random.integers(5, 50, 80)
        nats = tokens * 3.0 + random.normal(0, 1, 80) * tokens
        found = statistics.bootstrap(
            statistics.ratio_of_sums, nats, tokens, resampling=Resampling(resamples=300, seed=seed)
        )
        hits += found.low <= 3.0 <= found.high
    assert 0.88 <= hits / 200 <= 0.98


def test_items_are_drawn_whole():
    same = np.arange(1.0, 50)
    found = statistics.bootstrap(statistics.difference_of_ratios, same, same, same, resampling=Resampling())
    assert found == Estimate(0.0, 0.0, 0.0)


def test_an_interval_repeats_with_its_seed():
    values = np.random.default_rng(1).normal(size=50)
    first, again, other = (
        statistics.bootstrap(np.mean, values, resampling=Resampling(seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_single_item_has_no_interval():
    assert statistics.bootstrap(np.mean, np.array([2.0]), resampling=Resampling()) == Estimate(2.0)
