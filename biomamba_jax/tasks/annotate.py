"""Predictions of heads: texts of any length in windows with carried state, in batches, in each way of reading."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy.special import expit, softmax

from biomamba_jax.config.heads import HeadConfig
from biomamba_jax.data.annotations import AnnotatedText, Span, from_tags
from biomamba_jax.data.examples import encode_questions
from biomamba_jax.data.tokenizer import Tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.interop.heads import Head
from biomamba_jax.model.decode import InferenceModel, LayerStates
from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.tasks.devices import over_rows, row_mesh, rows_of
from biomamba_jax.tasks.embedding import finite
from biomamba_jax.tasks.measures import MAX_FACTOID_ANSWERS
from biomamba_jax.tasks.packed import by_document, run_packed

WINDOW = 1024
"""Tokens that are computed at once; a longer text continues with the recurrent state."""
_LONGEST_ANSWER = 30
"""Words of an answer, as usual for SQuAD."""
_BOUNDARIES = 20
"""First and last words of answers that are combined."""


@dataclass(frozen=True)
class TextClass:
    """Predicted class of a text, or its labels."""

    label: str
    """The most likely class or label."""
    probabilities: dict[str, float]
    """Probability of each class or label."""
    labels: tuple[str, ...] = ()
    """The predicted class; of a multi-label head, all labels that are more likely than not."""


class HeadModel(ABC):
    """A model with a head; predicts what the head was trained to.

    Args:
      name: the model's name in errors.
      head: kind, labels and reading of the head.
      tokenizer: encodes texts as for training the head.
    """

    def __init__(self, name: str, head: HeadConfig, tokenizer: Any):
        self.head = head
        """Kind, labels and reading of the head."""
        self.tokenizer = tokenizer
        """Encoder of texts."""
        self._name = name

    @abstractmethod
    def logits(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return float32 logits of each text's ids: [tokens K], or [at least 1, K] of which the last row predicts."""

    def tag(self, texts: Sequence[str]) -> list[tuple[Span, ...]]:
        """See `tasks.model.Model.tag`."""
        return [found.spans for found in self._predicted(texts, "token_classifier")]

    def classify(self, texts: Sequence[str]) -> list[TextClass]:
        """See `tasks.model.Model.classify`."""
        found = self._predicted(texts, "classifier", "multi_label")
        return [TextClass(max(each.scores, key=each.scores.__getitem__), each.scores, each.labels) for each in found]

    def _predicted(self, texts: Sequence[str], *kinds: str) -> list[AnnotatedText]:
        if self.head.kind not in kinds:
            raise UserError(f"{self._name}: its head is a {self.head.kind}, not a {' or '.join(kinds)}")
        return self.annotate([AnnotatedText("", text) for text in texts])

    def annotate(self, texts: Sequence[AnnotatedText]) -> list[AnnotatedText]:
        """Return texts with the predicted spans, labels or score instead of those that they have.

        Raises:
          UserError: a prediction is NaN or infinite.
        """
        if self.head.of_words:
            questions, words = encode_questions(texts, self.tokenizer)
            ids = [[*question, *own.ids] for question, own in zip(questions, words, strict=True)]
            rows = zip(self._finite_logits(ids), questions, words, strict=True)
            found = [(logits[np.array(own.last, np.int64) + len(before)], own.words) for logits, before, own in rows]
            return [self._with_spans(text, *each) for text, each in zip(texts, found, strict=True)]
        ids = self.tokenizer.encode_batch([text.text for text in texts])
        last = (logits[-1].astype(np.float64) for logits in self._finite_logits(ids))
        return [self._with_labels(text, each) for text, each in zip(texts, last, strict=True)]

    def _finite_logits(self, texts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        return (finite(logits, self._name, "predictions") for logits in self.logits(texts))

    def _with_spans(self, text: AnnotatedText, logits: np.ndarray, words: Sequence[tuple[int, int]]) -> AnnotatedText:
        """Return a text with the answers or entities that the logits [words K] of its words predict."""
        if self.head.kind == "span":
            return dataclasses.replace(text, spans=tuple(_answers(logits, words)))
        tags = [self.head.labels[index] for index in logits.argmax(-1)]
        return dataclasses.replace(text, spans=tuple(from_tags(words, tags)), relations=())

    def _with_labels(self, text: AnnotatedText, logits: np.ndarray) -> AnnotatedText:
        """Return a text with the score or labels that logits [K] predict."""
        if self.head.kind == "regression":
            return dataclasses.replace(text, score=float(logits[0]))
        one = self.head.kind == "classifier"
        probabilities = softmax(logits) if one else expit(logits)
        scores = dict(zip(self.head.labels, probabilities.tolist(), strict=True))
        found = [max(scores, key=scores.__getitem__)] if one else [each for each in scores if scores[each] > 0.5]
        return dataclasses.replace(text, labels=tuple(found), scores=scores)


class NativeHeadModel(HeadModel):
    """A backbone of ours with a head.

    Args:
      name: the model's name in errors.
      model: the backbone.
      head: the head.
      tokenizer: that of the model.
      rows: texts that are computed together.
      window: see `WINDOW`.
    """

    def __init__(
        self, name: str, model: InferenceModel, head: Head, tokenizer: Tokenizer, *, rows: int = 8, window: int = WINDOW
    ):
        super().__init__(name, head.config, tokenizer)
        self._window, self._mesh = window, row_mesh()
        self._rows = rows_of(rows, self._mesh)
        width = model.config.d_model
        self._backbones = [(model, jnp.asarray(head.weight[:, :width]))]
        if head.reversed is not None:
            params = {"embedding": model.embedding.dense(model.dtype), **head.reversed}
            backwards = InferenceModel.from_params(model.config, params, model.weight_dtype)
            self._backbones.append((backwards, jnp.asarray(head.weight[:, width:])))
        self._bias = head.bias

    def logits(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return float32 logits [tokens K] for each token of each text; one row for an empty one.

        Those of a head that predicts for a text are of the states after as many tokens from either side.
        """
        start = self.tokenizer.start_id
        forwards = [[start, *ids] * (2 if self.head.reading == "echo" else 1) for ids in texts]
        both = [forwards, [[start, *ids[::-1]] for ids in texts]]
        found = [self._run(*backbone, rows) for backbone, rows in zip(self._backbones, both, strict=False)]
        results = []
        for ids, *directions in zip(texts, *found, strict=True):
            forward, *backward = (logits[-max(len(ids), 1) :] for logits in directions)
            aligned = (logits[::-1] if self.head.of_words else logits for logits in backward)
            results.append(sum(aligned, forward + self._bias))
        return results

    def _run(self, model: InferenceModel, weight: Array, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return float32 weight @ hidden state [tokens K] of each text, none of which is empty."""
        inputs = [np.asarray(ids, np.int32) for ids in texts]
        logits = partial(_row_logits, (model, weight), self._mesh)
        batches = run_packed(model, inputs, logits, self._window, self._rows, self._mesh)
        found = dict(by_document(batches, inputs))
        return [found[index] for index in range(len(texts))]


@partial(jax.jit, static_argnames=("mesh",))
def _row_logits(
    head: tuple[InferenceModel, Float[Array, "K D"]], mesh: Mesh, rows: dict[str, Array], states: LayerStates
) -> tuple[Float[Array, "B L K"], LayerStates]:
    def local(head: Any, rows: dict[str, Array], states: LayerStates) -> tuple[Array, LayerStates]:
        model, weight = head
        hidden, after = model.hidden(rows["inputs"], states, rows["segment_ids"])
        return jnp.matmul(hidden.astype(jnp.float32), weight.T, precision=jax.lax.Precision.HIGHEST), after

    return over_rows(local, mesh)(head, rows, states)


def _answers(logits: np.ndarray, words: Sequence[tuple[int, int]]) -> list[Span]:
    """Return the most likely spans of whole words, the best first, no two of the same words."""
    first, last = (np.argsort(-logits[:, side], kind="stable")[:_BOUNDARIES].tolist() for side in (0, 1))
    pairs = [(a, b) for a in first for b in last if a <= b < a + _LONGEST_ANSWER]
    pairs.sort(key=lambda pair: -(logits[pair[0], 0] + logits[pair[1], 1]))
    return [Span(words[a][0], words[b][1], "answer") for a, b in pairs[:MAX_FACTOID_ANSWERS]]
