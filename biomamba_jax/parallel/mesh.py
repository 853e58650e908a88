"""Devices as a mesh, and how a batch lies on it.

A mesh always has the four axes of `AXES`. Rows are spread over data and fsdp, a row's tokens over sequence; devices
along tensor see the same tokens. Weights: see `sharding`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from biomamba_jax.config import MeshConfig
from biomamba_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")
ROWS = ("data", "fsdp")
TOKENS = ("data", "fsdp", "sequence")
BATCH = PartitionSpec(ROWS, "sequence")
"""Of arrays [B L]."""


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that `config` describes, laid out along the devices' own network.

    Args:
      config: left out: all devices along data.
      devices: those of this run, or of a topology to compile for; left out: all devices of all hosts.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    config = config or MeshConfig()
    devices = list(devices if devices is not None else jax.devices())
    shape = _sizes(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:  # between slices there is only the slow network: copies of the weights talk once a step
        if shape[0] % slices:
            raise UserError(f"mesh.data = {shape[0]}: must be a multiple of the {slices} slices")
        inside = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    known = math.prod(size for size in config.sizes if size != -1)
    sizes = tuple(devices // known if size == -1 else size for size in config.sizes)
    if math.prod(sizes) != devices:
        asked = " x ".join(f"{name} {size}" for name, size in zip(AXES, config.sizes, strict=True))
        raise UserError(
            f"mesh: {asked} does not fit {devices} devices; set one of the four to -1, or change their sizes"
        )
    return sizes


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


@dataclass(frozen=True)
class Reader:
    """Which rows this host reads: part `index` of `count`. Hosts that share rows are one reader."""

    index: int
    count: int
    blocks: tuple[int, ...]
    """The blocks of rows, of one for each position along data and fsdp, that lie on this host's devices."""


@functools.cache
def reader(mesh: Mesh) -> Reader:
    """This host's share of every batch.

    Raises:
      UserError: hosts share rows in part only.
    """
    hosts = np.array([device.process_index for device in mesh.devices.flat])
    return share_of(jax.process_index(), hosts.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1))


def share_of(host: int, hosts: np.ndarray) -> Reader:
    """`reader` of a host.

    Args:
      hosts: the host of every device, [blocks of rows, devices that see the same rows].

    Raises:
      UserError: hosts share rows in part only.
    """
    blocks: dict[int, set[int]] = {}
    for block, devices in enumerate(hosts.tolist()):
        for device_host in devices:
            blocks.setdefault(device_host, set()).add(block)
    shares = sorted({tuple(sorted(own)) for own in blocks.values()})
    if sum(map(len, shares)) != len(hosts) or len({len(share) for share in shares}) != 1:
        raise UserError(
            f"mesh.tensor x mesh.sequence = {hosts.shape[1]}: must divide the number of devices of a host, or be a "
            "multiple of it"
        )
    own = tuple(sorted(blocks[host]))
    return Reader(shares.index(own), len(shares), own)


def rows_per_host(batch_size: int, mesh: Mesh, parts: int = 1) -> int:
    """Rows of a global batch that each reader feeds.

    Args:
      parts: how many parts the batch is computed in, each spread over all devices.

    Raises:
      UserError: the parts do not divide over the devices.
    """
    across = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (across * parts):
        raise UserError(
            f"data.batch_size = {batch_size}: must be a multiple of train.accumulation times mesh.data x mesh.fsdp, "
            f"{parts} x {across}"
        )
    return batch_size // reader(mesh).count


def shard_rows(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows [b L] as part of a global batch that is spread over the devices.

    Raises:
      UserError: the tokens of a row do not divide over mesh.sequence.
    """
    sharding, own = NamedSharding(mesh, BATCH), reader(mesh)

    def place(rows: np.ndarray) -> jax.Array:
        if rows.shape[1] % mesh.shape["sequence"]:
            raise UserError(f"mesh.sequence = {mesh.shape['sequence']}: must divide rows of {rows.shape[1]} tokens")
        in_block = rows.shape[0] // len(own.blocks)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first = own.blocks.index((index[0].start or 0) // in_block) * in_block
            return rows[first : first + in_block, index[1]]

        return jax.make_array_from_callback((rows.shape[0] * own.count, rows.shape[1]), sharding, part)

    return {name: place(rows) for name, rows in batch.items()}
