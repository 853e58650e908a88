"""Folders with a small model of random weights and a tokenizer, for tests of what is done with a model."""

import dataclasses
from pathlib import Path

import numpy as np
from random_weights import random_weights

from biomamba_jax.config import ModelConfig
from biomamba_jax.data.tokenizer import Tokenizer, train_sentencepiece
from biomamba_jax.interop import write_model

WORDS = "the patients with type 2 diabetes were given insulin, and serum glucose fell in β-cell mice (p<0.05).".split()

# Untied: a small random model whose head is its embedding says the last token again and again.
CONFIGS = {
    "mamba1": ModelConfig(kind="mamba1", d_model=32, n_layers=2, d_state=8, tie_embeddings=False),
    "mamba2": ModelConfig(
        kind="mamba2", d_model=32, n_layers=2, d_state=16, headdim=16, n_groups=2, tie_embeddings=False
    ),
}


def train_tokenizer(folder: Path) -> Tokenizer:
    """A SentencePiece model of 310 pieces, most of them bytes."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, 12)) for _ in range(300)]
    return train_sentencepiece(texts, 310, folder / "tokenizer.model")


def write_tiny_model(folder: Path, kind: str, tokenizer: Tokenizer, dialect: str = "native", spread: float = 8) -> Path:
    """A model whose logits are spread widely enough for text to vary; with a spread of NaN, a broken one."""
    config = dataclasses.replace(CONFIGS[kind], vocab_size=tokenizer.vocab_size)
    weights = random_weights(config)
    weights.params["norm_f"]["weight"] *= spread
    write_model(dataclasses.replace(weights, tokenizer_file=tokenizer.path), folder, dialect)
    return folder
