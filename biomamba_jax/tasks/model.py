"""A trained model in three lines.

import biomamba_jax
model = biomamba_jax.load("DIR")
print(model.generate(["Patients with type 2 diabetes"])[0])
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from biomamba_jax.config import ModelConfig
from biomamba_jax.config.embed import EmbeddingConfig
from biomamba_jax.config.generate import Sampling
from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.interop import read_model
from biomamba_jax.interop.classifier import Classifier
from biomamba_jax.model.decode import InferenceModel
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.tasks.embedding import Embedder
from biomamba_jax.tasks.generation import Generation, Generator
from biomamba_jax.tasks.native_scorer import NativeScorer
from biomamba_jax.tasks.padding import batched, bucket_length, pad_right

_ROWS = 8
"""Texts that are scored or classified together."""
_WINDOW = 1024
"""Tokens of a row when texts are scored; longer ones continue with the recurrent state."""


@dataclass(frozen=True)
class TextScore:
    """Log-likelihood of a text."""

    tokens: list[int]
    """Token ids of the text."""
    logprobs: list[float]
    """Log probability of each token in nats, given the start token and the tokens before it."""

    @property
    def total(self) -> float:
        """Log-likelihood of the whole text in nats; its end is not included."""
        return sum(self.logprobs)


@dataclass(frozen=True)
class TextClass:
    """Predicted class of a text."""

    label: str
    """The most likely class."""
    probabilities: dict[str, float]
    """Probability of each class."""


def load(path: str | os.PathLike[str], dtype: Literal["float32", "bfloat16"] | None = None) -> "Model":
    """Load a model of any format.

    Args:
      path: a folder in native, Hugging Face or mamba_ssm format, a run directory of `pretrain` or `finetune`, or a name
        on the Hugging Face hub: owner/name or owner/name@revision.
      dtype: type of matrices and activations; None: bfloat16 on TPU and GPU, float32 on CPU.

    Returns:
      The model, ready to use.

    Raises:
      UserError: no model there, damaged files, or an unknown dtype.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype = {dtype!r}: give float32 or bfloat16")
    weights = read_model(path)
    tokenizer = load_tokenizer(weights.tokenizer_file) if weights.tokenizer_file else None
    model = InferenceModel.from_params(weights.config, weights.params, dtype)
    return Model(Generator(model, tokenizer, os.fspath(path)), weights.classifier)


