"""The device mesh, and how a batch is sharded over it.

A mesh always has the four axes of `AXES`. Rows are sharded over data and fsdp, a row's tokens over sequence; devices
along tensor see the same tokens. Parameters: see `sharding`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from biomamba_jax.config import MeshConfig
from biomamba_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "sequence")
TOKEN_AXES = ("data", "fsdp", "sequence")
"""Axes that the tokens of a batch are sharded over."""
BATCH_SPEC = PartitionSpec(("data", "fsdp"), "sequence")
"""PartitionSpec of a batch's arrays [B L]."""


def make_mesh(config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh that `config` describes, laid out along the devices' network.

    Args:
      config: sizes of the axes; left out: all devices along data.
      devices: devices of this run, or of a topology to compile for; left out: all devices of all hosts.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    config = config or MeshConfig()
    devices = list(devices if devices is not None else jax.devices())
    shape = _sizes(config, len(devices))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:  # slices are joined by the slow data-centre network: only data parallelism crosses it, once a step
        if shape[0] % slices:
            raise UserError(f"mesh.data = {shape[0]}: must be a multiple of the {slices} slices")
        inside = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _sizes(config: MeshConfig, devices: int) -> tuple[int, ...]:
    known = math.prod(size for size in config.sizes if size != -1)
    sizes = tuple(devices // known if size == -1 else size for size in config.sizes)
    if math.prod(sizes) != devices:
        product = " x ".join(f"{name} {size}" for name, size in zip(AXES, config.sizes, strict=True))
        raise UserError(
            f"mesh: {product} does not fit {devices} devices; set one of the four to -1, or change their sizes"
        )
    return sizes


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds."""
    return NamedSharding(mesh, PartitionSpec())


@dataclass(frozen=True)
class HostShard:
    """The rows of every batch that a host reads. Hosts whose devices share rows have the same shard."""

    index: int
    """Position of the shard."""
    count: int
    """Number of shards."""
    blocks: tuple[int, ...]
    """Positions along data x fsdp that are on this host's devices."""


@functools.cache
def host_shard(mesh: Mesh) -> HostShard:
    """Return this host's shard of every batch.

    Raises:
      UserError: hosts share some rows but not all.
    """
    hosts = np.array([device.process_index for device in mesh.devices.flat])
    return shard_of_host(jax.process_index(), hosts.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1))


def shard_of_host(host: int, hosts: np.ndarray) -> HostShard:
    """Return the shard of `host`.

    Args:
      host: its process index.
      hosts: the host of every device, [position along data x fsdp, devices that see the same rows].

    Raises:
      UserError: hosts share some rows but not all.
    """
    blocks: dict[int, set[int]] = {}
    for block, devices in enumerate(hosts.tolist()):
        for device_host in devices:
            blocks.setdefault(device_host, set()).add(block)
    shards = sorted({tuple(sorted(own)) for own in blocks.values()})
    if sum(map(len, shards)) != len(hosts) or len({len(shard) for shard in shards}) != 1:
        raise UserError(
            f"mesh.tensor x mesh.sequence = {hosts.shape[1]}: must divide the number of devices of a host, or be a "
            "multiple of it"
        )
    own = tuple(sorted(blocks[host]))
    return HostShard(shards.index(own), len(shards), own)


def rows_per_host(batch_size: int, mesh: Mesh, accumulation: int = 1) -> int:
    """Return the number of a global batch's rows that each host shard holds.

    Args:
      batch_size: rows of the global batch.
      mesh: devices that it is sharded over.
      accumulation: parts that the batch is computed in, each sharded over all devices.

    Raises:
      UserError: a part does not divide over the devices.
    """
    across = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (across * accumulation):
        raise UserError(
            f"data.batch_size = {batch_size}: must be a multiple of train.accumulation times mesh.data x mesh.fsdp, "
            f"{accumulation} x {across}"
        )
    return batch_size // host_shard(mesh).count


def host_batch(batch_size: int, mesh: Mesh, accumulation: int = 1) -> dict[str, Any]:
    """Return `batch_size`, `process_index` and `process_count` for the batches that this host reads.

    Args:
      batch_size: rows of the global batch.
      mesh: devices that it is sharded over.
      accumulation: see `rows_per_host`.

    Raises:
      UserError: see `rows_per_host`.
    """
    shard, rows = host_shard(mesh), rows_per_host(batch_size, mesh, accumulation)
    return {"batch_size": rows, "process_index": shard.index, "process_count": shard.count}


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return this host's rows [b L] as part of a global batch [B L] that is sharded over the mesh.

    Raises:
      UserError: mesh.sequence does not divide the tokens of a row.
    """
    sharding, own = NamedSharding(mesh, BATCH_SPEC), host_shard(mesh)

    def place(rows: np.ndarray) -> jax.Array:
        if rows.shape[1] % mesh.shape["sequence"]:
            raise UserError(f"mesh.sequence = {mesh.shape['sequence']}: must divide rows of {rows.shape[1]} tokens")
        rows_per_block = rows.shape[0] // len(own.blocks)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            first = own.blocks.index((index[0].start or 0) // rows_per_block) * rows_per_block
            return rows[first : first + rows_per_block, index[1]]

        return jax.make_array_from_callback((rows.shape[0] * own.count, rows.shape[1]), sharding, part)

    return {name: place(rows) for name, rows in batch.items()}
