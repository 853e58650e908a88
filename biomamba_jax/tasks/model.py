"""A trained model in three lines:

import biomamba_jax
model = biomamba_jax.load("DIR")
print(model.generate(["Patients with type 2 diabetes"])[0])
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from biomamba_jax.config import ModelConfig
from biomamba_jax.data.tokenizer import Tokenizer, load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.interop import read_model
from biomamba_jax.interop.classifier import Classifier
from biomamba_jax.model.decode import InferenceModel
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.cross_entropy import token_negative_log_likelihoods
from biomamba_jax.tasks.generation import Generation, Generator, round_up
from biomamba_jax.tasks.sampling import Sampling

_ROWS = 8
"""Texts scored or classified at one time."""


@dataclass(frozen=True)
class TextScore:
    """How likely a text is."""

    tokens: list[int]
    """Its ids."""
    logprobs: list[float]
    """Natural log of the probability of each token, given the end-of-text token and the tokens before it."""

    @property
    def total(self) -> float:
        """Natural log of the probability of the whole text, its end not included."""
        return sum(self.logprobs)


@dataclass(frozen=True)
class TextClass:
    """The class of a text."""

    label: str
    """The likeliest class."""
    probabilities: dict[str, float]
    """Probability of each class."""


def load(path: str | os.PathLike[str], dtype: Literal["float32", "bfloat16"] | None = None) -> "Model":
    """Loads a model from a folder of any format: native, Hugging Face, mamba_ssm, or a run directory of `pretrain`.

    Args:
      dtype: of matrices and activations; left out: bfloat16 on TPU and GPU, float32 on CPU.

    Raises:
      UserError: no model there, damaged files, or a dtype that is none of these.
    """
    if dtype not in (None, "float32", "bfloat16"):
        raise UserError(f"dtype = {dtype!r}: give float32 or bfloat16")
    weights = read_model(path)
    tokenizer = load_tokenizer(weights.tokenizer_file) if weights.tokenizer_file else None
    model = InferenceModel.from_params(weights.config, weights.params, dtype)
    return Model(model, tokenizer, os.fspath(path), weights.classifier)


class Model:
    """A model and its tokenizer, ready to use. See `load`."""

    def __init__(
        self,
        model: InferenceModel,
        tokenizer: Tokenizer | None,
        path: str,
        classifier: Classifier | None = None,
    ):
        self._model, self._tokenizer, self._path, self._classifier = model, tokenizer, path, classifier
        self.generator = Generator(model, tokenizer, path)

    @property
    def config(self) -> ModelConfig:
        """The sizes of the model."""
        return self._model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          UserError: the folder has none.
        """
        if self._tokenizer is None:
            raise UserError(f"{self._path}: has no tokenizer.json or tokenizer.model; put the model's one there")
        return self._tokenizer

    def logits(self, token_ids: ArrayLike) -> np.ndarray:
        """Logits of the next token after each token.

        Args:
          token_ids: [B L] ids.

        Returns:
          Float32 [B L V] over the padded vocabulary; ids from `config.vocab_size` on stand for nothing.

        Raises:
          UserError: another shape or type, or an id that the model does not know.
        """
        try:
            ids = np.asarray(token_ids)
        except ValueError:  # rows of unequal length
            ids = np.asarray(None)
        if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"logits: token_ids must be integers [rows, length], not {ids.dtype} {list(ids.shape)}")
        if ids.min() < 0 or ids.max() >= self.config.padded_vocab:
            raise UserError(f"logits: ids must be in 0..{self.config.padded_vocab - 1}, not {ids.min()}..{ids.max()}")
        return np.asarray(_logits(self._model, _padded(ids))[:, : ids.shape[1]], np.float32)

    def generate(
        self, prompts: str | Sequence[str], sampling: Sampling | None = None, **settings: Any
    ) -> list[Generation]:
        """Continues each prompt: results with `.text`, `.tokens` and `.finish_reason`; `str` of one is its text.

        Args:
          settings: fields of `Sampling`, instead of `sampling`: max_new_tokens=64, temperature=0.8, stop=["\\n"], ...
        """
        self.tokenizer  # noqa: B018 - says what is missing
        prompts = [prompts] if isinstance(prompts, str) else prompts
        return list(self.generator(prompts, sampling or Sampling(**settings)))

    def logprobs(self, texts: str | Sequence[str]) -> list[TextScore]:
        """The log probability of each text and of each of its tokens, in nats.

        Like a document in training, a text follows an end-of-text token, so that its first token is predicted too.
        """
        texts = [texts] if isinstance(texts, str) else texts
        ids, scores = self.tokenizer.encode_batch(texts), []
        for first in range(0, len(ids), _ROWS):
            rows = ids[first : first + _ROWS]
            inputs = np.zeros((len(rows), max(1, *map(len, rows))), np.int32)
            targets = inputs.copy()
            for row, tokens in enumerate(rows):
                targets[row, : len(tokens)] = tokens
                inputs[row, : len(tokens)] = [self.tokenizer.eos_id, *tokens][: len(tokens)]
            nll = _negative_log_likelihoods(self._model, _padded(inputs), _padded(targets), self.generator.vocab_size)
            values = (-np.asarray(nll, np.float64)).tolist()
            scores += [TextScore(tokens, row[: len(tokens)]) for tokens, row in zip(rows, values, strict=False)]
        return scores

    def classify(self, texts: str | Sequence[str]) -> list[TextClass]:
        """The class of each text, by the classifier that was fine-tuned with the model.

        Raises:
          UserError: the model has no classifier, or its weights give no probabilities.
        """
        if self._classifier is None:
            raise UserError(f"{self._path}: has no classifier.safetensors; fine-tune with --head classifier to get one")
        texts = [texts] if isinstance(texts, str) else texts
        ids, classes = self.tokenizer.encode_batch(texts), []
        weight = jnp.asarray(self._classifier.weight)
        for first in range(0, len(ids), _ROWS):
            rows = [[self.tokenizer.eos_id, *tokens] for tokens in ids[first : first + _ROWS]]
            inputs = np.zeros((len(rows), max(map(len, rows))), np.int32)
            for row, tokens in zip(inputs, rows, strict=True):
                row[: len(tokens)] = tokens
            last = np.array([len(tokens) - 1 for tokens in rows])
            for row in np.asarray(_class_probabilities(self._model, weight, _padded(inputs), last), np.float64):
                if not np.isfinite(row).all():
                    raise UserError(f"{self._path}: its class probabilities are NaN: damaged weights, or an overflow")
                named = dict(zip(self._classifier.labels, row.tolist(), strict=True))
                classes.append(TextClass(max(named, key=named.__getitem__), named))
        return classes


