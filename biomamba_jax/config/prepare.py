"""Settings of `prepare` and of its subcommands download, inspect and tokenizers."""

from dataclasses import dataclass, field
from datetime import date
from typing import Annotated, ClassVar, Literal

from biomamba_jax.config import checks
from biomamba_jax.config.checks import Settings, check
from biomamba_jax.config.data import MixtureConfig


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text  # weeks and 20240131 are of ISO 8601, too
    except ValueError:
        return False


@dataclass(frozen=True)
class PrepareFiles(Settings, section="prepare"):
    """The files that `prepare` reads and the folder that it writes."""

    input: list[str] = field(default_factory=list)
    """NLM PubmedArticleSet files (.xml), JSON lines (.jsonl, .json), tables (.csv, .tsv), text (.txt), each also .gz,
    .bz2 or .zst, Parquet, Wikipedia's pages-articles dumps, folders of such files, nlm-sample, wiki-sample, or
    hf:OWNER/NAME[@REVISION][:CONFIG], the train split of a dataset of the Hugging Face hub."""
    output: checks.LocalFolder = ""
    """Folder to write; must not exist yet. An interrupted run continues from what it had finished. Without it the input
    is only read, into --spools: several machines can each read a share of the files into one such folder."""
    tokenizer: str | None = None
    """A SentencePiece .model, a Hugging Face tokenizer.json, or the name gpt-neox."""


@dataclass(frozen=True)
class TextFields(Settings, section="prepare"):
    """Where JSON lines, CSV, TSV and Parquet hold the text; dots lead into nested objects, as in document.body."""

    text: str = "text"
    """Key or column of the text in JSON lines, CSV, TSV and Parquet: a string or a list of paragraphs; document.body is
    the key body inside document."""
    title: str | None = None
    """Key or column of a title, which becomes the text's first line."""
    id: str | None = None
    """Key or column of a document's id, which is stored with it: a PMID where the key is called pmid, else any text.
    Default: pmid where there is one."""


@dataclass(frozen=True)
class TokenizerTraining(Settings, section="prepare"):
    """Training of a SentencePiece tokenizer."""

    train_tokenizer: int | None = None
    """Train a SentencePiece model with this many pieces on the text instead."""
    tokenizer_kind: Literal["unigram", "bpe"] = "unigram"
    """Kind of SentencePiece model; unigram encodes 3.5 times faster than bpe at the same bytes per token."""
    tokenizer_sample_bytes: checks.Amount = 10_000_000
    """Bytes of text that it is trained on, sampled from the training split; takes some 20 times as much memory. More
    lowers the bytes per token by less than 1 % at 4,096 pieces; a large vocabulary needs more."""
    tokenizer_byte_fallback: bool = True
    """Encode rare characters as bytes, so that every text can be encoded."""
    tokenizer_split_digits: bool = True
    """Make each digit a piece of its own."""


@dataclass(frozen=True)
class FilterConfig:
    """Filters on single records; all but the minimum length apply to NLM's records only."""

    min_abstract_characters: int = 50
    """Drop records with a shorter abstract or text."""
    keep_retracted: bool = False
    """Keep records whose publication type is Retracted Publication."""
    languages: list[str] = field(default_factory=list)
    """Keep only NLM records in one of these languages (codes such as eng); default: all."""
    article_types: list[str] = field(default_factory=list)
    """Keep only NLM records with one of these publication types, such as "Journal Article"; default: all."""
    exclude_article_types: list[str] = field(default_factory=list)
    """Drop NLM records with one of these publication types."""
    first_year: int | None = None
    """Drop NLM records whose journal issue is of an earlier year, or of an unknown one."""
    last_year: int | None = None
    """Drop NLM records whose journal issue is of a later year, or of an unknown one."""
    require_pmcid: bool = False
    """Keep only NLM records that are in PubMed Central."""


