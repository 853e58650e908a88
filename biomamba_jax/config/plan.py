"""What is planned, and for which machine."""

from dataclasses import dataclass

from biomamba_jax.config.checks import check, check_at_least
from biomamba_jax.config.train import PretrainConfig


@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """A pretraining config, and the machine that it is to run on."""

    topology: str = "v5e-256"
    """The machine, as it is ordered: v5e-256, v6e-256 (chips), v4-128, v5p-128, v7x-128 (cores), h100-8 (GPUs)."""
    slices: int = 1
    """Slices (or groups of GPUs) of that size, joined by the data centre's network."""
    tokens: float | None = None
    """Training tokens of the whole run; left out: train.steps, or train.epochs of the shards at data.path."""
    search: bool = False
    """Try meshes and remat policies and rank them."""
    tries: int = 8
    """Programs compiled at most, in a search or for the nearest setting that fits."""
    json: bool = False
    """Print JSON instead of a table."""
    limit_seconds: float = 600
    """The compiler is given up after this long for one program."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(1, "", self, "slices", "tries", "tokens")
        check(self.limit_seconds > 0, "limit_seconds", self.limit_seconds, "must be above 0")
