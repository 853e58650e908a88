"""The schema of every YAML file, with its checks. `command_line.parse` reads it.

A setting's docstring is its `--help`.
"""

from dataclasses import dataclass, field
from typing import Literal

from biomamba_jax.errors import UserError

DType = Literal["float32", "bfloat16"]


def _check(condition: bool, key: str, value: object, remedy: str) -> None:
    if not condition:
        raise UserError(f"{key} = {value!r}: {remedy}")


@dataclass(frozen=True)
class ModelConfig:
    """A Mamba language model."""

    kind: Literal["mamba1", "mamba2"] = "mamba2"
    """Mixer of every layer: Mamba-1 (selective scan) or Mamba-2 (state-space duality)."""
    d_model: int = 768
    """Width of the residual stream."""
    n_layers: int = 24
    """Number of layers."""
    vocab_size: int | None = None
    """Number of token ids in use; taken from the shards' tokenizer when left out."""
    pad_vocab_multiple: int = 16
    """The embedding's rows are padded to a multiple of this; padded ids are never predicted."""
    d_state: int | None = None
    """State size per channel; left out: 16 for mamba1, 128 for mamba2, as published."""
    d_conv: int = 4
    """Width of the causal convolution."""
    expand: int = 2
    """d_inner = expand * d_model."""
    dt_rank: int | None = None
    """mamba1: rank of the projection to dt; left out: ceil(d_model / 16)."""
    headdim: int = 64
    """mamba2: channels of one head."""
    n_groups: int = 1
    """mamba2: groups of heads that share B and C."""
    chunk_size: int | None = None
    """mamba2: length of the SSD algorithm's chunks; left out: the platform's best. Results do not depend on it."""
    bias: bool = False
    """Biases on the input and output projections."""
    conv_bias: bool = True
    """Bias on the convolution."""
    tie_embeddings: bool = True
    """The output head is the transposed embedding."""
    norm_eps: float = 1e-5
    """Added to the mean square in every RMSNorm."""
    compute_dtype: DType | Literal["auto"] = "auto"
    """Type of activations and matrix products; auto: bfloat16 on TPU and GPU, float32 on CPU. Parameters: float32."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass recomputes of each layer: nothing, all but matrix products, or everything."""
    unroll: int = 1
    """Layers per step of the scan over layers; n_layers unrolls it fully: slower to compile, faster on CPU."""

    def __post_init__(self) -> None:
        for key in (
            "d_model",
            "n_layers",
            "pad_vocab_multiple",
            "d_conv",
            "expand",
            "headdim",
            "n_groups",
            "unroll",
        ):
            _check(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "must be at least 1")
        _check(self.d_conv >= 2, "model.d_conv", self.d_conv, "must be at least 2")
        if self.kind == "mamba2":
            _check(
                self.d_inner % self.headdim == 0,
                "model.headdim",
                self.headdim,
                f"must divide d_inner = {self.d_inner}",
            )
            _check(
                self.n_heads % self.n_groups == 0,
                "model.n_groups",
                self.n_groups,
                f"must divide {self.n_heads} heads",
            )

    @property
    def d_inner(self) -> int:
        """E, the width inside the mixer."""
        return self.expand * self.d_model

    @property
    def state_size(self) -> int:
        """N, d_state or its published default."""
        return self.d_state or {"mamba1": 16, "mamba2": 128}[self.kind]

    @property
    def rank(self) -> int:
        """R, dt_rank or its published default."""
        return self.dt_rank or -(-self.d_model // 16)

    @property
    def n_heads(self) -> int:
        """H, heads of Mamba-2."""
        return self.d_inner // self.headdim

    @property
    def conv_channels(self) -> int:
        """C, channels of the convolution: x alone in Mamba-1, x, B and C in Mamba-2."""
        return self.d_inner + (2 * self.n_groups * self.state_size if self.kind == "mamba2" else 0)

    @property
    def known_vocab(self) -> int:
        """`vocab_size`, which must have been given or resolved by now."""
        if self.vocab_size is None:
            raise UserError("model.vocab_size is not set: give it, or give shards whose tokenizer tells it")
        return self.vocab_size

    @property
    def padded_vocab(self) -> int:
        """V, rows of the embedding."""
        return -(-self.known_vocab // self.pad_vocab_multiple) * self.pad_vocab_multiple


@dataclass(frozen=True)
class DataConfig:
    """Tokenized shards and how they become batches."""

    path: str = "data/pubmed"
    """Folder of shards, as `python -m biomamba_jax.prepare` writes it."""
    sequence_length: int = 1024
    """Tokens of one row."""
    batch_size: int = 8
    """Rows of one optimizer step, over all devices and hosts."""
    num_workers: int = 2
    """Worker processes of each host that read and pack rows ahead; 0 does it in the training process."""

    def __post_init__(self) -> None:
        for key in ("sequence_length", "batch_size"):
            _check(getattr(self, key) >= 1, f"data.{key}", getattr(self, key), "must be at least 1")
        _check(self.num_workers >= 0, "data.num_workers", self.num_workers, "must be 0 or more")


@dataclass(frozen=True)
class PrepareConfig:
    """Text to tokenized shards."""

    input: list[str] = field(default_factory=list)
    """NLM PubmedArticleSet files (.xml, .xml.gz), JSON lines (.jsonl, .jsonl.gz), text (.txt), or nlm-sample."""
    output: str = ""
    """Folder to write; must not exist yet."""
    tokenizer: str | None = None
    """A SentencePiece .model, a Hugging Face tokenizer.json, or the name gpt-neox."""
    train_tokenizer: int | None = None
    """Train a SentencePiece model with this many pieces on the text instead."""
    validation_fraction: float = 0.01
    """Share of documents, by hash of the PMID, that is held out for validation."""
    test_fraction: float = 0.01
    """Share of documents, by hash of the PMID, that is held out for the final test."""
    min_abstract_characters: int = 50
    """Records with a shorter abstract are dropped."""
    keep_retracted: bool = False
    """Keep records whose publication type is Retracted Publication."""
    workers: int = 0
    """Processes that read files; 0: one per core."""
    seed: int = 0
    """Seed of the sample that the tokenizer is trained on."""

    def __post_init__(self) -> None:
        held_out = self.validation_fraction + self.test_fraction
        _check(
            self.validation_fraction >= 0,
            "prepare.validation_fraction",
            self.validation_fraction,
            "must be 0 or more",
        )
        _check(self.test_fraction >= 0, "prepare.test_fraction", self.test_fraction, "must be 0 or more")
        _check(
            held_out < 1,
            "prepare.validation_fraction + test_fraction",
            held_out,
            "must leave text to train on",
        )


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
        _check(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, "must be above 0")
        for key in ("beta1", "beta2", "ema"):
            _check(0 <= getattr(self, key) < 1, f"optimizer.{key}", getattr(self, key), "must be in [0, 1)")
        _check(0 < self.layer_decay <= 1, "optimizer.layer_decay", self.layer_decay, "must be in (0, 1]")


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
    """Last learning rate relative to the peak."""

    def __post_init__(self) -> None:
        _check(
            0 <= self.warmup_fraction <= 1,
            "schedule.warmup_fraction",
            self.warmup_fraction,
            "must be in [0, 1]",
        )
        together = self.warmup_fraction + self.stable_fraction
        _check(
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
        _check(0 <= self.label_smoothing < 1, "loss.label_smoothing", self.label_smoothing, "must be in [0, 1)")
        _check(self.z_loss >= 0, "loss.z_loss", self.z_loss, "must be 0 or more")


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
    max_skipped_steps: int = 10
    """Consecutive updates skipped for a non-finite gradient after which the run stops."""

    def __post_init__(self) -> None:
        _check(self.steps is None or self.steps >= 1, "train.steps", self.steps, "must be at least 1")
        _check(self.epochs > 0, "train.epochs", self.epochs, "must be above 0")
        for key in ("accumulation", "log_every", "max_skipped_steps"):
            _check(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "must be at least 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run."""

    every: int = 500
    """Steps between checkpoints; the last step always saves one."""
    keep_last: int = 2
    """How many of the newest are kept."""
    keep_every: int | None = None
    """Keep every checkpoint whose step is a multiple of this as well."""

    def __post_init__(self) -> None:
        _check(self.every >= 1, "checkpoint.every", self.every, "must be at least 1")
        _check(self.keep_last >= 1, "checkpoint.keep_last", self.keep_last, "must be at least 1")


@dataclass(frozen=True)
class PretrainConfig:
    """One pretraining run."""

    run_dir: str = "runs/pretrain"
    """Folder of the run. When it holds a checkpoint, the run goes on from there."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model. With init_from its sizes are those of the weights."""
    init_from: str | None = None
    """Weights to start from: a folder of any dialect that `convert` reads, or a hub name (needs the [hub] extra)."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training text."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    """How to make the shards when data.path does not exist yet (output is data.path; no input: they must exist)."""
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
    tensorboard: bool = True
    """Write TensorBoard events."""
    wandb_project: str | None = None
    """Mirror metrics to this Weights & Biases project (needs the [wandb] extra)."""

    def __post_init__(self) -> None:
        _check(
            self.data.batch_size % self.train.accumulation == 0,
            "train.accumulation",
            self.train.accumulation,
            f"must divide data.batch_size = {self.data.batch_size}",
        )