@dataclass(frozen=True)
class PrepareConfig(FilterConfig, TextFields, TokenizerTraining, PrepareFiles):
    """Text to tokenized shards."""

    basic: ClassVar[str] = (
        "input output tokenizer train_tokenizer validation_fraction test_fraction recent_from "
        "near_duplicates decontaminate text title id workers spools"
    )

    validation_fraction: checks.NonNegativeFloat = 0.01
    """Fraction of documents, chosen by a hash of the PMID, that is held out for validation."""
    test_fraction: checks.NonNegativeFloat = 0.01
    """Fraction of documents, chosen by a hash of the PMID, that is held out for the final test."""
    recent_from: Annotated[str, checks.Limit("a date such as 2024-01-31", _is_date)] | None = None
    """A date, YYYY-MM-DD: records that became public on that day or later form a split of their own, named recent."""
    near_duplicates: checks.PositiveFraction | None = None
    """Drop documents whose Jaccard similarity to an earlier one, over runs of 5 words, is this or more, such as 0.8."""
    decontaminate: list[str] = field(default_factory=list)
    """Evaluation text to keep out: every string in JSON of any layout, JSON lines, CSV, TSV or Parquet, and the source
    articles that it names by PMID, or every line of a .txt."""
    decontaminate_overlap: checks.PositiveFraction = 0.25
    """Fraction of the shorter text's runs of 8 words at which a document counts as evaluation text."""
    max_unspelled: checks.Fraction = 0.1
    """Refuse a tokenizer whose ids do not spell their text in more than this fraction of the documents."""
    workers: checks.NonNegativeInt = 0
    """Worker processes; 0: one per core."""
    spools: str | None = None
    """Folder that keeps what was read of each file, so that a later run with more files reads only the new ones. Runs
    may share it at the same time."""
    seed: int = 0
    """Seed of the sample that the tokenizer is trained on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        held_out = self.validation_fraction + self.test_fraction
        check(held_out < 1, "prepare.validation_fraction + test_fraction", held_out, "must leave text to train on")


@dataclass(frozen=True)
class DownloadConfig(Settings):
    """Download of NLM's files."""

    output: checks.LocalFolder = "data/nlm"
    """Folder to download into; complete files are not fetched again."""
    part: Literal["baseline", "updates", "all"] = "all"
    """The yearly baseline, the daily updates since, or both."""
    numbers: str | None = None
    """Numbers of the files, such as 1-20,1335; default: all of the part."""
    mirror: str = "https://ftp.ncbi.nlm.nih.gov/pubmed"
    """URL of a folder that holds baseline/ and updatefiles/, with listings and .md5 files."""
    connections: checks.PositiveInt = 4
    """Number of files that are fetched at a time."""
    tries: checks.PositiveInt = 5
    """Tries for each file."""
    timeout: checks.Duration = 60.0
    """Seconds without a byte, below 1,000 bytes/s or before the headers end, after which a connection is closed."""


@dataclass(frozen=True)
class InspectConfig(Settings):
    """Inspection of a folder of shards."""

    path: str = ""
    """Folder of shards, as `python -m biomamba_jax.prepare` writes it; also gs://bucket/folder."""
    split: str = "train"
    """The split to inspect."""
    samples: checks.NonNegativeInt = 3
    """Number of documents to show."""
    input: list[str] = field(default_factory=list)
    """NLM files that the shards were made from, to show the XML of the same documents."""
    checked: checks.PositiveInt = 100_000
    """Number of documents to search for remaining markup and entities."""
    sequence_length: checks.PositiveInt = 1024
    """Tokens of a row, for the estimate of packing and the mixture's preview."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """A mixture to preview, as in data.mixture of a pretraining config."""
    preview_tokens: checks.Amount = 10_000_000
    """Number of tokens in that preview."""
    seed: checks.Seed = 0
    """Seed of the samples and of the mixture's order."""
    report: str | None = None
    """HTML file to write the report to, with plots."""


@dataclass(frozen=True)
class TokenizersConfig(TextFields):
    """Comparison of tokenizers on the same text."""

    tokenizers: list[str] = field(default_factory=list)
    """SentencePiece .model or Hugging Face tokenizer.json files, folders of shards, or the name gpt-neox."""
    input: list[str] = field(default_factory=list)
    """Files of text to encode, of the kinds that prepare reads."""
    terms: str | None = None
    """File of terms, one a line; default: a list of 104 common biomedical terms."""
    max_bytes: checks.Amount = 10_000_000
    """Bytes of text to read, divided equally among the inputs."""
