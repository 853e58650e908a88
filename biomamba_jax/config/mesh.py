"""Settings of the device mesh and of multi-host start-up."""

from dataclasses import dataclass
from typing import Annotated

from biomamba_jax.config.checks import Limit, Settings, check

AxisSize = Annotated[
    int, Limit("at least 1, or -1 for the devices that the other axes leave", lambda x: x >= 1 or x == -1)
]
Seconds = Annotated[int, Limit("at least 1 second, and at most a day (86400)", lambda x: 1 <= x <= 86400)]


@dataclass(frozen=True)
class MeshConfig(Settings, section="mesh"):
    """Axes of the device mesh: data x fsdp x tensor x sequence devices; one axis may be -1, the devices that remain."""

    data: AxisSize = -1
    """Data parallelism: replicas of the weights, each with its own rows. A multiple of the number of TPU slices."""
    fsdp: AxisSize = 1
    """FSDP: devices that weights and optimizer state are sharded over, each with its own rows; saves memory."""
    tensor: AxisSize = 1
    """Tensor parallelism: devices that each layer's channels and heads, and the vocabulary, are sharded over."""
    sequence: AxisSize = 1
    """Sequence parallelism: devices that the tokens of each row are sharded over, for long rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.sizes.count(-1) <= 1, "mesh", self.sizes, "at most one axis may be -1")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Sizes of data, fsdp, tensor and sequence, in this order."""
        return self.data, self.fsdp, self.tensor, self.sequence


@dataclass(frozen=True)
class DistributedConfig(Settings, section="distributed"):
    """Addresses by which the processes of several hosts find each other.

    Automatic on Cloud TPU, on GKE (GPU nodes: through xpk), under SLURM's srun and under mpirun of Open MPI up to
    version 4.
    """

    coordinator: str | None = None
    """host:port of the first process, the same for all; default: detected where launched as one of several."""
    processes: int | None = None
    """With coordinator: number of processes."""
    process_id: int | None = None
    """With coordinator: index of this process, from 0."""
    start_timeout: Seconds = 300
    """Seconds that processes wait for each other at start-up."""
    heartbeat_timeout: Seconds = 100
    """Seconds without a heartbeat after which a process counts as dead and all others exit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("processes", "process_id"):
            value = getattr(self, key)
            together = (value is None) == (self.coordinator is None)
            check(together, self.key(key), value, "is required with distributed.coordinator, and only with it")
        if self.processes is not None and self.process_id is not None:
            inside = 0 <= self.process_id < self.processes
            check(inside, "distributed.process_id", self.process_id, f"must be in 0..{self.processes - 1}")