def _padded(rows: np.ndarray) -> np.ndarray:
    """Zeros behind the tokens, where nothing before them sees them, up to one of a few lengths."""
    return np.pad(rows.astype(np.int32), ((0, 0), (0, round_up(rows.shape[1]) - rows.shape[1])))


@jax.jit
def _class_probabilities(
    model: InferenceModel, weight: Float[Array, "K D"], tokens: Int[Array, "B L"], last: Int[Array, " B"]
) -> Float[Array, "B K"]:
    """Of texts whose last token stands at `last`."""
    hidden, _ = model.hidden(tokens)
    state = hidden[jnp.arange(tokens.shape[0]), last].astype(jnp.float32)
    return jax.nn.softmax(jnp.matmul(state, weight.T, precision=jax.lax.Precision.HIGHEST))


@jax.jit
def _logits(model: InferenceModel, tokens: Int[Array, "B L"]) -> Float[Array, "B L V"]:
    return model.logits(model.hidden(tokens)[0])


@partial(jax.jit, static_argnames="vocab_size")
def _negative_log_likelihoods(
    model: InferenceModel, inputs: Int[Array, "B L"], targets: Int[Array, "B L"], vocab_size: int
) -> Float[Array, "B L"]:
    hidden, _ = model.hidden(inputs)
    flat = hidden.reshape(-1, hidden.shape[-1])
    nll = token_negative_log_likelihoods(flat, model.head, targets.reshape(-1), valid_vocab_size=vocab_size)
    return nll.reshape(targets.shape)
