"""A model in memory: what every format reads and writes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from biomamba_jax.config import ModelConfig
from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.interop.heads import Head


@dataclass
class Weights:
    """A model's weights, tokenizer and metadata."""

    config: ModelConfig
    """The model; every size is set, and execution settings are at their defaults."""
    params: dict[str, Any]
    """Nested dict of float32 numpy arrays, like those of `model.init_params`."""
    tokenizer_file: Path | None = None
    """`tokenizer.model` (SentencePiece) or `tokenizer.json` (Hugging Face)."""
    about: dict[str, Any] = field(default_factory=dict)
    """Information about the training, see `runs.describe`."""
    head: Head | None = None
    """Head that was trained with the model."""
    token_ids: dict[str, Any] = field(default_factory=dict)
    """Those of bos_token_id, eos_token_id and pad_token_id that the model's config.json states."""

    def tokenizer(self, name: str | None) -> Tokenizer:
        """Load the tokenizer; `name` is the model's for messages.

        Raises:
          UserError: there is none.
        """
        if self.tokenizer_file is None:
            raise UserError(f"{name}: has no tokenizer; `convert --tokenizer FILE` adds one to the weights")
        return load_tokenizer(self.tokenizer_file)
