"""Machines by their Cloud TPU names: v5e-256, v5p-128, h100-8.

Cloud TPU counts chips for v5e and v6e, and TensorCores, two per chip, for v4, v5p and TPU7x. A name may also give the
shape of the slice, as libtpu does: "v5p:4x4x12".
"""

import dataclasses
import math
import re
from collections.abc import Mapping

from biomamba_jax.errors import UserError
from biomamba_jax.hardware import Chip, find_chip


@dataclasses.dataclass(frozen=True)
class Generation:
    """One generation of TPUs or GPUs."""

    device_kind: str
    """`jax.Device.device_kind` of its devices."""
    axes: int
    """Dimensions of the torus inside a slice."""
    counted: int
    """Units per chip that the number in a name counts: 1 for chips, 2 for TensorCores."""
    devices: int
    """`jax.Device`s per chip."""
    joined: int
    """The last chip along an axis is a neighbour of the first where the axis is a multiple of this (of three axes:
    where all are); 0 for GPUs, whose node has a switch."""
    link: float
    """Bytes/s that a device sends over one link of the torus; of a GPU over its switch."""
    network: float
    """Bytes/s that a device can send between slices or nodes: its share of the host's network."""
    vector: float | None
    """Float32 operations/s of a device's vector units; None if unknown."""


# Links: half of the bidirectional "inter-chip interconnect bandwidth per chip" of
# https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} over two links an axis; for v4 links of 50 GB/s (arXiv
# 2304.01433); for TPU7x, as for its FLOP/s, half a chip's. Joined ends: "How to Scale Your Model" (Austin et al. 2025),
# chapter 2. Networks: the same pages; for v4 and TPU7x, whose pages do not say, v5e's and v5p's share. Vector: 8 x 128
# lanes x 4 slots x clock x cores, clocks from peak FLOP/s. H100: NVLink 4 (900 GB/s both ways), one 400 Gbit/s adapter
# a GPU, 128 fp32 units x 132 x 1.98 GHz (DGX H100, H100 datasheets).
GENERATIONS: Mapping[str, Generation] = {
    "v4": Generation("TPU v4", 3, 2, 1, 4, 50e9, 3.125e9, 2 * 4096 * 1.05e9),
    "v5e": Generation("TPU v5 lite", 2, 1, 1, 16, 50e9, 3.125e9, 4096 * 1.5e9),
    "v5p": Generation("TPU v5p", 3, 2, 1, 4, 100e9, 6.25e9, 2 * 4096 * 1.75e9),
    "v6e": Generation("TPU v6 lite", 2, 1, 1, 16, 100e9, 12.5e9, 4096 * 1.75e9),
    "tpu7x": Generation("TPU7x", 3, 2, 2, 4, 50e9, 6.25e9, None),
    "h100": Generation("NVIDIA H100 80GB HBM3", 1, 1, 1, 0, 450e9, 50e9, 2 * 128 * 132 * 1.98e9),
}
HOP = 1e-6
"""Seconds that data needs from one chip of a torus to the next ("How to Scale Your Model", Austin et al. 2025)."""
_ALIAS = {"v5litepod": "v5e", "v5lite": "v5e", "v6lite": "v6e", "trillium": "v6e", "v7x": "tpu7x", "ironwood": "tpu7x"}
_NODE = 8  # GPUs connected by NVLink


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more TPU slices or GPU nodes."""

    name: str
    """As the user gave it."""
    generation: str
    """Key of `GENERATIONS`."""
    shape: tuple[int, ...]
    """Chips along each dimension of a slice; GPUs of one node."""
    slices: int
    """Slices or nodes, connected by the data center network."""

    @property
    def kind(self) -> Generation:
        """Its generation's figures."""
        return GENERATIONS[self.generation]

    @property
    def is_tpu(self) -> bool:
        """True for TPUs, False for GPUs."""
        return self.kind.device_kind.startswith("TPU")

    @property
    def joined(self) -> tuple[bool, ...]:
        """True for each axis whose last chip is a neighbour of the first."""
        if not self.is_tpu:
            return (False,) * len(self.shape)
        whole = [size % self.kind.joined == 0 for size in self.shape]
        return tuple(whole) if len(whole) == 2 else (all(whole),) * len(whole)

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """`jax.Device`s of all slices."""
        return self.chips * self.kind.devices

    @property
    def chip(self) -> Chip:
        """Datasheet figures of one device."""
        chip = find_chip(self.kind.device_kind)
        assert chip is not None  # every generation is in the table of chips
        return chip

    @property
    def compiler_name(self) -> str:
        """The compiler's name for one TPU slice, or for all GPUs."""
        if self.is_tpu:
            return f"{self.generation}:{'x'.join(map(str, self.shape))}"
        return f"{self.slices}x1x{self.shape[0]}"

    def __str__(self) -> str:
        slices = f"{self.slices} x " if self.slices > 1 else ""
        return f"{slices}{self.name}"


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Return the topology of a name.

    Args:
      name: "v5e-256", "v5litepod-256", "v5p-128", "v6e-256", "v7x-128", "h100-8", or a shape, "v5e:4x8".
      slices: number of slices of this size.

    Raises:
      UserError: the generation is unknown, or it has no slice of that size.
    """
    match = re.fullmatch(r"([a-z0-9]+?)(?:-(\d+)|[:-](\d+(?:x\d+)+))", name.strip().lower())
    generation = _ALIAS.get(match[1], match[1]) if match else ""
    if match is None or generation not in GENERATIONS:
        raise UserError(
            f"topology = {name!r}: unknown; give a generation ({', '.join(GENERATIONS)}) and a size, for instance "
            "v5e-256, v5p-128 (v4, v5p and tpu7x count cores), v5e:4x8 or h100-8"
        )
    if slices < 1:
        raise UserError(f"slices = {slices}: must be at least 1")
    kind = GENERATIONS[generation]
    if match[3]:
        shape = tuple(map(int, match[3].split("x")))
        if len(shape) != kind.axes or 0 in shape:
            raise UserError(f"topology = {name!r}: the shape must have {kind.axes} dimensions, as in {_example(kind)}")
        return Topology(name, generation, shape, slices)
    counted = int(match[2])
    if generation == "h100":
        if counted > _NODE and counted % _NODE:
            raise UserError(f"topology = {name!r}: GPUs come in nodes of {_NODE}: give a multiple of {_NODE}")
        nodes = max(counted // _NODE, 1)
        return Topology(name, generation, (min(counted, _NODE),), slices * nodes)
    chips, rest = divmod(counted, kind.counted)
    default = None if rest else slice_shape(chips, kind.axes)
    if default is None:
        raise UserError(f"topology = {name!r}: no slice has this default size; give its shape, as in {_example(kind)}")
    return Topology(name, generation, default, slices)


def _example(kind: Generation) -> str:
    generation = next(name for name, other in GENERATIONS.items() if other is kind)
    return f"{generation}:{'4x4x12' if kind.axes == 3 else '4x8'}"


def slice_shape(chips: int, axes: int) -> tuple[int, ...] | None:
    """Return Cloud TPU's default shape for a power of two of chips; None if the shape must be given.

    Two dimensions: as square as possible, at most 16 x 16. Three: as cubic as possible. The last dimension is the
    longest, but for 2 x 2 x 1.
    """
    if chips < 1 or chips & (chips - 1) or chips == 2 or (axes == 2 and chips > 256):
        return None
    if chips == 4 and axes == 3:
        return 2, 2, 1
    doublings = chips.bit_length() - 1
    return tuple(2 ** ((doublings + axis) // axes) for axis in range(axes))
