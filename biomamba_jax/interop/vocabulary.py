"""Two tokenizers that meet: whether their ids mean the same tokens, and a model's embedding for another vocabulary."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.interop.weights import Weights

_BY_TOKEN = {"embedding", "lm_head"}  # parameters [vocabulary D]; a tied head is the embedding


def identity(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what weights record of their tokenizer: a digest of what its ids mean, its start and its end."""
    return {
        "vocabulary_sha256": tokenizer.vocabulary_sha256,
        "start_id": tokenizer.start_id,
        "eos_id": tokenizer.eos_id,
    }


def check_recorded(where: Path, tokenizer: Tokenizer | None, recorded: Any) -> None:
    """Refuse the tokenizer in a model's folder if the weights recorded another.

    Args:
      where: the folder.
      tokenizer: the tokenizer that was found there, None if there is none.
      recorded: `identity` of the tokenizer that the weights were written with, None if they are of an earlier version.

    Raises:
      UserError: they differ.
    """
    found = identity(tokenizer) if tokenizer and recorded is not None else recorded
    if tokenizer and recorded != found:
        known = recorded if isinstance(recorded, dict) else {}
        key = next((key for key in found if known.get(key) != found[key]), "tokenizer")
        raise UserError(
            f"{where}: its tokenizer {tokenizer.path.name} is not the one that its weights were saved with ({key} "
            f"{str(found[key])[:12]}, not {str(known.get(key))[:12]}); put that one back"
        )


def row_sources(old: Tokenizer, new: Tokenizer) -> np.ndarray:
    """Return the id in `old` of each token of `new` by its spelling, int64 [new.vocab_size]; -1: there is none.

    Tokens are compared by the text that they add to a text, since kinds of tokenizers write a space in different ways,
    and pieces of a character by their names.
    """
    exact, by_text = dict[tuple[str, str], int](), dict[str, int]()
    for token, (name, text) in enumerate(_spellings(old)):
        exact.setdefault((name, text), token)
        if text and "\ufffd" not in text and len(name) <= len(old.token(by_text.setdefault(text, token))):
            by_text[text] = token  # "A" rather than the byte "<0x41>"
    return np.array([exact.get((name, text), by_text.get(text, -1)) for name, text in _spellings(new)])


def _spellings(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Return the name and the text of each token."""
    before = tokenizer.encode_batch(["a"])[0]
    texts = tokenizer.decode_batch([[*before, token] for token in range(tokenizer.vocab_size)])
    start = len(tokenizer.decode(before))
    return [(tokenizer.token(token), text[start:]) for token, text in enumerate(texts)]


def require_same(ours: Tokenizer, theirs: Tokenizer, whose: str, remedy: str) -> None:
    """Refuse ids of one tokenizer for weights of another.

    Args:
      ours: the tokenizer of the weights.
      theirs: the tokenizer of the ids; it may lack tokens at the end, and its file may be another one of the same
        tokens.
      whose: description of `theirs`.
      remedy: what the user can do.

    Raises:
      UserError: an id means another token, or documents begin or end with another.
    """
    differ = 0
    if theirs.sha256 != ours.sha256:
        differ = int((row_sources(ours, theirs) != np.arange(theirs.vocab_size)).sum())
    if (ours.start_id, ours.eos_id) != (theirs.start_id, theirs.eos_id) or differ:
        raise UserError(
            f"{whose}: {differ:,} of {theirs.vocab_size:,} ids of its tokenizer (sha256 {theirs.sha256[:12]}, start "
            f"{theirs.start_id}, end {theirs.eos_id}) are not those of the model's tokenizer {ours.path} (sha256 "
            f"{ours.sha256[:12]}, start {ours.start_id}, end {ours.eos_id}); {remedy}"
        )


def with_tokenizer(weights: Weights, tokenizer: Tokenizer) -> tuple[Weights, int]:
    """Return weights for another tokenizer, and the number of rows of its vocabulary that are new.

    A token that the old vocabulary spells as well keeps its row of the embedding and of an untied head. The rows of all
    others are drawn from a normal distribution with the mean and standard deviation of the old rows, column by column.
    """
    if weights.tokenizer_file is None:
        raise UserError("the model has no tokenizer to compare the new one with; `convert --tokenizer FILE` adds one")
    sources = row_sources(load_tokenizer(weights.tokenizer_file), tokenizer)
    config = dataclasses.replace(weights.config, vocab_size=tokenizer.vocab_size)
    params, kept, draw = dict(weights.params), sources >= 0, np.random.default_rng(0)
    for name in sorted(_BY_TOKEN & params.keys()):
        old, new = params[name], np.zeros((config.padded_vocab, config.d_model), np.float32)
        known = old[: weights.config.known_vocab]
        new[: len(sources)] = draw.normal(known.mean(0), known.std(0), (len(sources), config.d_model))
        new[: len(sources)][kept] = old[sources[kept]]
        params[name] = new
    changed = dataclasses.replace(weights, config=config, params=params, tokenizer_file=tokenizer.path, token_ids={})
    return changed, int((~kept).sum())
