"""Settings of `embed` and of its subcommands."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from biomamba_jax.config import checks
from biomamba_jax.config.checks import Settings, check
from biomamba_jax.config.data import RowsConfig
from biomamba_jax.config.model import InferenceDType
from biomamba_jax.config.prepare import TextFields
from biomamba_jax.config.train import OptimizerConfig, RunConfig, TrainConfig

Pooling = Literal["mean", "last", "weighted"]
Format = Literal["parquet", "npy", "jsonl"]
Paths = Annotated[checks.Files, checks.Limit("a list of at least one file or folder", bool)]


@dataclass(frozen=True, kw_only=True)
class EmbeddingConfig(Settings):
    """Settings by which a text becomes a vector."""

    pooling: Pooling = "mean"
    """Mean of the hidden states after a text's tokens, the state after the last one, or the mean weighted by position
    (1, 2, 3, ...), in which states that have seen more count more."""
    chunk: checks.PositiveInt = 1024
    """Tokens of a row, which holds several short texts; a longer one carries the state from row to row. It changes only
    speed and memory."""
    batch_size: checks.PositiveInt = 8
    """Rows computed at a time; only speed and memory depend on it."""
    dtype: InferenceDType | None = None
    """Compute dtype, or int8 matrices; default: bfloat16 on TPU and GPU, float32 on CPU."""


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(EmbeddingConfig, TextFields, section=""):
    """The texts to embed, the model, and the form of the embeddings."""

    basic: ClassVar[str] = "model input output format pooling normalize precision index split text title id"

    model: str
    """Folder of the model, also gs://bucket/folder, or its name on the Hugging Face hub, owner/name or
    owner/name@revision."""
    input: Paths = field(default_factory=list)
    """Folders of shards, or files that `prepare` reads: PubMed's XML, JSON lines, tables, Parquet, text."""
    output: checks.LocalFolder
    """Folder to write. An interrupted run continues from the parts that it had finished."""
    split: str = "train"
    """Split of shards; files have none."""
    format: Format = "parquet"
    """Parts as Parquet (needs the [parquet] extra), as .npy with .jsonl of ids, or as JSON lines."""
    precision: Literal["float32", "float16"] = "float32"
    """Type in which embeddings are stored."""
    normalize: bool = False
    """Divide each embedding by its Euclidean norm."""
    part_size: checks.PositiveInt = 8192
    """Texts of a part."""
    index: Literal["none", "exact", "hnsw"] = "none"
    """Also build an index for `embed search`, exact or approximate (HNSW, for millions of texts), by cosine similarity;
    needs the [search] extra."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(Settings):
    """A search over an index that `embed` built."""

    query: str
    """The text to search for."""
    index: str
    """Folder that `embed --index` wrote."""
    k: checks.PositiveInt = 10
    """Number of results."""
    model: str | None = None
    """Folder of the model if it is not where it was when the texts were embedded."""


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(EmbeddingConfig, TextFields, section=""):
    """A comparison of models in finding the rest of a text by its first line, such as an abstract by its title."""

    models: dict[str, str] = field(default_factory=dict)
    """Name and folder of each model. hf:FOLDER is an encoder that transformers runs (the [hf] extra)."""
    input: Paths = field(default_factory=list)
    """Folders of shards, or files that `prepare` reads; --title QUERY --text DOCUMENT name the keys of JSON lines."""
    split: str = "test"
    """Split of shards; files have none."""
    max_documents: checks.PositiveInt | None = None
    """Use a sample of this many texts, always the same one; default: all."""
    lexical: bool = False
    """Also measure BM25 (needs the [search] extra)."""
    output: str | None = None
    """JSON file to write the measures to."""
    resamples: checks.PositiveInt = 2000
    """Bootstrap resamples for each interval."""
    confidence: checks.InnerFraction = 0.95
    """Confidence level of the intervals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.models or self.lexical, "models", self.models, "name a model: --models.NAME FOLDER")


@dataclass(frozen=True)
class PairsConfig(RowsConfig, TextFields):
    """Pairs of texts, and the shape of batches."""

    input: list[str] = field(default_factory=list)
    """Folders of shards, or files that `prepare` reads: the first line of a text, such as a title, is the query,
    the rest its document. --data.title QUERY --data.text DOCUMENT name the keys of JSON lines."""
    split: str = "train"
    """Split of shards; files have none."""
    max_pairs: checks.PositiveInt | None = None
    """Use a sample of this many pairs, always the same one; default: all."""
    development_fraction: checks.InnerFraction = 0.05
    """Fraction of the pairs, chosen by a hash of the query, for the held-out loss."""
    hard_negatives: checks.NonNegativeInt = 1
    """Documents of each pair that BM25 finds for its query and that are not its own (needs the [search] extra)."""


@dataclass(frozen=True)
class ContrastiveConfig(RunConfig):
    """A contrastive training run on pairs of a query and its document."""

    basic: ClassVar[str] = (
        "run_dir init_from data.input data.title data.text data.batch_size data.sequence_length "
        "data.hard_negatives pooling temperature optimizer.learning_rate train.epochs"
    )

    run_dir: checks.LocalFolder = "runs/embed"
    """Folder of the run. If it has a checkpoint, the run resumes from it."""
    data: PairsConfig = field(default_factory=PairsConfig)
    """Pairs, and the shape of batches. A query's negatives are the other documents of its batch."""
    pooling: Pooling = "mean"
    """As in `embed`, which must be told the same."""
    temperature: checks.PositiveFloat = 0.05
    """Divides the cosine similarities."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=2e-4))
    """Optimizer."""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(eval_every=100))
    """Length of the run, and how often it logs and evaluates."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.init_from, "init_from", self.init_from, "give the weights to start from")
        check(self.data.input, "data.input", self.data.input, "give shards or files to train on")
