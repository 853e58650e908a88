"""A trained model in three lines.

import biomamba_jax
model = biomamba_jax.load("DIR")
print(model.generate(["Patients with type 2 diabetes"])[0])
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import jax
import numpy as np
from jax.typing import ArrayLike

from biomamba_jax.config import ModelConfig
from biomamba_jax.config.embed import EmbeddingConfig
from biomamba_jax.config.generate import Sampling
from biomamba_jax.config.model import InferenceDType
from biomamba_jax.data.annotations import Span
from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.interop import read_model
from biomamba_jax.interop.heads import Head
from biomamba_jax.interop.hub import local_folder
from biomamba_jax.model.decode import InferenceModel
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.tasks.annotate import HeadModel, NativeHeadModel, TextClass
from biomamba_jax.tasks.architectures import TRANSFORMERS_PREFIX
from biomamba_jax.tasks.embedding import Embedder
from biomamba_jax.tasks.encoders import EncoderHeadModel, stated_kind
from biomamba_jax.tasks.generation import Generation, Generator
from biomamba_jax.tasks.native_scorer import NativeScorer
from biomamba_jax.tasks.padding import bucket_length, pad_right
from biomamba_jax.tasks.scoring import check_finite

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


def load(path: str | os.PathLike[str], dtype: InferenceDType | None = None) -> "Model":
    """Load a model of any format.

    Args:
      path: a folder in native, Hugging Face or mamba_ssm format, a run directory of `pretrain` or `finetune`, or a name
        on the Hugging Face hub: owner/name or owner/name@revision; or gs://bucket/folder.
      dtype: type of matrices and activations; int8: of matrices only, with a scale for each output; None: bfloat16 on
        TPU and GPU, float32 on CPU.

    Returns:
      The model, ready to use.

    Raises:
      UserError: no model there, damaged files, or an unknown dtype.
    """
    if dtype not in (None, *get_args(InferenceDType)):
        raise UserError(f"dtype = {dtype!r}: give one of {', '.join(get_args(InferenceDType))}")
    weights = read_model(path)
    tokenizer = load_tokenizer(weights.tokenizer_file) if weights.tokenizer_file else None
    model = InferenceModel.from_params(weights.config, weights.params, dtype)
    return Model(Generator(model, tokenizer, os.fspath(path)), weights.head)


def load_head(path: str | os.PathLike[str], dtype: InferenceDType | None = None) -> HeadModel:
    """Load a model with the head that it was fine-tuned with: ours, or a third-party encoder.

    Args:
      path: see `load`; or the Hugging Face folder of an encoder for tags, classes or answers (the [hf] extra).
      dtype: see `load`.

    Raises:
      UserError: the model has no head, see `load`; or transformers cannot load the encoder.
    """
    name = os.fspath(path).removeprefix(TRANSFORMERS_PREFIX)  # which `finetune` needs
    folder = local_folder(name)
    if stated_kind(folder) is not None:
        return EncoderHeadModel(name, folder, dtype=dtype, rows=_ROWS)
    return load(name, dtype).head_model


class Model:
    """A model with its tokenizer and, if it was fine-tuned with one, its head; made by `load`.

    Args:
      generator: the model and its tokenizer.
      head: a linear layer on hidden states.
    """

    def __init__(self, generator: Generator, head: Head | None = None):
        self.generator = generator
        """Continues prompts; `generate` with more control."""
        self._model, self._path, self._head = generator.model, generator.name, head

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
          UserError: the model has no tokenizer, or a log probability is NaN or infinite.
        """
        ids = self.tokenizer.encode_batch(_as_list(texts))
        scorer = NativeScorer(self._path, self.generator, self._path, _WINDOW, max(1, min(_ROWS, len(ids))))
        nats = dict(scorer.rows([[self.tokenizer.start_id, *tokens] for tokens in ids]))
        check_finite(scorer, np.concatenate([*nats.values(), np.zeros(0)]))
        return [TextScore(tokens, (-nats[index]).tolist()) for index, tokens in enumerate(ids)]

    def classify(self, texts: str | Sequence[str]) -> list[TextClass]:
        """Predict the class or the labels of each text with the head that was fine-tuned with the model.

        Args:
          texts: a text or several.

        Returns:
          The most likely class, the probability of every class and the predicted labels, for each text.

        Raises:
          UserError: the model has no such head, or its probabilities are NaN.
        """
        return self.head_model.classify(_as_list(texts))

    def tag(self, texts: str | Sequence[str]) -> list[tuple[Span, ...]]:
        """Predict the entities of each text with the head that was fine-tuned with the model.

        Args:
          texts: a text or several, of any length.

        Returns:
          The spans of each text: `.start`, `.end` (in characters) and `.type`.

        Raises:
          UserError: the model has no such head, or its predictions are NaN.
        """
        return self.head_model.tag(_as_list(texts))

    @cached_property
    def head_model(self) -> HeadModel:
        """The model with its head, for predictions of every kind.

        Raises:
          UserError: the model has no head.
        """
        if self._head is None:
            raise UserError(f"{self._path}: has no head.safetensors; fine-tune with --head classifier to get one")
        return NativeHeadModel(self._path, self._model, self._head, self.tokenizer, rows=_ROWS)

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
def _logits(model: InferenceModel, tokens: Int[Array, "B L"]) -> Float[Array, "B L V"]:
    return model.logits(model.hidden(tokens)[0])
