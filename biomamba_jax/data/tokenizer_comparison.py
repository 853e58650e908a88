"""`prepare tokenizers`: a comparison of tokenizers on the same text."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from biomamba_jax.config.prepare import FilterConfig, TokenizersConfig
from biomamba_jax.data.filters import judge
from biomamba_jax.data.readers import read_records
from biomamba_jax.data.records import KEPT
from biomamba_jax.data.shards import tokenizer_file
from biomamba_jax.data.text import unspelled
from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_lines
from biomamba_jax.object_store import local_copy
from biomamba_jax.tables import summary_table

_TERMS = Path(__file__).with_name("terms.txt")  # 104 common biomedical terms


class Comparison(NamedTuple):
    """Results of a tokenizer."""

    name: str
    """The tokenizer's name."""
    vocab_size: int
    """Number of ids."""
    tokens: int
    """Tokens of the whole text, without EOS."""
    bytes_per_token: float
    """UTF-8 bytes of the text per token."""
    tokens_per_word: float
    """Words are separated by white space."""
    single_terms: float
    """Fraction of the terms that are one token after a space."""
    tokens_per_term: float
    """Mean tokens of a term after a space."""
    unspelled: float
    """Share of the text's bytes that the tokens do not spell, white space aside; what is lost takes no tokens."""


def compare_tokenizers(config: TokenizersConfig, tokenizers: Sequence[str]) -> list[Comparison]:
    """Encode the same text with each tokenizer.

    Args:
      config: the text, the terms and how much of each input is read.
      tokenizers: tokenizer files, or folders of shards with one.

    Raises:
      UserError: there is no text, no tokenizer, or one that cannot be read.
    """
    if not tokenizers or not config.input:
        raise UserError("name --tokenizers FILES... and the text to measure on with --input FILES...")
    texts = list(_texts(config))
    if not texts:
        raise UserError("--input holds no text; give other files")
    terms = [line.strip() for line in read_lines(config.terms or _TERMS) if line.strip()]
    if not terms:
        raise UserError(f"{config.terms}: holds no term; write one per line")
    return [_compare(_load(path), texts, terms) for path in tokenizers]


def _compare(tokenizer: Tokenizer, texts: Sequence[str], terms: Sequence[str]) -> Comparison:
    tokens = sum(map(len, tokenizer.encode_batch(texts)))
    if not tokens:
        raise UserError(f"{tokenizer.path}: spells nothing of the text; leave it out")
    lost, total = np.sum([unspelled(text, own) for text, own in zip(texts, tokenizer.spell(texts), strict=True)], 0)
    words = sum(len(text.split()) for text in texts)
    # After a space, as in running text.
    of_terms = [len(ids) for ids in tokenizer.encode_batch([f" {term}" for term in terms])]
    return Comparison(
        tokenizer.name,
        tokenizer.vocab_size,
        tokens,
        bytes_per_token=sum(len(text.encode()) for text in texts) / tokens,
        tokens_per_word=tokens / max(words, 1),
        single_terms=sum(count == 1 for count in of_terms) / len(terms),
        tokens_per_term=sum(of_terms) / len(terms),
        unspelled=lost / max(total, 1),
    )


def _load(path: str) -> Tokenizer:
    return load_tokenizer(tokenizer_file(path) if local_copy(path, "").is_dir() else path)


def _texts(config: TokenizersConfig) -> Iterator[str]:
    """Yield the first documents of each input, up to its share of `max_bytes`."""
    for path in config.input:
        left = config.max_bytes // len(config.input)
        for record in judge(read_records(path, config), FilterConfig()):
            if left <= 0:
                break
            if record.status == KEPT:
                left -= len(record.text.encode())
                yield record.text


def show(found: Sequence[Comparison]) -> None:
    """Print the comparison as a table."""
    words = "tokenizer,ids,tokens,bytes per token,tokens per word,one-token terms,tokens per term,not spelled"
    formats = ("{}", "{:,}", "{:,}", "{:.3f}", "{:.3f}", "{:.1%}", "{:.2f}", "{:.2%}")
    summary_table(
        "", words.split(","), [[form.format(v) for form, v in zip(formats, each, strict=True)] for each in found]
    )
