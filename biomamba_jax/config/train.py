"""How weights are trained, what every run has, and a whole pretraining run."""

from dataclasses import dataclass, field
from typing import Literal

from biomamba_jax.config.checks import check, check_at_least, check_folder
from biomamba_jax.config.data import DataConfig, RowsConfig
from biomamba_jax.config.mesh import DistributedConfig, MeshConfig
from biomamba_jax.config.model import ModelConfig
from biomamba_jax.config.prepare import PrepareConfig


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Norms, biases, A_log, D and dt biases are never decayed."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices."""
    clip: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    layer_decay: float = 1.0
    """Learning rate of each layer relative to the layer above it; 1 gives all layers the same."""
    embedding_rate: Literal["bottom", "full"] = "bottom"
    """With layer_decay: the embedding is the lowest layer, or keeps the full rate (as BioMamba was published)."""
    ema: float = 0.0
    """Decay of the moving average of the weights; when set, the average is what is evaluated. 0: none."""

    def __post_init__(self) -> None:
        check(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "must be above 0")
        for key in ("beta1", "beta2", "ema"):
            check(0 <= getattr(self, key) < 1, f"optimizer.{key}", getattr(self, key), "must be in [0, 1)")
        check(self.epsilon > 0, "optimizer.epsilon", self.epsilon, "must be above 0")
        check_at_least(0, "optimizer", self, "weight_decay", "clip")
        check(0 < self.layer_decay <= 1, "optimizer.layer_decay", self.layer_decay, "must be in (0, 1]")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run: linear warm-up, then a shape."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after the warm-up. wsd: warm-up, stable, then cosine decay."""
    warmup_fraction: float = 0.1
    """Share of the run that is warm-up."""
    stable_fraction: float = 0.65
    """wsd: share of the run at the peak rate."""
    final_fraction: float = 0.1
    """Learning rate at the end of the run relative to the peak."""

    def __post_init__(self) -> None:
        for key in ("warmup_fraction", "stable_fraction", "final_fraction"):
            check(0 <= getattr(self, key) <= 1, f"schedule.{key}", getattr(self, key), "must be in [0, 1]")
        together = self.warmup_fraction + self.stable_fraction
        check(
            self.kind != "wsd" or together <= 1,
            "schedule.warmup_fraction + stable_fraction",
            together,
            "must be at most 1",
        )


@dataclass(frozen=True)
class LossConfig:
    """Cross-entropy of the next token."""

    label_smoothing: float = 0.0
    """Probability mass spread evenly over the vocabulary."""
    z_loss: float = 0.0
    """Weight of the squared log-partition, which keeps logits from drifting."""
    chunk_size: int | None = None
    """Tokens whose logits exist at one time; left out: the platform's best."""

    def __post_init__(self) -> None:
        check(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "must be in [0, 1)")
        check_at_least(0, "loss", self, "z_loss")
        check_at_least(1, "loss", self, "chunk_size")


@dataclass(frozen=True)
class TrainConfig:
    """Length and rhythm of a run."""

    steps: int | None = None
    """Optimizer steps; left out, epochs decides."""
    epochs: float = 1.0
    """Passes over the training text, counted in tokens, where steps is left out."""
    accumulation: int = 1
    """Parts that a batch is computed in, one after the other; gradients are weighted by tokens."""
    seed: int = 0
    """Seed of initial weights and of the order of documents."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 500
    """Steps between evaluations on held-out text; 0: only before and after."""
    eval_batches: int | None = None
    """Held-out batches of each evaluation, the same ones every time; left out: all of the validation split."""
    patience: int | None = None
    """Evaluations in a row without a lower held-out loss after which the run ends early; left out: never."""
    max_skipped_steps: int = 10
    """Consecutive updates skipped for a non-finite gradient after which the run stops."""
    compiler_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Options of XLA for the training step by name, as {xla_dump_to: FOLDER}; docs/plans.md has two for TPUs."""

    def __post_init__(self) -> None:
        check(self.epochs > 0, "train.epochs", self.epochs, "must be above 0")
        positive = ("steps", "accumulation", "log_every", "eval_batches", "patience", "max_skipped_steps")
        check_at_least(1, "train", self, *positive)
        check_at_least(0, "train", self, "eval_every")
        check(0 <= self.seed < 2**32, "train.seed", self.seed, "must be in 0..2^32 - 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run."""

    every: int = 500
    """Steps between checkpoints; the last step always saves one."""
    keep_last: int = 2
    """How many of the newest are kept."""
    keep_every: int | None = None
    """Keep every checkpoint whose step is a multiple of this as well."""
    keep_best: bool = False
    """Save and keep the weights of the lowest held-out loss as well; they are then what is exported."""

    def __post_init__(self) -> None:
        check_at_least(1, "checkpoint", self, "every", "keep_last", "keep_every")


@dataclass(frozen=True)
class RunConfig:
    """What every run has, whatever it trains on."""

    run_dir: str = "runs/run"
    """Folder of the run. When it holds a checkpoint, the run goes on from there."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model. With init_from its sizes are those of the weights."""
    init_from: str | None = None
    """Weights to start from: a folder of any dialect that `convert` reads, or a hub name (needs the [hub] extra)."""
    data: RowsConfig = field(default_factory=RowsConfig)
    """Batches."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate over time."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and rhythm."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices share the work."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """How the processes of several hosts find each other."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb_project: str | None = None
    """Mirror metrics to this Weights & Biases project (needs the [wandb] extra)."""

    def __post_init__(self) -> None:
        check_folder("run_dir", self.run_dir)
        check(
            self.data.batch_size % self.train.accumulation == 0,
            "train.accumulation",
            self.train.accumulation,
            f"must divide data.batch_size = {self.data.batch_size}",
        )


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """One pretraining run."""

    run_dir: str = "runs/pretrain"
    """Folder of the run. When it holds a checkpoint, the run goes on from there."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training text."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """How to make the shards when data.path does not exist yet (output is data.path; no input: they must exist)."""
