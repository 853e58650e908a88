"""From bytes, operations and collectives to seconds, worked by hand for chips of round figures."""

import dataclasses

import pytest

from biomamba_jax.errors import UserError
from biomamba_jax.planning import kernels
from biomamba_jax.planning.ahead_of_time import Estimate
from biomamba_jax.planning.compile import Compiled
from biomamba_jax.planning.costs import Costs, Operation
from biomamba_jax.planning.program import Collective
from biomamba_jax.planning.times import step_times
from biomamba_jax.planning.topology import parse_topology

TOPOLOGY = parse_topology("v5e-4", slices=2)
PEAK, BANDWIDTH = 197e12, 819e9
LINK, NETWORK = TOPOLOGY.kind.link, TOPOLOGY.kind.network
COMPILED = Compiled(
    mesh={"data": 8},
    costs=Costs(flops=3 * PEAK, kernels=[Operation("scan", 2, 0.0, BANDWIDTH / 4, TOPOLOGY.kind.vector)]),
    work=[Operation("product", 3, PEAK, BANDWIDTH / 2), Operation("sum", 1, 0.0, 2 * BANDWIDTH)],
)


def test_each_operation_takes_the_longer_of_its_arithmetic_and_its_traffic():
    times = step_times(COMPILED, TOPOLOGY)
    assert times.compute == pytest.approx(3)
    assert times.memory == pytest.approx(3 / 2 + 2 + 2 / 4)
    assert times.kernels == pytest.approx(2)  # bound by the vector units, as they state
    assert times.step == pytest.approx(3 + 2 + 2)
    assert (times.bound, times.floor) == ("memory", pytest.approx(4))


def test_a_static_profile_counts_where_it_is_slower_than_what_kernels_state_and_kernels_without_one_are_named():
    assert step_times(COMPILED, TOPOLOGY, rates={"scan": 8 / BANDWIDTH}).kernels == pytest.approx(2 * 2)
    faster = step_times(COMPILED, TOPOLOGY, rates={"scan": 1e-30})
    assert (faster.kernels, faster.unprofiled) == (pytest.approx(2), ())
    assert step_times(COMPILED, TOPOLOGY).unprofiled == ("scan",)


@pytest.fixture
def rates():
    """The rates of kernels, computed anew."""
    kernels.kernel_rates.cache_clear()
    yield kernels.kernel_rates
    kernels.kernel_rates.cache_clear()


def test_a_missing_profile_is_logged_with_its_reason(rates, monkeypatch, caplog):
    def aborted(*arguments, **options):
        raise UserError("the compiler's process ended: Aborted")

    monkeypatch.setattr(kernels, "estimates", aborted)
    assert rates("mamba2", "v5e", 1.0) == {}
    assert caplog.messages == [
        "ssd on v5e: no profile, so the time of its kernels is a lower bound: the compiler's process ended: Aborted"
    ]


def test_a_rate_is_the_slope_of_the_cycles_over_clock_and_cores(rates, monkeypatch):
    def profiled(requests, **options):
        return [Estimate(static_cycles={"ssd_forward.1": 10**6 + 1000 * r.arguments["length"]}) for r in requests]

    monkeypatch.setattr(kernels, "estimates", profiled)
    chip = parse_topology("v5p-8").chip
    (rate,) = rates("mamba2", "v5p").values()
    assert chip.cores == 2
    # Bytes a token: x, dt and y of 1,536 channels (24 heads), B and C of 128 states, bfloat16; segment ids; states.
    at_least = 2 * (2 * 1536 + 24 + 2 * 128) + 4
    assert 0.5 < rate * at_least * chip.clock * chip.cores / 1000 <= 1


def collective(seconds, between, overlaps):
    speed = NETWORK if between else LINK
    return Collective("collective-permute", 1, int(seconds * speed), 2, between, overlaps)


def test_exposed_collectives_add_up_and_overlapped_ones_hide_unless_they_take_longer_than_all_work():
    collectives = [collective(1, False, False), collective(2, False, True), collective(3, True, True)]
    times = step_times(dataclasses.replace(COMPILED, collectives=collectives), TOPOLOGY)
    assert (times.links, times.network) == (pytest.approx(3), pytest.approx(3))
    assert times.step == pytest.approx(7 + 1)
    longer = step_times(dataclasses.replace(COMPILED, collectives=[collective(30, True, True)]), TOPOLOGY)
    assert (longer.step, longer.bound) == (pytest.approx(30), "network")
