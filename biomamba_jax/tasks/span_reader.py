"""Answers BioASQ's factoid questions with third-party extractive models, which mark an answer in a passage.

Each snippet is read together with the question, in overlapping windows if it is long. A span's probability is that of
its first token times that of its last one, each among the snippet's tokens in the window and the first token, which
stands for "no answer here". The answers are the likeliest spans of all snippets, each text once, as BioBERT's n-best
lists are merged (Yoon et al. 2019, arXiv 1909.08229).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax

from biomamba_jax.config import EvaluateConfig
from biomamba_jax.errors import UserError
from biomamba_jax.tasks.measures import MAX_FACTOID_ANSWERS
from biomamba_jax.tasks.pretrained import load_pretrained
from biomamba_jax.tasks.scoring import check_finite
from biomamba_jax.tasks.transformers_scorer import TransformersModel

_SPAN_TOKENS, _QUESTION_TOKENS = 30, 64
"""Tokens of an answer and of a question at most, as in BERT's own program for SQuAD."""


def load(name: str, folder: Path, config: EvaluateConfig) -> Any:
    """Load a Hugging Face folder as a model for extractive question answering.

    Args:
      name: the model's name in the config.
      folder: the model's folder.
      config: batch size and dtype.

    Raises:
      UserError: see `load_pretrained`, or the tokenizer does not give the places of its tokens.
    """
    kind, head = "AutoModelForQuestionAnswering", "trained weights for question answering"
    loaded = load_pretrained(f"models.{name}", folder, lambda: kind, config.dtype, holds=head)
    return SpanReader(name, folder, *loaded, config.batch_size)


class SpanReader(TransformersModel):
    """A `scoring.Scorer` of which only `spans` can be asked."""

    ends_documents = False

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        if not self._tokenizer.is_fast:
            raise UserError(
                f"models.{self._name}: the tokenizer of {self._folder} does not tell where its tokens are in a text; "
                "give a folder with a tokenizer.json"
            )
        self.facts = self._facts("span", f"question and snippet, windows of {self._limit:,} tokens")

    def spans(self, question: str, passages: Sequence[str]) -> list[str]:
        """See `scoring.SpanScorer`; five answers at most, as many as BioASQ ranks."""
        found: dict[str, float] = {}
        for passage in passages:
            for text, probability in self._spans_of(question, passage):
                found[text] = max(probability, found.get(text, 0.0))
        return sorted(found, key=lambda text: -found[text])[:MAX_FACTOID_ANSWERS]

    def _spans_of(self, question: str, passage: str) -> Iterator[tuple[str, float]]:
        """Yield the likeliest spans of a passage in each window and their probabilities."""
        asked = self._tokenizer(question, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        question = question[: max((end for _, end in asked["offset_mapping"][:_QUESTION_TOKENS]), default=0)]
        windows = self._tokenizer(
            question,
            passage,
            truncation="only_second",
            max_length=self._limit,
            stride=self._limit // 4,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        names = [name for name in self._tokenizer.model_input_names if name in windows]
        for number, offsets in enumerate(windows["offset_mapping"]):
            inputs = {name: self._torch.tensor([windows[name][number]], device=self._model.device) for name in names}
            with self._torch.inference_mode():
                out = self._model(**inputs)
            logits = self._torch.stack([out.start_logits[0], out.end_logits[0]]).double().cpu().numpy()
            check_finite(self, logits)
            inside = np.array([part == 1 for part in windows.sequence_ids(number)])
            logits[:, 1:][:, ~inside[1:]] = -np.inf
            starts, ends = softmax(logits, axis=1)
            places = np.flatnonzero(inside)
            spans = [(starts[a] * ends[b], a, b) for a in places for b in places if 0 <= b - a < _SPAN_TOKENS]
            for probability, first, last in sorted(spans, key=lambda span: -span[0])[:MAX_FACTOID_ANSWERS]:
                if text := passage[offsets[first][0] : offsets[last][1]].strip():
                    yield text, float(probability)
