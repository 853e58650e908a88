"""Devices as a mesh, and where batches and weights lie on it."""

from collections.abc import Mapping

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


def rows_per_host(batch_size: int, mesh: Mesh) -> int:
    """Rows of a global batch that each host feeds.

    Raises:
      UserError: the batch does not divide over the devices.
    """
    if batch_size % mesh.size:
        raise UserError(f"data.batch_size = {batch_size}: must be a multiple of the number of devices, {mesh.size}")
    return batch_size // jax.process_count()


def shard_rows(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows as part of a global batch whose rows are spread over the devices."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}
