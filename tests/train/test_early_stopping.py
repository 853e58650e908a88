"""When a run has got no better for long enough."""

import math

from biomamba_jax.train.meters import BestEvaluation


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