class Model:
    """A model with its tokenizer and, if it was fine-tuned with one, its classifier; made by `load`.

    Args:
      generator: the model and its tokenizer.
      classifier: a linear layer on the hidden state after a text's last token.
    """

    def __init__(self, generator: Generator, classifier: Classifier | None = None):
        self.generator = generator
        """Continues prompts; `generate` with more control."""
        self._model, self._path, self._classifier = generator.model, generator.name, classifier

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        return self._model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          UserError: the folder has none.
        """
        return self.generator.tokenizer

    def logits(self, token_ids: ArrayLike) -> np.ndarray:
        """Return the logits of the next token after each token.

        Args:
          token_ids: integers [B L].

        Returns:
          Float32 [B L V] over the padded vocabulary; ids from `config.vocab_size` on are padding.

        Raises:
          UserError: another shape or type, or an id outside the vocabulary.
        """
        try:
            ids = np.asarray(token_ids)
        except ValueError:  # rows of unequal length
            ids = np.asarray(None)
        if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"logits: token_ids must be integers [rows, length], not {ids.dtype} {list(ids.shape)}")
        if ids.min() < 0 or ids.max() >= self.config.padded_vocab:
            raise UserError(f"logits: ids must be in 0..{self.config.padded_vocab - 1}, not {ids.min()}..{ids.max()}")
        rows, length = ids.shape
        return np.asarray(_logits(self._model, pad_right(ids, (rows, bucket_length(length))))[:, :length], np.float32)

    def generate(
        self, prompts: str | Sequence[str], sampling: Sampling | None = None, **settings: Any
    ) -> list[Generation]:
        """Continue each prompt.

        Args:
          prompts: a text or several.
          sampling: how tokens are chosen and when to stop.
          **settings: fields of `Sampling`, instead of `sampling`: max_new_tokens=64, temperature=0.8, stop=["."], ...

        Returns:
          For each prompt `.text`, `.tokens` and `.finish_reason`; `str` of a result is its text.

        Raises:
          UserError: the model has no tokenizer, a setting is out of range, or the logits are NaN.
        """
        return list(self.generator(_as_list(prompts), sampling or Sampling(**settings)))

    def logprobs(self, texts: str | Sequence[str]) -> list[TextScore]:
        """Return the log-likelihood of each text and the log probability of each of its tokens.

        As in training, a text follows the start token, so its first token is predicted as well.

        Args:
          texts: a text or several.

        Returns:
          Token ids and log probabilities in nats, for each text.

        Raises:
          UserError: the model has no tokenizer.
        """
        ids = self.tokenizer.encode_batch(_as_list(texts))
        scorer = NativeScorer(self._path, self.generator, self._path, _WINDOW, max(1, min(_ROWS, len(ids))))
        nats = dict(scorer.rows([[self.tokenizer.start_id, *tokens] for tokens in ids]))
        return [TextScore(tokens, (-nats[index]).tolist()) for index, tokens in enumerate(ids)]

    def classify(self, texts: str | Sequence[str]) -> list[TextClass]:
        """Predict the class of each text with the classifier that was fine-tuned with the model.

        Args:
          texts: a text or several.

        Returns:
          The most likely class and the probability of every class, for each text.

        Raises:
          UserError: the model has no classifier, or its probabilities are NaN.
        """
        if self._classifier is None:
            raise UserError(f"{self._path}: has no classifier.safetensors; fine-tune with --head classifier to get one")
        ids, classes = self.tokenizer.encode_batch(_as_list(texts)), []
        weight = jnp.asarray(self._classifier.weight)
        for batch in batched(ids, _ROWS):
            rows = [[self.tokenizer.start_id, *tokens] for tokens in batch]
            last = np.array([len(tokens) - 1 for tokens in rows])
            inputs = pad_right(rows, (len(rows), bucket_length(last.max() + 1)))
            for row in np.asarray(_class_probabilities(self._model, weight, inputs, last), np.float64):
                if not np.isfinite(row).all():
                    raise UserError(f"{self._path}: its class probabilities are NaN: damaged weights, or an overflow")
                probabilities = dict(zip(self._classifier.labels, row.tolist(), strict=True))
                classes.append(TextClass(max(probabilities, key=probabilities.__getitem__), probabilities))
        return classes

    def embed(self, texts: str | Sequence[str], **settings: Any) -> np.ndarray:
        """Return a vector for each text, float32 [texts D].

        Args:
          texts: a text or several, each of any length.
          **settings: fields of `EmbeddingConfig`: pooling="last", batch_size=32, ...

        Raises:
          UserError: the model has no tokenizer, a setting is out of range, or a hidden state is NaN.
        """
        return self.embedder(EmbeddingConfig(**settings))(_as_list(texts))

    def embedder(self, config: EmbeddingConfig) -> Embedder:
        """Return what `embed` computes with, to be used again and again."""
        return Embedder(self._model, self.tokenizer, config, self._path)


def _as_list(texts: str | Sequence[str]) -> Sequence[str]:
    return [texts] if isinstance(texts, str) else texts


@jax.jit
def _class_probabilities(
    model: InferenceModel, weight: Float[Array, "K D"], tokens: Int[Array, "B L"], last: Int[Array, " B"]
) -> Float[Array, "B K"]:
    """Return the class probabilities of right-padded texts whose last token is at index `last`."""
    hidden, _ = model.hidden(tokens)
    state = hidden[jnp.arange(tokens.shape[0]), last].astype(jnp.float32)
    return jax.nn.softmax(jnp.matmul(state, weight.T, precision=jax.lax.Precision.HIGHEST))


@jax.jit
def _logits(model: InferenceModel, tokens: Int[Array, "B L"]) -> Float[Array, "B L V"]:
    return model.logits(model.hidden(tokens)[0])
