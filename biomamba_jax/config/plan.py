"""Settings of `plan`."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from biomamba_jax.config.checks import Duration, Limit, PositiveInt
from biomamba_jax.config.train import PretrainConfig


@dataclass(frozen=True)
class PlanConfig(PretrainConfig):
    """A pretraining config and the machine that it is planned for."""

    basic: ClassVar[str] = (
        "topology slices tokens search vary auto_remat json model.kind model.d_model model.n_layers model.remat "
        "data.batch_size data.sequence_length mesh.data mesh.fsdp mesh.tensor"
    )

    topology: str = "v5e-256"
    """The machine by its product name: v5e-256, v6e-256 (chips), v4-128, v5p-128, v7x-128 (cores), h100-8 (GPUs)."""
    slices: PositiveInt = 1
    """Slices (or GPU nodes) of that size, connected by the data centre's network."""
    tokens: Annotated[float, Limit("at least 1", lambda x: x >= 1)] | None = None
    """Training tokens of the whole run; default: train.steps, or train.epochs of the shards at data.path."""
    auto_remat: bool = False
    """Instead of model.remat take the policy that recomputes least among those that fit the device's memory."""
    search: bool = False
    """Rank meshes, remat policies, accumulation and offloaded collectives by estimated speed."""
    vary: list[Literal["train.reduce_dtype", "data.batch_size"]] = field(default_factory=list)
    """Settings that change the results of training and that a search may change too; the table marks where it did:
    bfloat16 reduce-scatters, batches of up to 8 times the size."""
    tries: PositiveInt = 8
    """Maximum number of programs to compile, in a search or for the nearest settings that fit."""
    json: bool = False
    """Print JSON instead of a table."""
    limit_seconds: Duration = 600
    """Time limit for compiling one program, in seconds."""
