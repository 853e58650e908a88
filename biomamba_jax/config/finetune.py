"""A fine-tuning run: what is answered, and what of the model is trained."""

from dataclasses import dataclass, field
from typing import Literal

from biomamba_jax.config.checks import check, check_at_least
from biomamba_jax.config.data import RowsConfig
from biomamba_jax.config.evaluate import BioASQConfig, PubMedQAConfig
from biomamba_jax.config.train import CheckpointConfig, RunConfig, TrainConfig

FOLDS = 10


@dataclass(frozen=True)
class ExamplesConfig(RowsConfig):
    """Examples of a prompt and its answer, and how they become batches."""

    files: list[str] = field(default_factory=list)
    """JSON lines (.jsonl, .jsonl.gz), one example a line."""
    development: list[str] = field(default_factory=list)
    """JSON lines to stop early by; none: a share of `files`."""
    test: list[str] = field(default_factory=list)
    """JSON lines to predict at the end."""
    prompt: str = "{prompt}"
    """What stands before the answer; {name} stands for that key of the line."""
    answer: str = "{answer}"
    """What the model learns to write behind the prompt, its leading space included; EOS follows."""
    development_fraction: float = 0.1
    """Share of the examples, by a hash of each, that is the development split where nothing else says what is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        inside = 0 < self.development_fraction < 1
        check(inside, "data.development_fraction", self.development_fraction, "must be between 0 and 1")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021); only they are trained and saved."""

    rank: int = 0
    """Rank of the adapters; 0 trains the whole model."""
    alpha: float = 16.0
    """An adapter counts alpha / rank times."""
    dropout: float = 0.0
    """Share of the input channels of each adapter that a step leaves out."""
    targets: list[str] = field(default_factory=lambda: ["in_proj", "out_proj"])
    """Matrices with an adapter: regular expressions, searched in parameter paths and in their released names. There are
    in_proj and out_proj, Mamba-1 also has x_proj and dt_proj; embedding and lm_head can be adapted too."""

    def __post_init__(self) -> None:
        check_at_least(0, "lora", self, "rank")
        check(self.alpha > 0, "lora.alpha", self.alpha, "must be above 0")
        check(0 <= self.dropout < 1, "lora.dropout", self.dropout, "must be in [0, 1)")
        check(bool(self.targets), "lora.targets", self.targets, "name at least one")

    @property
    def scale(self) -> float:
        """What A B is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """One fine-tuning run. Whatever of data.files, pubmedqa.path and bioasq.path is given is trained on."""

    run_dir: str = "runs/finetune"
    """Folder of the run. When it holds a checkpoint, the run goes on from there."""
    data: ExamplesConfig = field(default_factory=ExamplesConfig)
    """JSON lines of examples, and the shape of batches."""
    pubmedqa: PubMedQAConfig = field(default_factory=PubMedQAConfig)
    """PubMedQA, with the prompt and answers that `evaluate` asks with."""
    fold: int = 0
    """PubMedQA: which of its authors' ten folds is the development split; the other nine are trained on."""
    cross_validate: bool = False
    """PubMedQA: a run for each of the ten folds, in run_dir/fold-0 and so on, and a table of all."""
    bioasq: BioASQConfig = field(default_factory=BioASQConfig)
    """BioASQ task B, with the prompts that `evaluate` asks with. Its development files serve to stop early by."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters instead of the whole model."""
    head: Literal["language_model", "classifier"] = "language_model"
    """What answers: the language model itself, or a linear layer on the state after the prompt's last token."""
    labels: list[str] = field(default_factory=list)
    """classifier: the classes; left out: the answers that occur."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=10, log_every=1, eval_every=10, patience=5))
    """Length and rhythm."""
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=50, keep_best=True))
    """Checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.fold < FOLDS, "fold", self.fold, f"must be in 0..{FOLDS - 1}")
        given = bool(self.data.files or self.pubmedqa.path or self.bioasq.path)
        check(given, "data.files", self.data.files, "give data.files, pubmedqa.path or bioasq.path: nothing to learn")
        alone = bool(self.pubmedqa.path) and not (self.data.files or self.bioasq.path)
        check(not self.cross_validate or alone, "cross_validate", True, "needs pubmedqa.path, and nothing beside it")
        check(not self.labels or self.head == "classifier", "labels", self.labels, "are for head classifier only")
        check(bool(self.init_from), "init_from", self.init_from, "name the weights to start from")
        check(self.checkpoint.keep_best, "checkpoint.keep_best", False, "must be true: the best weights are the result")
