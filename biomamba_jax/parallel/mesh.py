"""Devices as a mesh, and where batches and weights lie on it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from biomamba_jax.errors import UserError


def data_mesh() -> Mesh:
    """All devices of all hosts along one axis, "data"."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def rows_per_host(batch_size: int, mesh: Mesh, parts: int = 1) -> int:
    """Rows of a global batch that each host feeds.

    Args:
      parts: how many parts the batch is computed in, each spread over all devices.

    Raises:
      UserError: the parts do not divide over the devices.
    """
    if batch_size % (mesh.size * parts):
        raise UserError(
            f"data.batch_size = {batch_size}: must be a multiple of train.accumulation times the number of devices, "
            f"{parts} x {mesh.size}"
        )
    return batch_size // jax.process_count()


def summed_over_rows(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function(weights, batch, *fixed)` of each device's rows, its results summed over all devices.

    Every device runs the same program on its own rows: kernels, which cannot be partitioned by the compiler, and loops
    over rows need no communication. Weights, and what is fixed, are the same everywhere.
    """

    def local(weights: Any, batch: Any, fixed: Any) -> Any:
        return jax.lax.psum(function(weights, batch, *fixed), "data")

    # Replication is not tracked inside: kernels do not say over which axes their results vary.
    specs = (PartitionSpec(), PartitionSpec("data"), PartitionSpec())
    summed = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    return lambda weights, batch, *fixed: summed(weights, batch, fixed)


def shard_rows(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows as part of a global batch whose rows are spread over the devices."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
