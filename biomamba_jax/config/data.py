"""Where text comes from and how it becomes batches."""

from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from biomamba_jax.config.checks import check, check_at_least, check_folder


@dataclass(frozen=True)
class RowsConfig:
    """The shape of a batch."""

    sequence_length: int = 1024
    """Tokens of one row."""
    batch_size: int = 8
    """Rows of one optimizer step, over all devices and hosts."""

    def __post_init__(self) -> None:
        check_at_least(1, "data", self, "sequence_length", "batch_size")


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture."""

    path: str
    """Folder of shards, made with the same tokenizer as those of data.path."""
    weight: float = 1.0
    """Its share, relative to the other sources' weights."""


MIXTURES = {"biomamba_v3": {"pubmed": 10.0, "c4": 1.0, "wikipedia": 1.0}}
"""Named weights, by document: BioMamba takes 10 % of PubMed's number of documents from C4 and from Wikipedia each."""


@dataclass(frozen=True)
class MixtureConfig:
    """Several folders of shards as one training text, whole documents drawn by weight."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Name of each source, and its path and weight; none: the training text is data.path alone."""
    unit: Literal["tokens", "documents"] = "tokens"
    """What the weights count."""
    preset: Literal["biomamba_v3"] | None = None
    """Published weights instead: biomamba_v3 is pubmed, c4 and wikipedia at 83.3/8.3/8.3 % of the documents."""

    def __post_init__(self) -> None:
        for name, source in self.sources.items():
            check(source.weight > 0, f"data.mixture.sources.{name}.weight", source.weight, "must be above 0")
        if self.preset is not None:
            names = sorted(MIXTURES[self.preset])
            check(
                sorted(self.sources) == names, "data.mixture.sources", sorted(self.sources), f"{self.preset} is {names}"
            )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each source, by name."""
        if self.preset is not None:
            return {name: MIXTURES[self.preset][name] for name in self.sources}
        return {name: source.weight for name, source in self.sources.items()}

    @property
    def counts(self) -> Literal["tokens", "documents"]:
        """What the weights count; the published ones count documents."""
        return self.unit if self.preset is None else "documents"


@dataclass(frozen=True)
class DataConfig(RowsConfig):
    """Tokenized shards and how they become batches."""

    path: str = "data/pubmed"
    """Folder of shards, as `python -m biomamba_jax.prepare` writes it: training text, held-out text and tokenizer."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """Training text of several folders; held-out text and tokenizer are still those of path."""
    num_workers: int = 2
    """Worker processes of each host that read and pack rows ahead; 0 does it in the training process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, "data", self, "num_workers")
        check_folder("data.path", self.path)


@dataclass(frozen=True)
class PrepareConfig:
    """Text to tokenized shards."""

    input: list[str] = field(default_factory=list)
    """NLM PubmedArticleSet files (.xml), JSON lines (.jsonl, .json), text (.txt), each also .gz, .bz2 or .zst, Parquet,
    Wikipedia's pages-articles dumps, folders of such files, nlm-sample or wiki-sample."""
    output: str = ""
    """Folder to write; must not exist yet. An interrupted run goes on from what it had finished."""
    tokenizer: str | None = None
    """A SentencePiece .model, a Hugging Face tokenizer.json, or the name gpt-neox."""
    train_tokenizer: int | None = None
    """Train a SentencePiece model with this many pieces on the text instead."""
    tokenizer_kind: Literal["unigram", "bpe"] = "unigram"
    """Kind of SentencePiece model. `convert --to hf` needs unigram, and the settings of bytes and digits as here."""
    tokenizer_sample_bytes: int = 10_000_000
    """Text that it is trained on, drawn from all of the training split; takes some 20 times as much memory."""
    tokenizer_byte_fallback: bool = True
    """Bytes stand in for rare characters, so that every text can be encoded."""
    tokenizer_split_digits: bool = True
    """Each digit is a piece of its own."""
    validation_fraction: float = 0.01
    """Share of documents, by hash of the PMID, that is held out for validation."""
    test_fraction: float = 0.01
    """Share of documents, by hash of the PMID, that is held out for the final test."""
    recent_from: str | None = None
    """A date, YYYY-MM-DD: records that became public on that day or later are a split of their own, named recent."""
    min_abstract_characters: int = 50
    """Records with a shorter abstract are dropped."""
    keep_retracted: bool = False
    """Keep records whose publication type is Retracted Publication."""
    languages: list[str] = field(default_factory=list)
    """Keep NLM's records in these languages only (codes such as eng); none: in all."""
    article_types: list[str] = field(default_factory=list)
    """Keep NLM's records with one of these publication types only, such as "Journal Article"; none: all."""
    exclude_article_types: list[str] = field(default_factory=list)
    """Drop NLM's records with one of these publication types."""
    first_year: int | None = None
    """Drop NLM's records of earlier years."""
    last_year: int | None = None
    """Drop NLM's records of later years."""
    require_pmcid: bool = False
    """Keep NLM's records that are in PubMed Central only."""
    near_duplicates: float | None = None
    """Drop documents whose Jaccard similarity to an earlier one, over runs of 5 words, is this or more: 0.8, say."""
    decontaminate: list[str] = field(default_factory=list)
    """Evaluation text to keep out: .json of PubMedQA or BioASQ (and their source articles, by PMID), .jsonl or .txt."""
    decontaminate_overlap: float = 0.25
    """Share of runs of 8 words, of the shorter text's, from which on a document counts as evaluation text."""
    workers: int = 0
    """Processes that read files; 0: one per core."""
    spools: str | None = None
    """Folder that keeps what was read of each file, so that a later run with more files reads those alone."""
    seed: int = 0
    """Seed of the sample that the tokenizer is trained on."""

    def __post_init__(self) -> None:
        check_folder("prepare.output", self.output)
        check_at_least(0, "prepare", self, "validation_fraction", "test_fraction", "workers")
        held_out = self.validation_fraction + self.test_fraction
        check(held_out < 1, "prepare.validation_fraction + test_fraction", held_out, "must leave text to train on")
        for key in ("near_duplicates", "decontaminate_overlap"):
            value = getattr(self, key)
            check(value is None or 0 < value <= 1, f"prepare.{key}", value, "must be above 0 and at most 1")
        check(self.tokenizer_sample_bytes > 0, "prepare.tokenizer_sample_bytes", self.tokenizer_sample_bytes, "too few")
        check(
            self.recent_from is None or _is_date(self.recent_from),
            "prepare.recent_from",
            self.recent_from,
            "must be a date such as 2024-01-31",
        )


def _is_date(text: str) -> bool:
    try:
        return len(text) == 10 and bool(date.fromisoformat(text))
    except ValueError:
        return False
