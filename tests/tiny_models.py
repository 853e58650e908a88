"""Folders with a small model of random weights and a tokenizer, for tests of what is done with a model."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers
from random_weights import random_weights
from tokenizers import decoders, models, pre_tokenizers

from biomamba_jax.config import ModelConfig
from biomamba_jax.config.prepare import TokenizerTraining
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


def sentences() -> list[str]:
    """Made-up sentences to train a tokenizer on."""
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, 12)) for _ in range(300)]


def train_tokenizer(folder: Path, kind: str = "unigram") -> Tokenizer:
    """A SentencePiece model of 310 pieces, most of them bytes."""
    training = TokenizerTraining(train_tokenizer=310, tokenizer_kind=kind)
    return train_sentencepiece(sentences(), training, folder / "tokenizer.model")


def write_byte_level(
    folder: Path,
    special: Sequence[str] = (),
    plain: Sequence[str] = (),
    merges: Sequence[tuple[str, str]] = (),
    **stated: object,
) -> Path:
    """A tokenizer.json of bytes, `merges`, `special` and `plain` tokens; `stated` is its tokenizer_config.json."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    library = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in special])
    library.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in plain])
    folder.mkdir(exist_ok=True)
    library.save(str(folder / "tokenizer.json"))
    if stated:
        (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    return folder / "tokenizer.json"


def write_tiny_model(folder: Path, kind: str, tokenizer: Tokenizer, dialect: str = "native", spread: float = 8) -> Path:
    """A model whose logits are spread widely enough for text to vary; with a spread of NaN, a broken one."""
    config = dataclasses.replace(CONFIGS[kind], vocab_size=tokenizer.vocab_size)
    weights = random_weights(config)
    weights.params["norm_f"]["weight"] *= spread
    write_model(dataclasses.replace(weights, tokenizer_file=tokenizer.path), folder, dialect)
    return folder
