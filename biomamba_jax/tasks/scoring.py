"""The scorer protocol: what a model must compute to be evaluated.

A scorer returns log-likelihoods of text under its own tokenizer; every figure of an evaluation is derived from them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from biomamba_jax.data.examples import encode_answers
from biomamba_jax.errors import UserError

Tokens = list[int]
DocumentsScore = Callable[[Sequence[str]], Iterator[tuple[int, np.ndarray]]]


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model that a report shows."""

    name: str
    """The model's name in the config."""
    path: str
    """Its folder."""
    kind: Literal["causal", "masked", "span"]
    """masked: its figures are pseudo-log-likelihoods (each token given all others), not probabilities of the text;
    span: it marks answers in a passage and has no likelihoods."""
    run_by: str
    """biomamba-jax or transformers."""
    parameters: int
    """Number of parameters."""
    tokenizer: str
    """The tokenizer's name and size."""
    context: str
    """Description of the context that a token is predicted from."""
    dtype: str
    """Type of matrices and activations."""


class Request(NamedTuple):
    """Continuations to score after one context."""

    context: str
    """The text before each continuation."""
    continuations: tuple[str, ...]
    """Texts that may follow it."""


class Continuation(NamedTuple):
    """Log-likelihood of one continuation."""

    logprobs: tuple[float, ...]
    """Log probability of each of its tokens, in nats."""
    greedy: bool
    """True if each token was the model's most likely one."""

    @property
    def total(self) -> float:
        """Log-likelihood of the whole continuation, in nats."""
        return sum(self.logprobs)


class Scorer(Protocol):
    """A model under evaluation."""

    facts: ModelFacts
    """Properties of the model that a report shows."""
    ends_documents: bool
    """True if the final token of every document is the end-of-text token."""
    padding_id: int
    """The token that rows are padded with where padding counts, see `paper_v1`."""
    documents_by_word: DocumentsScore | None
    """As `documents`, by PLL-word-l2r; None of a causal model, and of a tokenizer that does not tell words apart."""

    def documents(self, texts: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """Score whole documents, in any order.

        Args:
          texts: the documents. The first token of each is predicted from the start token.

        Yields:
          The index of a text, and the negative log-likelihood in nats of each of its tokens, its end included, as
          float64 [tokens].
        """

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the token ids of each text, without special tokens at its ends."""

    def spell(self, texts: Sequence[str]) -> list[str]:
        """Return the text that the tokens of each text spell; unknown tokens spell nothing."""

    def rows(self, rows: Sequence[Tokens]) -> Iterator[tuple[int, np.ndarray]]:
        """Score rows of token ids as they are, in any order.

        Args:
          rows: token ids of each row.

        Yields:
          The index of a row, and the negative log-likelihood in nats of each of its tokens but the first, given the
          tokens before it, as float64 [tokens - 1].
        """

    def continuations(self, requests: Sequence[Request]) -> list[list[Continuation]]:
        """Score every continuation of every request.

        Args:
          requests: contexts and continuations; white space at a context's end counts as part of the continuations.

        Returns:
          For each request, one result for each of its continuations.
        """

    def generate(self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """Continue each prompt greedily.

        Args:
          prompts: texts to continue; white space at their ends is left to the model, as to continuations.
          max_new_tokens: maximum number of tokens for each.
          stop: strings that end a text.

        Returns:
          The generated texts, without the stop string.
        """


@runtime_checkable
class SpanScorer(Protocol):
    """A scorer that marks answers in a passage instead of generating them."""

    facts: ModelFacts
    """Properties of the model that a report shows."""

    def spans(self, question: str, passages: Sequence[str]) -> list[str]:
        """Return the likeliest answers to a question in its passages, the best first."""


def check_finite(scorer: Scorer | SpanScorer, values: ArrayLike) -> None:
    """Raise UserError, naming the model, if a log-likelihood is NaN or infinite.

    With NaN, argmax picks the first answer and the figures would look plausible.
    """
    if not np.isfinite(values).all():
        facts = scorer.facts
        raise UserError(
            f"models.{facts.name}: {facts.path} gives NaN or infinite log probabilities in {facts.dtype}: its weights "
            "are damaged or overflow; try dtype float32, or another checkpoint"
        )


def encode_requests(
    requests: Sequence[Request],
    encode: Callable[[Sequence[str]], list[Tokens]],
    encode_context: Callable[[Sequence[str]], list[Tokens]],
) -> list[tuple[Tokens, list[Tokens]]]:
    """Tokenize requests as `data.examples.encode_answers` does.

    Args:
      requests: contexts and continuations.
      encode: encodes text without special tokens.
      encode_context: encodes text together with the special tokens that precede it.

    Returns:
      The context's tokens and each continuation's, for each request.
    """
    pairs = [(request.context, text) for request in requests for text in request.continuations]
    remaining = iter(encode_answers(pairs, encode, encode_context))
    of_requests = [[next(remaining) for _ in request.continuations] for request in requests]
    return [(of_request[0][0], [answer for _, answer in of_request]) for of_request in of_requests]
