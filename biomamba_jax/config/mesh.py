"""How devices share the work, and how the processes of several hosts find each other."""

from dataclasses import dataclass

from biomamba_jax.config.checks import check


@dataclass(frozen=True)
class MeshConfig:
    """How devices share the work: data x fsdp x tensor x sequence of them; one of the four may be -1 and takes what the
    others leave."""

    data: int = -1
    """Copies of the weights; each copy takes rows of its own. With several TPU slices a multiple of their number."""
    fsdp: int = 1
    """Devices that share one copy of weights and optimizer state, each with rows of its own: for memory."""
    tensor: int = 1
    """Devices that share each layer's channels and heads, and the vocabulary: for layers too wide for one device."""
    sequence: int = 1
    """Devices that share each row's tokens: for rows too long for one device."""

    def __post_init__(self) -> None:
        for key in ("data", "fsdp", "tensor", "sequence"):
            size = getattr(self, key)
            check(size >= 1 or size == -1, f"mesh.{key}", size, "must be at least 1, or -1 for what the others leave")
        check(self.sizes.count(-1) <= 1, "mesh", self.sizes, "at most one axis may be -1")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Of data, fsdp, tensor and sequence, in this order."""
        return self.data, self.fsdp, self.tensor, self.sequence


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of several hosts find each other.

    They do so by themselves on Cloud TPU, on GKE (GPU nodes: through xpk), under SLURM's srun and under mpirun of Open
    MPI up to version 4.
    """

    coordinator: str | None = None
    """host:port of the first process, the same for all; left out: found by itself where launched as one of several."""
    processes: int | None = None
    """With coordinator: how many processes there are."""
    process_id: int | None = None
    """With coordinator: which of them this is, from 0."""
    start_timeout: int = 300
    """Seconds that processes wait for each other at the start."""
    heartbeat_timeout: int = 100
    """Seconds without a sign of life after which a process counts as dead and all others end."""

    def __post_init__(self) -> None:
        alone = self.coordinator is None
        for key in ("processes", "process_id"):
            given = getattr(self, key) is not None
            check(
                given != alone, f"distributed.{key}", getattr(self, key), "goes together with distributed.coordinator"
            )
        if self.processes is not None and self.process_id is not None:
            inside = 0 <= self.process_id < self.processes
            check(inside, "distributed.process_id", self.process_id, f"must be in 0..{self.processes - 1}")
        for key in ("start_timeout", "heartbeat_timeout"):
            check(getattr(self, key) >= 1, f"distributed.{key}", getattr(self, key), "must be at least 1 second")
