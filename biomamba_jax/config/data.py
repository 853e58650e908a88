"""Where text comes from and how it becomes batches."""

from dataclasses import dataclass, field

from biomamba_jax.config.checks import check


@dataclass(frozen=True)
class RowsConfig:
    """The shape of a batch."""

    sequence_length: int = 1024
    """Tokens of one row."""
    batch_size: int = 8
    """Rows of one optimizer step, over all devices and hosts."""

    def __post_init__(self) -> None:
        for key in ("sequence_length", "batch_size"):
            check(getattr(self, key) >= 1, f"data.{key}", getattr(self, key), "must be at least 1")


@dataclass(frozen=True)
class DataConfig(RowsConfig):
    """Tokenized shards and how they become batches."""

    path: str = "data/pubmed"
    """Folder of shards, as `python -m biomamba_jax.prepare` writes it."""
    num_workers: int = 2
    """Worker processes of each host that read and pack rows ahead; 0 does it in the training process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_workers >= 0, "data.num_workers", self.num_workers, "must be 0 or more")


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
        check(
            self.validation_fraction >= 0,
            "prepare.validation_fraction",
            self.validation_fraction,
            "must be 0 or more",
        )
        check(self.test_fraction >= 0, "prepare.test_fraction", self.test_fraction, "must be 0 or more")
        check(
            held_out < 1,
            "prepare.validation_fraction + test_fraction",
            held_out,
            "must leave text to train on",
        )
