"""Machines by their Cloud TPU names."""

import pytest

from biomamba_jax.errors import UserError
from biomamba_jax.planning.topology import parse_topology


@pytest.mark.parametrize(
    ("name", "compiler", "chips", "devices"),
    [
        ("v5e-1", "v5e:1x1", 1, 1),
        ("v5e-8", "v5e:2x4", 8, 8),
        ("v5litepod-256", "v5e:16x16", 256, 256),
        ("v6e-256", "v6e:16x16", 256, 256),
        ("v6e-32", "v6e:4x8", 32, 32),
        ("v4-8", "v4:2x2x1", 4, 4),  # cores
        ("v5p-8", "v5p:2x2x1", 4, 4),
        ("v5p-64", "v5p:2x4x4", 32, 32),
        ("v5p-128", "v5p:4x4x4", 64, 64),
        ("v5p-256", "v5p:4x4x8", 128, 128),
        ("v5p-1024", "v5p:8x8x8", 512, 512),
        ("v7x-128", "tpu7x:4x4x4", 64, 128),  # two devices a chip
        ("tpu7x-8", "tpu7x:2x2x1", 4, 8),
        ("v5p:4x4x12", "v5p:4x4x12", 192, 192),
        ("V5E-16", "v5e:4x4", 16, 16),
        ("h100-8", "1x1x8", 8, 8),
        ("h100-32", "4x1x8", 32, 32),
        ("h100-1", "1x1x1", 1, 1),
    ],
)
def test_names_are_those_of_cloud_tpu(name, compiler, chips, devices):
    topology = parse_topology(name)
    assert (topology.compiler_name, topology.chips, topology.devices) == (compiler, chips, devices)


def test_slices_multiply_chips_and_each_generation_knows_its_chip():
    topology = parse_topology("v6e-256", slices=2)
    assert (topology.chips, str(topology), topology.chip.name) == (512, "2 x v6e-256", "TPU v6e")
    assert parse_topology("h100-8").chip.name == "H100 SXM"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "topology = 'v5e': unknown; give a generation"),
        ("v9-8", "unknown"),
        ("v5e-2", "no slice has this default size"),
        ("v5e-512", "no slice has this default size"),
        ("v5p-129", "no slice has this default size"),
        ("v5p-384", "give its shape, as in v5p:4x4x12"),
        ("v5e:4x4x4", "the shape must have 2 dimensions, as in v5e:4x8"),
        ("h100-12", "GPUs come in nodes of 8"),
    ],
)
def test_what_does_not_exist_is_refused(name, message):
    with pytest.raises(UserError, match=r"topology = ") as refusal:
        parse_topology(name)
    assert message in str(refusal.value)
