"""Settings of training, those that every run has, and those of a pretraining run."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from biomamba_jax.config import checks
from biomamba_jax.config.checks import Settings, check
from biomamba_jax.config.data import DataConfig, RowsConfig
from biomamba_jax.config.evaluate import TrainingEvaluationConfig
from biomamba_jax.config.mesh import DistributedConfig, MeshConfig
from biomamba_jax.config.model import DType, ModelConfig
from biomamba_jax.config.prepare import PrepareConfig


@dataclass(frozen=True)
class OptimizerConfig(Settings, section="optimizer"):
    """AdamW. Norms, biases, A_log, D and dt biases are never decayed."""

    learning_rate: checks.PositiveFloat = 1e-3
    """Peak learning rate."""
    beta1: checks.FractionBelowOne = 0.9
    """Decay of the first moment."""
    beta2: checks.FractionBelowOne = 0.95
    """Decay of the second moment."""
    epsilon: checks.PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: checks.NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices."""
    clip: checks.NonNegativeFloat = 1.0
    """Global norm that the gradient is clipped to; 0: no clipping."""
    layer_decay: checks.PositiveFraction = 1.0
    """Learning rate of each layer relative to the layer above it; 1: the same for all layers."""
    embedding_rate: Literal["bottom", "full"] = "bottom"
    """With layer_decay: the embedding counts as the lowest layer, or has the full rate (as published for BioMamba)."""
    ema: checks.FractionBelowOne = 0.0
    """Decay of the exponential moving average of the weights, which is then evaluated and exported; 0: no average."""


@dataclass(frozen=True)
class ScheduleConfig(Settings, section="schedule"):
    """Learning rate schedule: linear warm-up, then decay."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Schedule after the warm-up; wsd: stable, then cosine decay."""
    warmup_fraction: checks.Fraction = 0.1
    """Fraction of the run that is warm-up."""
    stable_fraction: checks.Fraction = 0.65
    """wsd: fraction of the run at the peak rate."""
    final_fraction: checks.Fraction = 0.1
    """Learning rate at the end of the run relative to the peak."""

    def __post_init__(self) -> None:
        super().__post_init__()
        total, fits = self.warmup_fraction + self.stable_fraction, self.kind != "wsd"
        check(fits or total <= 1, "schedule.warmup_fraction + stable_fraction", total, "must be at most 1")


@dataclass(frozen=True)
class LossConfig(Settings, section="loss"):
    """Cross-entropy of the next token."""

    label_smoothing: checks.FractionBelowOne = 0.0
    """Probability mass distributed uniformly over the vocabulary."""
    z_loss: checks.NonNegativeFloat = 0.0
    """Weight of the squared log-partition, which keeps logits from drifting."""
    chunk_size: checks.PositiveInt | None = None
    """Tokens whose logits XLA's form materialises at a time; default: the fastest for the platform."""


_StepRange = Annotated[
    list[int],
    checks.Limit("a first and a last step, such as [10, 12]", lambda x: not x or (len(x) == 2 and 1 <= x[0] <= x[1])),
]


@dataclass(frozen=True)
class TrainConfig(Settings, section="train"):
    """Length of a run, and how often it logs and evaluates."""

    steps: checks.PositiveInt | None = None
    """Optimizer steps; default: determined by epochs."""
    epochs: checks.PositiveFloat = 1.0
    """Passes over the training text, counted in tokens, unless steps is given."""
    accumulation: checks.PositiveInt = 1
    """Microbatches that a batch is split into; gradients are weighted by tokens."""
    reduce_dtype: DType = "float32"
    """Dtype in which gradients of matrices are summed over devices; bfloat16 halves what is sent, and its sums are
    rounded. They are accumulated in float32."""
    offload_collectives: bool = False
    """Run all-gathers and reduce-scatters on the SparseCores of v5p, v6e and TPU7x, beside the products."""
    seed: checks.Seed = 0
    """Seed of the initial weights and of the order of documents."""
    log_every: checks.PositiveInt = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: checks.NonNegativeInt = 500
    """Steps between evaluations on held-out text; 0: only before and after training."""
    eval_batches: checks.PositiveInt | None = None
    """Held-out batches of each evaluation, always the same ones; default: the whole validation split."""
    patience: checks.PositiveInt | None = None
    """Consecutive evaluations without a lower held-out loss after which the run stops early; default: never."""
    max_skipped_steps: checks.PositiveInt = 10
    """Consecutive updates skipped for a non-finite gradient after which the run stops."""
    profile_steps: _StepRange = field(default_factory=list)
    """First and last step to trace with JAX's profiler into profile/ of the run directory; default: none."""
    compiler_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    """Options of XLA for the training step by name, as {xla_dump_to: FOLDER}; they win over offload_collectives."""


@dataclass(frozen=True)
class CheckpointConfig(Settings, section="checkpoint"):
    """Checkpoints of a run."""

    every: checks.PositiveInt = 500
    """Steps between checkpoints; the final step is always saved."""
    keep_last: checks.PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every: checks.PositiveInt | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    keep_best: bool = False
    """Also save and keep the weights with the lowest held-out loss, which are then exported."""
    verify: bool = True
    """Compare all files of a checkpoint with SHA256SUMS before it is read; false: leave that to `sha256sum --check`."""


@dataclass(frozen=True)
class RunConfig(Settings):
    """Settings of every run, whatever it trains on."""

    run_dir: checks.LocalFolder = "runs/run"
    """Folder of the run. If it has a checkpoint, the run resumes from it."""
    resume_from: checks.NonNegativeInt | None = None
    """Step of an earlier checkpoint to go back to, once; later ones are moved to run_dir/replaced_after_STEP."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model. With init_from, its sizes are those of the weights."""
    init_from: str | None = None
    """Weights to start from: a folder of any format that `convert` reads, also gs://bucket/folder (needs the [gcs]
    extra), or a name on the Hugging Face hub, owner/name ([hub] extra); for `finetune --head` also hf:FOLDER, an
    encoder that transformers runs ([hf] extra)."""
    data: RowsConfig = field(default_factory=RowsConfig)
    """Batches."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """Learning rate schedule."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length of the run, and how often it logs and evaluates."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Sharding of the work over devices."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    """Addresses by which the processes of several hosts find each other."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb_project: str | None = None
    """Mirror metrics to this Weights & Biases project (needs the [wandb] extra)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, parts = self.data.batch_size, self.train.accumulation
        check(rows % parts == 0, "train.accumulation", parts, f"must divide data.batch_size = {rows}")


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """One pretraining run."""

    basic: ClassVar[str] = (
        "run_dir init_from model.kind model.d_model model.n_layers data.path data.batch_size "
        "data.sequence_length prepare.input prepare.tokenizer optimizer.learning_rate train.steps "
        "train.epochs train.eval_every checkpoint.every mesh.fsdp"
    )

    run_dir: checks.LocalFolder = "runs/pretrain"
    """Folder of the run. If it has a checkpoint, the run resumes from it."""
    new_tokenizer: bool = False
    """Take the shards' tokenizer where init_from has another: rows of the embedding whose tokens it also has keep their
    values, by spelling; the others are drawn anew."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training text."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """Preparation of the shards if data.path does not exist (output is data.path; without input, they must exist)."""
    evaluate: TrainingEvaluationConfig = field(default_factory=TrainingEvaluationConfig)
    """Tasks to evaluate the model on while it is trained."""
