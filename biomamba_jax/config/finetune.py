"""Settings of a fine-tuning run."""

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Annotated, ClassVar, Literal

from biomamba_jax.config import checks
from biomamba_jax.config.checks import Settings, check
from biomamba_jax.config.data import RowsConfig
from biomamba_jax.config.evaluate import BioASQConfig, PubMedQAConfig
from biomamba_jax.config.heads import HeadConfig, HeadKind, Reading
from biomamba_jax.config.train import CheckpointConfig, RunConfig, TrainConfig

FOLDS = 10
_OF_EVALUATE = ("method", "normalize", "thresholds", "max_questions")
"""Settings of questions that training does not read."""


@dataclass(frozen=True)
class ExamplesConfig(RowsConfig):
    """Examples or annotated texts, and the shape of batches."""

    format: Literal["examples", "conll", "pubtator", "bioc", "marked", "spans", "tsv", "squad"] = "examples"
    """Format of the files: JSON lines of prompts and answers, or annotated texts for a head; see
    docs/text_mining.md."""
    files: checks.Files = field(default_factory=list)
    """Files of the training split."""
    development: checks.Files = field(default_factory=list)
    """Files of the development split, for early stopping; default: a fraction of `files`."""
    test: checks.Files = field(default_factory=list)
    """Files of the test split, predicted at the end."""
    prompt: str = "{prompt}"
    """Template of the prompt; {name} stands for that key of the line."""
    answer: str = "{answer}"
    """Template of the answer that follows the prompt, with its leading space; EOS is appended."""
    types: list[str] = field(default_factory=list)
    """Types of entities to read, such as Chemical; default: all."""
    relation: str = ""
    """pubtator, bioc: type of the relation to learn, such as CID; every pair of concepts is an example."""
    pair: list[str] = field(default_factory=lambda: ["Chemical", "Disease"])
    """With relation: types of its first and of its second concept."""
    negative: str = ""
    """Class that stands for no relation, which F1 leaves out."""
    separator: str = "|"
    """tsv: what separates the labels of a text."""
    no_label: str = "empty"
    """tsv: word that stands for no label at all."""
    development_fraction: checks.InnerFraction = 0.1
    """Fraction of the examples, chosen by a hash of each, for development if no development split is given."""


@dataclass(frozen=True)
class LoraConfig(Settings, section="lora"):
    """LoRA adapters (Hu et al. 2021); only the adapters are trained and saved."""

    rank: checks.NonNegativeInt = 0
    """Rank of the adapters; 0: train the whole model."""
    alpha: checks.PositiveFloat = 16.0
    """Adapters are scaled by alpha / rank."""
    dropout: checks.FractionBelowOne = 0.0
    """Dropout rate of the input channels of each adapter."""
    targets: Annotated[list[str], checks.Limit("a list of at least one name", bool)] = field(
        default_factory=lambda: ["in_proj", "out_proj"]
    )
    """Matrices with an adapter, as regular expressions that match parameter paths or released names: in_proj, out_proj,
    in Mamba-1 also x_proj and dt_proj; embedding and lm_head are possible too."""

    @property
    def scale(self) -> float:
        """Factor of the product A B of an adapter."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """One fine-tuning run on data.files, pubmedqa.path and bioasq.path, as far as they are given."""

    basic: ClassVar[str] = (
        "run_dir init_from data.files data.prompt data.answer data.batch_size pubmedqa.path cross_validate "
        "bioasq.path head lora.rank optimizer.learning_rate train.epochs"
    )

    run_dir: checks.LocalFolder = "runs/finetune"
    """Folder of the run. If it has a checkpoint, the run resumes from it."""
    data: ExamplesConfig = field(default_factory=ExamplesConfig)
    """JSON lines of examples, and the shape of batches."""
    pubmedqa: PubMedQAConfig = field(default_factory=PubMedQAConfig)
    """PubMedQA, with the same prompt and answers as in `evaluate`."""
    fold: Annotated[int, checks.Limit(f"in 0..{FOLDS - 1}", lambda x: 0 <= x < FOLDS)] = 0
    """PubMedQA: index of the development split among the authors' ten folds; the other nine are trained on."""
    cross_validate: bool = False
    """PubMedQA: one run for each of the ten folds, in run_dir/fold-0 and so on, and a table of all."""
    bioasq: BioASQConfig = field(default_factory=BioASQConfig)
    """BioASQ task B, with the same prompts as in `evaluate`; its development files are for early stopping."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters instead of the whole model."""
    head: Literal["language_model"] | HeadKind = "language_model"
    """The language model's head, or a linear layer on hidden states: classifier (one class a text), multi_label,
    regression, token_classifier (entities), span (the answer in a text)."""
    reading: Reading = "once"
    """Reading of a head's text: once from left to right, twice (echo), or bidirectional, with a second backbone."""
    labels: list[str] = field(default_factory=list)
    """Names of the classes, labels or tags of a head; default: those that occur."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=10, log_every=1, eval_every=10, patience=5))
    """Length of the run, and how often it logs and evaluates."""
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=50, keep_best=True))
    """Checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = bool(self.data.files or self.pubmedqa.path or self.bioasq.path)
        check(given, "data.files", self.data.files, "give data.files, pubmedqa.path or bioasq.path to train on")
        alone = bool(self.pubmedqa.path) and not (self.data.files or self.bioasq.path)
        check(not self.cross_validate or alone, "cross_validate", True, "needs pubmedqa.path and no other data")
        plain = self.head == "language_model"
        check(not self.labels or not plain, "labels", self.labels, "need a head with labels, such as classifier")
        check(self.data.format == "examples" or not plain, "data.format", self.data.format, "needs a head")
        check(self.reading == "once" or not plain, "reading", self.reading, "needs a head such as classifier")
        softmax = plain or self.head in ("classifier", "token_classifier")
        extra = self.loss.label_smoothing or self.loss.z_loss
        check(softmax or not extra, "loss.label_smoothing, loss.z_loss", extra, f"must be 0 for head {self.head}")
        for section, asked in (("pubmedqa", self.pubmedqa), ("bioasq", self.bioasq)):
            for key in _OF_EVALUATE:
                value, default = (getattr(each, key, None) for each in (asked, type(asked)()))
                check(value == default, f"{section}.{key}", value, "counts in `evaluate`, not here; leave it out")
        used = {
            "data.types": self.data.format != "examples",
            "data.relation": self.data.format in ("pubtator", "bioc", "spans"),
            "data.negative": self.head in ("classifier", "multi_label"),
        }
        for key, counts in used.items():
            value = attrgetter(key)(self)
            check(
                not value or counts, key, value, f"has no effect with data.format {self.data.format}, head {self.head}"
            )
        check(bool(self.init_from), "init_from", self.init_from, "give the weights to start from")
        check(self.checkpoint.keep_best, "checkpoint.keep_best", False, "must be true: the best weights are the result")

    @property
    def head_config(self) -> HeadConfig | None:
        """The head with its labels; None for the language model's."""
        return None if self.head == "language_model" else HeadConfig(self.head, tuple(self.labels), self.reading)
