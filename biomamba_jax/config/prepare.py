"""What `prepare`'s other commands do: download, inspect, compare tokenizers."""

from dataclasses import dataclass, field
from typing import Literal

from biomamba_jax.config.checks import check, check_at_least
from biomamba_jax.config.data import MixtureConfig


@dataclass(frozen=True)
class DownloadConfig:
    """NLM's files onto this machine."""

    output: str = "data/nlm"
    """Folder to download into; what is there whole is not fetched again."""
    part: Literal["baseline", "updates", "all"] = "all"
    """The yearly baseline, the daily updates since, or both."""
    numbers: str | None = None
    """Files by number, such as 1-20,1335; left out: all of the part."""
    mirror: str = "https://ftp.ncbi.nlm.nih.gov/pubmed"
    """URL of a folder that holds baseline/ and updatefiles/, with listings and .md5 files."""
    connections: int = 4
    """Files that are fetched at a time."""
    tries: int = 5
    """How often a file is fetched before it is given up."""
    timeout: float = 60.0
    """Seconds without a byte after which a connection is given up."""

    def __post_init__(self) -> None:
        check_at_least(1, "download", self, "connections", "tries")
        check(self.timeout > 0, "download.timeout", self.timeout, "must be above 0")


@dataclass(frozen=True)
class InspectConfig:
    """What a folder of shards holds."""

    path: str = ""
    """Folder of shards, as `python -m biomamba_jax.prepare` writes it."""
    split: str = "train"
    """The split that is looked into."""
    samples: int = 3
    """Documents that are shown."""
    input: list[str] = field(default_factory=list)
    """NLM files that the shards were made from, to show the same documents before."""
    checked: int = 100_000
    """Documents that are searched for markup and entities that were left."""
    sequence_length: int = 1024
    """Row length for the estimate of packing and the mixture's preview."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """A mixture to preview, as in data.mixture of a pretraining config."""
    preview_tokens: int = 10_000_000
    """Tokens of that preview."""
    seed: int = 0
    """Of the choice of samples and of the mixture's order."""
    report: str | None = None
    """An HTML file to write the same into, with plots."""

    def __post_init__(self) -> None:
        check_at_least(1, "inspect", self, "checked", "sequence_length", "preview_tokens")


@dataclass(frozen=True)
class TokenizersConfig:
    """Tokenizers on the same text."""

    tokenizers: list[str] = field(default_factory=list)
    """SentencePiece .model or Hugging Face tokenizer.json files, folders of shards, or the name gpt-neox."""
    input: list[str] = field(default_factory=list)
    """Text to measure on, of the kinds that prepare reads."""
    terms: str | None = None
    """A file of terms, one a line; left out: a list of 104 common biomedical ones."""
    max_bytes: int = 10_000_000
    """Text that is read, the same amount of each input."""

    def __post_init__(self) -> None:
        check_at_least(1, "tokenizers", self, "max_bytes")
