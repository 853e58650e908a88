"""From bytes, operations and collectives to seconds, worked by hand for chips of round figures."""

import dataclasses

import pytest

from biomamba_jax.errors import UserError
from biomamba_jax.planning import kernels
from biomamba_jax.planning.ahead_of_time import Estimate
from biomamba_jax.planning.compile import Compiled
from biomamba_jax.planning.costs import Costs, Operation
from biomamba_jax.planning.links import Route
from biomamba_jax.planning.schedule import Collective, Loop, Wait, one_call
from biomamba_jax.planning.times import step_times
from biomamba_jax.planning.topology import parse_topology

TOPOLOGY = parse_topology("v5e-4", slices=2)
PEAK, BANDWIDTH = 197e12, 819e9
LINK, NETWORK = TOPOLOGY.kind.link, TOPOLOGY.kind.network
COMPILED = Compiled(
    mesh={"data": 8},
    costs=Costs(flops=3 * PEAK, kernels=[Operation("scan", 2, 0.0, BANDWIDTH / 4, TOPOLOGY.kind.vector)]),
    schedule=(Loop(3, (Operation("product", 1, PEAK, BANDWIDTH / 2),)), Operation("sum", 1, 0.0, 2 * BANDWIDTH)),
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


@pytest.mark.parametrize(("blocks", "cores"), [(1, 1), (2, 2), (3, 1.5), (8, 2)])
def test_both_cores_of_a_chip_work_only_where_a_kernel_has_a_block_for_each(blocks, cores):
    v5p = parse_topology("v5p-8")
    kernel = Operation("scan", 1, 0.0, 1e6, parallel=blocks, is_kernel=True)
    compiled = Compiled(costs=Costs(kernels=[kernel]))
    alone = 7.0  # seconds on one core
    assert step_times(compiled, v5p, rates={"scan": alone / 1e6}).kernels == pytest.approx(alone / cores)
    stated = dataclasses.replace(kernel, vector_operations=v5p.kind.vector)  # a second of both cores
    compiled = Compiled(costs=Costs(kernels=[stated]))
    assert step_times(compiled, v5p).kernels == pytest.approx(2 / cores)


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


def test_a_rate_is_the_slope_of_the_cycles_of_one_core_over_its_clock(rates, monkeypatch):
    def profiled(requests, **options):
        return [Estimate(static_cycles={"ssd_forward.1": 10**6 + 1000 * r.arguments["length"]}) for r in requests]

    monkeypatch.setattr(kernels, "estimates", profiled)
    chip = parse_topology("v5p-8").chip
    (rate,) = rates("mamba2", "v5p").values()
    assert chip.cores == 2
    # Bytes a token: x, dt and y of 1,536 channels (24 heads), B and C of 128 states, bfloat16; segment ids; states.
    at_least = 2 * (2 * 1536 + 24 + 2 * 128) + 4
    assert 0.5 < rate * at_least * chip.clock / 1000 <= 1  # of one core


def collective(name, seconds, axes="x", overlaps=True, links=2, hops=0):
    speed = NETWORK if axes == "network" else links * LINK
    return Collective("collective-permute", 1, int(seconds * speed), 2, Route(axes, links, hops), overlaps, name)


def product(seconds):
    return Operation("product", 1, seconds * PEAK, 0.0)


def timed(*schedule):
    times = step_times(Compiled(schedule=schedule), TOPOLOGY)
    return times, {c.route.axes: pytest.approx(seconds) for c, seconds in times.exposed.items()}


def test_a_synchronous_collective_is_exposed_and_an_asynchronous_one_hides_behind_what_runs_until_it_is_awaited():
    times, exposed = timed(collective("a", 2, overlaps=False), product(3))
    assert (times.step, exposed) == (pytest.approx(5), {"x": 2})
    times, exposed = timed(collective("a", 2), product(3), Wait("a"))
    assert (times.step, exposed) == (pytest.approx(3), {})
    times, exposed = timed(collective("a", 2), product(0.5), Wait("a"), product(3))
    assert (times.step, exposed) == (pytest.approx(5), {"x": 1.5})


def test_what_is_exposed_in_a_loop_counts_as_often_as_the_loop_runs_and_an_end_that_nothing_awaits_is_awaited():
    times, exposed = timed(Loop(4, (collective("a", 2), product(0.5), Wait("a"))))
    assert (times.step, exposed, times.links) == (pytest.approx(8), {"x": 6}, pytest.approx(8))
    times, exposed = timed(product(1), collective("a", 2))
    assert (times.step, exposed) == (pytest.approx(3), {"x": 2})
    times, exposed = timed(Loop(4, (collective("a", 2), product(0.5))))
    assert (times.step, exposed) == (pytest.approx(8), {"x": 6})


def test_collectives_of_a_slice_queue_for_its_links_and_the_network_works_beside_them():
    times, exposed = timed(collective("a", 2), collective("b", 2, "y"), product(3), Wait("b"), Wait("a"))
    assert (times.step, exposed) == (pytest.approx(4), {"y": 1})
    assert times.links == pytest.approx(2)  # as a bound: axes could work at the same time
    times, exposed = timed(collective("a", 2), collective("b", 3.5, "network"), product(3), Wait("a"), Wait("b"))
    assert (times.step, exposed) == (pytest.approx(3.5), {"network": 0.5})
    assert (times.bound, times.floor) == ("network", pytest.approx(3.5))


def test_a_collective_over_one_axis_of_16_x_16_takes_twice_as_long_as_over_both_and_a_microsecond_a_hop():
    pod = parse_topology("v5e-256")
    gathered = int(16 * 50e9)  # 16 shards of what a link sends in a second
    one = Collective("all-gather", 1, gathered, 16, Route("y", 2, 8), False)
    both = Collective("all-gather", 1, gathered, 256, Route("x y", 4, 16), False)
    step = lambda c: step_times(Compiled(schedule=(c,)), pod).step  # noqa: E731
    assert step(one) == pytest.approx(15 / 2 + 8e-6, abs=1e-9)
    assert step(both) == pytest.approx(16 * 255 / 256 / 4 + 16e-6, abs=1e-9)
    reduced = dataclasses.replace(one, kind="all-reduce")  # reduce-scattered, then all-gathered
    assert step(reduced) == pytest.approx(2 * step(one))
    assert step_times(Compiled(schedule=(reduced,)), pod).exposed == {one_call(reduced): pytest.approx(2 * step(one))}
