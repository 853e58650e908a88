"""Rows of a batch over the devices of this host, each of which computes its own, so that kernels stay unsharded."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec


def row_mesh() -> Mesh:
    """Return this host's devices along one axis, over which rows are sharded."""
    devices = jax.local_devices()
    return jax.make_mesh((len(devices),), ("rows",), axis_types=(AxisType.Auto,), devices=devices)


def rows_of(batch_size: int, mesh: Mesh) -> int:
    """Return `batch_size` rounded up to a multiple of the devices."""
    return -(-batch_size // mesh.size) * mesh.size


def over_rows(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Return `function(model, rows, states)`, whose results are by row, as one that each device runs on its rows."""
    sharded = PartitionSpec("rows")
    specs = PartitionSpec(), sharded, sharded
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=sharded, check_vma=False)
