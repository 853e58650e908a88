"""Links of collectives on tori, worked by hand."""

import itertools

import pytest

from biomamba_jax.planning.links import Places, Route
from biomamba_jax.planning.topology import parse_topology


def torus(name, slices=1):
    """Places of all chips of a topology, the last axis fastest, one slice after the other."""
    topology = parse_topology(name, slices)
    chips = list(itertools.product(*map(range, topology.shape)))
    return Places([s for s in range(slices) for _ in chips], chips * slices, topology.shape, topology.joined)


def route(name, *first_group):
    places = torus(name)
    return places.route([[places.coordinates.index(chip) for chip in first_group]])


def line(axis, places, chip):
    """Chips like `chip`, at each of `places` along an axis."""
    return [(*chip[:axis], at, *chip[axis + 1 :]) for at in places]


@pytest.mark.parametrize(
    ("name", "group", "expected"),
    [
        # 16 x 16: both axes are rings of two links.
        ("v5e-256", line(0, range(16), (0, 3)), Route("x", 2, 8)),
        ("v5e-256", line(1, range(16), (3, 0)), Route("y", 2, 8)),
        ("v5e-256", list(itertools.product(range(16), range(16))), Route("x y", 4, 16)),
        # A part of an axis is a line, whose ends have one link.
        ("v5e-256", line(1, range(4), (0, 0)), Route("y", 1, 3)),
        ("v5e-256", list(itertools.product(range(4), range(4))), Route("x y", 2, 6)),
        # Every fourth chip: a ring whose links four groups share.
        ("v5e-256", line(1, range(0, 16, 4), (0, 0)), Route("y", 2 / 4, 8)),
        # Two chips, then two more eight away: four groups cross the link between 7 and 8.
        ("v5e-256", line(1, (0, 1, 8, 9), (0, 0)), Route("y", 2 / 4, 8)),
        # Smaller slices have no joined ends, but along an axis of 16.
        ("v5e-64", line(0, range(8), (0, 0)), Route("x", 1, 7)),
        ("v6e:8x16", list(itertools.product(range(8), range(16))), Route("x y", 3, 15)),
        # 4 x 4 x 4: rings in three axes; 2 x 4 x 4 is less than a cube and has none.
        ("v5p-128", line(2, range(4), (1, 1, 0)), Route("z", 2, 2)),
        ("v5p-128", list(itertools.product(range(4), range(2), (0,))), Route("x y", 3, 3)),
        ("v5p-128", list(itertools.product(range(4), repeat=3)), Route("x y z", 6, 6)),
        ("v5p-64", line(2, range(4), (1, 1, 0)), Route("z", 1, 3)),
        # Both diagonal halves of a square share its links.
        ("v5e-4", [(0, 0), (1, 1)], Route("x y", 1, 2)),
    ],
)
def test_a_group_has_the_links_of_the_axes_along_which_it_lies(name, group, expected):
    assert route(name, *group) == expected


def test_a_shift_by_several_chips_shares_links_and_takes_the_shorter_way_around():
    places = torus("v5e-256")
    shift = lambda n: [(k, (k + n) % 16) for k in range(16)]  # noqa: E731
    assert places.route(shift(1), pairs=True) == Route("y", 1, 1)
    assert places.route(shift(4), pairs=True) == Route("y", 1 / 4, 4)
    assert places.route(shift(14), pairs=True) == Route("y", 1 / 2, 2)


def test_groups_of_two_slices_cross_the_network_and_others_do_not():
    places = torus("v5e-256", slices=2)
    assert places.route([[k, k + 256] for k in range(256)]).axes == "network"
    assert places.route([list(range(256)), list(range(256, 512))]) == Route("x y", 4, 16)


def test_gpus_of_a_node_have_a_switch_whatever_the_group():
    assert Places([0] * 8, [()] * 8).route([[0, 1], [2, 3]]) == Route("switch", 1)
    assert Places([0] * 8 + [1] * 8, [()] * 16).route([[0, 8]]) == Route("network", 1)
