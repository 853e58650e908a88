"""Shards, mixtures of them, and the shape of their batches."""

from dataclasses import dataclass, field
from typing import Literal

from biomamba_jax.config.checks import NonNegativeInt, PositiveFloat, PositiveInt, Settings, check


@dataclass(frozen=True)
class RowsConfig(Settings, section="data"):
    """The shape of a batch."""

    sequence_length: PositiveInt = 1024
    """Tokens of one row."""
    batch_size: PositiveInt = 8
    """Rows of one optimizer step, over all devices and hosts."""


@dataclass(frozen=True)
class SourceConfig(Settings, section="data.mixture.sources.NAME"):
    """A source of a mixture."""

    path: str
    """Folder of shards, made with the same tokenizer as those of data.path."""
    weight: PositiveFloat = 1.0
    """Weight relative to the other sources."""


MIXTURES = {"biomamba_v3": {"pubmed": 10.0, "c4": 1.0, "wikipedia": 1.0}}
"""Named weights, by document: BioMamba takes 10 % of PubMed's number of documents from C4 and from Wikipedia each."""


@dataclass(frozen=True)
class MixtureConfig:
    """A weighted mixture of several folders of shards, drawn by whole documents."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Path and weight of each source by its name; default: the training text is data.path alone."""
    unit: Literal["tokens", "documents"] = "tokens"
    """Unit of the weights."""
    preset: Literal["biomamba_v3"] | None = None
    """Use published weights instead: biomamba_v3 is pubmed, c4 and wikipedia at 83.3/8.3/8.3 % of the documents."""

    def __post_init__(self) -> None:
        if self.preset is not None:
            names, given = sorted(MIXTURES[self.preset]), sorted(self.sources)
            check(given == names, "data.mixture.sources", given, f"preset {self.preset} needs {names}")

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each source, by name."""
        if self.preset is not None:
            return {name: MIXTURES[self.preset][name] for name in self.sources}
        return {name: source.weight for name, source in self.sources.items()}

    @property
    def counts(self) -> Literal["tokens", "documents"]:
        """Unit of the weights; documents for published ones."""
        return self.unit if self.preset is None else "documents"


@dataclass(frozen=True)
class DataConfig(RowsConfig):
    """Tokenized shards and their batches."""

    path: str = "data/pubmed"
    """Folder of shards, as `python -m biomamba_jax.prepare` writes it: training text, held-out text and tokenizer. Of
    gs://bucket/folder (needs the [gcs] extra) each machine keeps a copy in its cache folder."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """Training text from several folders; held-out text and tokenizer are still those of path."""
    pad_rows: bool = False
    """Train as the first version of BioMamba's code does: a document a row, padded with EOS, padding in the loss."""
    num_workers: NonNegativeInt = 2
    """Worker processes of each host that read and pack rows ahead; 0: a thread of the training process."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(not (self.pad_rows and self.mixture.sources), "data.pad_rows", True, "needs data.path alone, no mixture")
