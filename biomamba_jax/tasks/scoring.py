"""What a model must be able to do to be evaluated, and which program runs which folder.

A scorer gives log probabilities of text as its own tokenizer cuts it; everything that is measured is built on that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from biomamba_jax.errors import UserError


@dataclass(frozen=True)
class ModelFacts:
    """What a report says of a model."""

    name: str
    path: str
    kind: Literal["causal", "masked"]
    """masked: its figures are pseudo-likelihoods (each token given all others), not probabilities of the text."""
    run_by: str
    """biomamba-jax or transformers."""
    parameters: int
    tokenizer: str
    context: str
    """How much text a token is predicted from."""
    dtype: str


class Request(NamedTuple):
    """Texts that may go on from one context."""

    context: str
    continuations: tuple[str, ...]


class Continuation(NamedTuple):
    """How likely one of them is."""

    logprobs: tuple[float, ...]
    """Natural log of the probability of each of its tokens, in order."""
    greedy: bool
    """Whether each token was the model's first guess."""

    @property
    def total(self) -> float:
        """Natural log of the probability of the whole."""
        return sum(self.logprobs)


class Scorer(Protocol):
    """A model that is evaluated."""

    facts: ModelFacts
    ends_documents: bool
    """Whether the last token of every document is the end of the text."""

    def documents(self, texts: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """Scores whole documents, in any order.

        Yields:
          The place of a text in `texts`, and float64 [its tokens, its end included]: nats of each token. The first
          token is predicted from the start symbol.
        """

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, nothing added at its ends."""

    def rows(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, np.ndarray]]:
        """Scores rows of tokens as they are, in any order: nats of each token but the first, given those before it."""

    def continuations(self, requests: Sequence[Request]) -> list[list[Continuation]]:
        """Scores every continuation of every request."""

    def generate(self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """The likeliest text behind each prompt, greedily, up to the first of the strings `stop`."""


def check_finite(scorer: Scorer, values: ArrayLike) -> None:
    """Refuses what a model cannot mean: with NaN, the first answer is the best of all and no figure says why.

    Raises:
      UserError: one of the values is NaN or infinite; names the model.
    """
    if not np.isfinite(values).all():
        facts = scorer.facts
        raise UserError(
            f"models.{facts.name}: {facts.path} gives NaN or infinite log probabilities in {facts.dtype}: its weights "
            "are damaged or overflow; try dtype float32, or another checkpoint"
        )


def split_continuation(whole: Sequence[int], context: Sequence[int], alone: Sequence[int]) -> list[int]:
    """The tokens of a continuation behind its context.

    Args:
      whole: tokens of context and continuation together.
      context: tokens of the context.
      alone: tokens of the continuation by itself: taken where the two together are cut otherwise at their border.
    """
    fits = list(whole[: len(context)]) == list(context) and len(whole) > len(context)
    return list(whole[len(context) :] if fits else alone)


def move_spaces(request: Request) -> Request:
    """White space at the end of a context belongs to what follows it: tokenizers keep it with the next word."""
    context = request.context.rstrip()
    spaces = request.context[len(context) :]
    return Request(context, tuple(spaces + continuation for continuation in request.continuations))
