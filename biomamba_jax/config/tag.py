"""Settings of `tag`."""

from dataclasses import dataclass
from typing import Literal

from biomamba_jax.config.checks import check
from biomamba_jax.config.model import InferenceConfig


@dataclass(frozen=True)
class TagConfig(InferenceConfig):
    """The texts to tag, and the model."""

    file: str | None = None
    """Text, JSON lines (.jsonl), tables (.csv, .tsv) or NLM's XML (.xml), each also .gz, .bz2 or .zst; default:
    standard input, as text."""
    text: str = "{text}"
    """JSON lines and tables: template of the text; {name} stands for that key or column."""
    to: Literal["jsonl", "pubtator", "html"] = "jsonl"
    """Written: JSON lines with the spans, PubTator, or a page with highlighted spans, which needs `output`."""
    output: str | None = None
    """File to write; default: standard output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.to != "html" or self.output, "output", self.output, "give the HTML file to write")
