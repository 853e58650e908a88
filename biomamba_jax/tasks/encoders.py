"""Heads on third-party encoders, such as BioBERT: used like our own, computed by transformers.

Texts are tokenized word by word as for our models, and a word's label sits on its last token. A text that is longer
than an encoder's positions is read in windows for entities; else it is cut, as in training.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from biomamba_jax.config.heads import HeadConfig, HeadKind
from biomamba_jax.data.examples import windows
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json
from biomamba_jax.interop.configs import HF_TYPES
from biomamba_jax.interop.heads import PROBLEM_TYPES, auto_class, transformers_settings
from biomamba_jax.tasks.annotate import HeadModel
from biomamba_jax.tasks.architectures import architecture_of
from biomamba_jax.tasks.padding import by_length
from biomamba_jax.tasks.pretrained import UNUSED, load_pretrained, padded_inputs, reserved_positions

_KINDS: tuple[HeadKind, ...] = ("token_classifier", "span", "classifier")
"""Kinds of heads, of which `auto_class` gives the ending of an architecture."""
_NEVER = -1e30
"""Logit of a token that was not read."""


def stated_kind(folder: Path) -> HeadKind | None:
    """Return the kind of head of an encoder's folder; None if it has none, or is one of our models."""
    path = folder / "config.json"
    raw = read_json(path) if path.exists() else {}
    if str(raw.get("model_type", "mamba")) in HF_TYPES:
        return None
    kind = next((each for each in _KINDS if architecture_of(folder).endswith(f"For{auto_class(each)}")), None)
    if kind != "classifier":
        return kind
    of_problem = {problem: of for of, problem in PROBLEM_TYPES.items()}
    unstated = "regression" if len(raw.get("id2label") or "..") == 1 else kind  # as transformers' classes take it
    return of_problem.get(str(raw.get("problem_type")), unstated)


class EncoderTokenizer:
    """A tokenizer of transformers with the methods that annotated texts are encoded by."""

    def __init__(self, key: str, tokenizer: Any):
        around = tokenizer("")["input_ids"]
        if len(around) != 2:
            raise UserError(f"{key}: its tokenizer does not add two special tokens, as an encoder's does")
        self.library = tokenizer
        self.start_id, self.end_id = around
        self.padding_id = tokenizer.pad_token_id or 0

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenize texts; a question, which alone ends with a line end, gets the token that ends a sentence."""
        if not texts:
            return []
        plain = [text.removesuffix("\n") for text in texts]
        found = self.library(plain, add_special_tokens=False, verbose=False)["input_ids"]
        return [[*ids, self.end_id] if text.endswith("\n") else ids for text, ids in zip(texts, found, strict=True)]


class EncoderHeadModel(HeadModel):
    """A third-party encoder with a head.

    Args:
      key: the model's name in errors.
      folder: a Hugging Face folder.
      head: a head to train, instead of the folder's own.
      dtype: compute dtype.
      rows: texts that are computed together.

    Raises:
      UserError: the [hf] extra is not installed, or the folder lacks weights other than those of a head to train.
    """

    def __init__(
        self, key: str, folder: Path, head: HeadConfig | None = None, dtype: str | None = None, *, rows: int = 8
    ):
        kind = head.kind if head else stated_kind(folder)
        assert kind is not None

        def needs(model: Any, weight: str) -> bool:
            """Return True for a weight of the encoder: a new head is drawn at random, and what leads to it."""
            return head is None or (UNUSED not in weight and weight.startswith(f"{model.base_model_prefix}."))

        settings = transformers_settings(head) if head else {}
        self.torch, self.model, library = load_pretrained(
            key, folder, lambda: f"AutoModelFor{auto_class(kind)}", dtype, needs=needs, **settings
        )
        if getattr(self.model.config, "pad_token_id", None) is None:  # GPT-2's classes then refuse several rows
            self.model.config.pad_token_id = library.pad_token_id or 0
        names = self.model.config.id2label
        labels = ("start", "end") if kind == "span" else tuple(names[index] for index in sorted(names))
        try:
            head = head or HeadConfig(kind, labels)
        except UserError as error:
            raise UserError(f"{key}: {folder / 'config.json'}: id2label: {error}") from None
        super().__init__(key, head, EncoderTokenizer(key, library))
        self._rows = rows
        self.limit = int(self.model.config.max_position_embeddings - reserved_positions(self.model))
        """Tokens of a row at most, special ones included."""

    def inputs(self, rows: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Return the model's inputs for rows of ids, padded on the right."""
        found = padded_inputs(self.torch, rows, self.tokenizer.padding_id)
        if self.head.kind == "span" and "token_type_ids" in self.tokenizer.library.model_input_names:
            ends = (found["input_ids"] == self.tokenizer.end_id).long()
            found["token_type_ids"] = ((ends.cumsum(1) - ends) > 0).long()  # 0 up to the end of the question
        return found

    def logits(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Return float32 logits: [tokens K] of a text whose words are predicted, [1 K] of any other."""
        parts = [[ids[part] for part in windows(len(ids), self.limit - 2, self.head)] for ids in texts]
        found = iter(by_length(list(chain.from_iterable(parts)), self._rows, self._read))
        results = []
        for ids, of_text in zip(texts, parts, strict=True):
            read = np.concatenate([next(found) for _ in of_text])
            unread = np.full((len(ids) - len(read) if self.head.of_words else 0, read.shape[1]), _NEVER, np.float32)
            results.append(np.concatenate([read, unread]))
        return results

    def _read(self, rows: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
        """Yield the logits of each row of a batch."""
        with self.torch.inference_mode():
            inputs = self.inputs([[self.tokenizer.start_id, *row, self.tokenizer.end_id] for row in rows])
            out = self.model(**{name: value.to(self.model.device) for name, value in inputs.items()})
        logits = self.torch.stack([out.start_logits, out.end_logits], -1) if self.head.kind == "span" else out.logits
        for row, own in zip(rows, logits.float().cpu().numpy(), strict=True):
            yield own[1 : len(row) + 1] if self.head.of_words else own[None]
