"""Cycles are read from the text of an optimised module: a small one here, by hand in the TPU compiler's notation."""

from pathlib import Path

import pytest

from biomamba_jax.planning.cycles import kernel_cycles, other_cycles

STEP = Path(__file__).with_name("step.hlo").read_text()
UNKNOWN_BOUND = "get-tuple-element(%state), index=0"


def test_loops_count_as_often_as_their_conditions_let_them_run():
    assert other_cycles(STEP) == 64 * (100 + 3 * 10) + 2000  # the inner one from 1 by 3 to 10; the costlier branch


def test_a_stated_number_of_turns_comes_first():
    stated = STEP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert other_cycles(stated) == 5 * (100 + 3 * 10) + 2000


@pytest.mark.parametrize(
    "change",
    [
        ("constant(65)", UNKNOWN_BOUND),
        ("constant(65)", "constant({...})"),
        ("direction=LT", "direction=NE"),
        ("add(%i, %one)", "multiply(%i, %one)"),
        ("tuple(%first.copy", "tuple(%p"),
    ],
)
def test_an_unknown_number_of_turns_is_not_guessed(change):
    assert other_cycles(STEP.replace(*change)) is None


def test_a_loop_without_cycles_may_run_any_number_of_times():
    free = STEP.replace('"estimated_cycles":"10"', "").replace('"estimated_cycles":"100"', "")
    assert other_cycles(free.replace("constant(65)", UNKNOWN_BOUND)) == 2000


def test_kernels_are_counted_apart():
    assert kernel_cycles(STEP) == {"scan.3": 70000}
