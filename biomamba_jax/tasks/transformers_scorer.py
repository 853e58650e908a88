"""Scores text with other projects' causal and masked language models, run by transformers on PyTorch.

A causal model with a limited number of positions reads a long document in windows that overlap by half, so that each
token is predicted from at least half a window. A masked model gives pseudo-log-likelihoods (Salazar et al. 2020, arXiv
1910.14659): each token is masked in turn and predicted from the text on both sides. They are not probabilities of the
text, are lower than a causal model's by their nature, and are labelled wherever they are shown. The visible pieces of a
word give away the masked one, so PLL-word-l2r (Kauf and Ivanova 2023, arXiv 2305.10588), which masks the rest of the
word too, is shown next to it.

A model is scored by the weights that its folder holds. transformers draws a missing head at random; such a folder is
refused.
"""

import importlib
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biomamba_jax.config import EvaluateConfig
from biomamba_jax.data.records import batched
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json
from biomamba_jax.tasks.architectures import check_architecture
from biomamba_jax.tasks.generation import truncate_at_stop
from biomamba_jax.tasks.pretrained import load_pretrained, padded_inputs, reserved_positions
from biomamba_jax.tasks.scoring import (
    Continuation,
    DocumentsScore,
    ModelFacts,
    Request,
    Scorer,
    Tokens,
    check_finite,
    encode_requests,
)

_MAX_WINDOW = 4096
"""Window of a model without a limit on positions."""
_CAUSAL = 1e-5
"""Change of earlier logits by the last token, relative to the change of its own, from which a model is not causal."""


def _is_masked(architecture: str, model_type: str, is_decoder: bool, auto: Any) -> bool:
    """Return True for a masked model; where the architecture does not tell, if transformers knows it as one."""
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return False
    known = model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder
    return known or architecture.endswith("ForMaskedLM")


def load(name: str, folder: Path, config: EvaluateConfig) -> Scorer:
    """Load a Hugging Face folder as a causal or masked language model, by its architecture and weights.

    Args:
      name: the model's name in the config.
      folder: the model's folder.
      config: batch size and dtype.

    Raises:
      UserError: the extra is not installed, transformers cannot load the folder, or it lacks a weight.
    """
    architecture = check_architecture(name, folder, config)

    def is_masked() -> bool:
        settings = read_json(folder / "config.json")
        auto = importlib.import_module("transformers.models.auto.modeling_auto")
        return _is_masked(architecture, settings["model_type"], bool(settings.get("is_decoder")), auto)

    def kind() -> str:
        return "AutoModelForMaskedLM" if is_masked() else "AutoModelForCausalLM"

    head = "a trained language-model head"
    loaded = load_pretrained(f"models.{name}", folder, kind, config.dtype, holds=head)
    return (_Masked if is_masked() else _Causal)(name, folder, *loaded, config.batch_size)


class TransformersModel:
    """A model that transformers runs; base of the scorers and of `span_reader`."""

    def __init__(self, name: str, folder: Path, torch: Any, model: Any, tokenizer: Any, batch_size: int):
        self._torch, self._model, self._tokenizer, self._batch_size = torch, model, tokenizer, batch_size
        limit = getattr(model.config, "max_position_embeddings", None) or 0  # XLNet's is -1
        self._limit = (min(int(limit), _MAX_WINDOW) if limit > 0 else _MAX_WINDOW) - reserved_positions(model)
        self._vocabulary = max(tokenizer.get_vocab().values()) + 1  # rows of the head from here on are padding
        self._rows = model.get_input_embeddings().weight.shape[0]
        if self._vocabulary > self._rows:
            raise UserError(
                f"models.{name}: the tokenizer of {folder} has {self._vocabulary} ids, but the model's embedding only "
                f"{self._rows} rows; the two do not belong together"
            )
        self.padding_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._name, self._folder = name, folder
        self.documents_by_word: DocumentsScore | None = None

    def _facts(self, kind: Any, context: str) -> ModelFacts:
        return ModelFacts(
            name=self._name,
            path=str(self._folder),
            kind=kind,
            run_by="transformers",
            parameters=sum(p.numel() for p in self._model.parameters()),
            tokenizer=f"{type(self._tokenizer).__name__} ({len(self._tokenizer):,} ids)",
            context=context,
            dtype=str(self._model.dtype).removeprefix("torch."),
        )

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """See `scoring.Scorer`."""
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def spell(self, texts: Sequence[str]) -> list[str]:
        """See `scoring.Scorer`."""
        unknown = self._tokenizer.unk_token_id
        known = [[token for token in ids if token != unknown] for ids in self.encode(texts)]
        return [self._tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in known]

    def _logits(self, rows: Sequence[Sequence[int]]) -> Iterator[Any]:
        """Yield the float32 logits [tokens, ids] of each row of at most `limit` tokens; batches are right-padded."""
        for batch in batched(rows, self._batch_size):
            inputs = padded_inputs(self._torch, batch, self.padding_id)
            with self._torch.inference_mode():
                logits = self._model(**{name: value.to(self._model.device) for name, value in inputs.items()}).logits
            for row, values in zip(batch, logits, strict=True):
                yield values[: len(row), : self._vocabulary].float()


class _Causal(TransformersModel):
    """A `scoring.Scorer`."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        tokenizer = self._tokenizer
        self._prefix: Tokens = tokenizer("")["input_ids"][:1]  # special token before a text; GPT-2's has none
        starts = [*self._prefix, tokenizer.eos_token_id, tokenizer.bos_token_id]  # as `data.special_tokens`
        self._start: Tokens = [token for token in starts if token is not None][:1]
        if not self._start:
            raise UserError(f"models.{self._name}: the tokenizer of {self._folder} has no bos and no eos to begin with")
        self._end: Tokens = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.ends_documents = bool(self._end)
        self._set_greedy()
        self._require_causal()
        self.facts = self._facts("causal", f"up to {self._limit:,} tokens, at least half of them")

    def _require_causal(self) -> None:
        """Refuse a model that sees the tokens after the one it predicts, as BertLMHeadModel without is_decoder does."""
        first, *rest = np.linspace(0, self._vocabulary - 1, min(8, self._limit), dtype=int).tolist()
        # Each by itself: the same numbers in the same order, of which a mask adds exact zeros.
        one, other = (next(self._logits([[*rest, last]])) for last in (first, rest[-1]))
        changed = (one - other).abs().amax(-1)  # by another last token
        if float(changed[:-1].max()) > _CAUSAL * float(changed[-1]):
            kind = type(self._model).__name__
            raise UserError(
                f"models.{self._name}: {self._folder} sees the tokens that it is to predict ({kind} is not a causal "
                "model as configured), so it gives no likelihood of a text; leave it out"
            )

    def _encode_context(self, texts: Sequence[str]) -> list[Tokens]:
        return [[*self._prefix, *ids] or self._start for ids in self.encode(texts)]

    def documents(self, texts: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """See `scoring.Scorer`."""
        for block in batched(sorted(range(len(texts)), key=lambda index: len(texts[index])), 64 * self._batch_size):
            rows = [[*self._start, *ids, *self._end] for ids in self.encode([texts[index] for index in block])]
            for place, nats in self.rows(rows):
                yield block[place], nats

    def rows(self, rows: Sequence[Tokens]) -> Iterator[tuple[int, np.ndarray]]:
        """See `scoring.Scorer`."""
        windows = [(index, *window) for index, ids in enumerate(rows) for window in _windows(len(ids), self._limit)]
        nats = [np.zeros(max(0, len(ids) - 1)) for ids in rows]
        inputs = [rows[index][begin:end] for index, begin, _, end in windows]
        for (index, begin, new, end), row, logits in zip(windows, inputs, self._logits(inputs), strict=True):
            logp = self._logprobs(logits[:-1], row[1:])
            nats[index][new - 1 : end - 1] = -logp[new - begin - 1 :]
        yield from enumerate(nats)

    def _logprobs(self, logits: Any, targets: Sequence[int]) -> np.ndarray:
        """Return the log probability of each target as float64."""
        wanted = self._torch.tensor(targets, device=logits.device)
        nats = self._torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        return -nats.double().cpu().numpy()

    def continuations(self, requests: Sequence[Request]) -> list[list[Continuation]]:
        """See `scoring.Scorer`. Continuations that differ in their last token alone share one pass."""
        jobs = [
            [(tuple([*context, *ids[:-1]][-self._limit :]), tuple(ids[-self._limit :])) for ids in texts]
            for context, texts in encode_requests(requests, self.encode, self._encode_context)
        ]
        wanted: dict[tuple[int, ...], set[tuple[int, ...]]] = defaultdict(set)
        for inputs, ids in itertools.chain(*jobs):
            wanted[inputs].add(ids)
        rows = sorted(wanted, key=len)
        scored = {}
        for inputs, logits in zip(rows, self._logits(rows), strict=True):
            for ids in wanted[inputs]:
                scored[inputs, ids] = self._continuation(logits[len(logits) - len(ids) :], ids)
        return [[scored[job] for job in of_request] for of_request in jobs]

    def _continuation(self, logits: Any, ids: tuple[int, ...]) -> Continuation:
        if not ids:  # an empty continuation is certain
            return Continuation((), True)
        return Continuation(tuple(self._logprobs(logits, ids).tolist()), logits.argmax(-1).tolist() == list(ids))

    def _set_greedy(self) -> None:
        """Replace the folder's generation settings (beams, penalties), the defaults of every call; keep its eos."""
        own = self._model.generation_config
        ends = self._tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
        self._model.generation_config = type(own)(
            do_sample=False,
            num_beams=1,
            eos_token_id=ends,
            pad_token_id=self.padding_id,
            suppress_tokens=list(range(self._vocabulary, self._rows)) or None,
            return_dict_in_generate=True,
            output_logits=True,
        )

    def generate(self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """See `scoring.Scorer`. One prompt at a time: not every model supports left padding."""
        texts = []
        for ids in self._encode_context([prompt.rstrip() for prompt in prompts]):
            ids = ids[-max(1, self._limit - max_new_tokens) :]
            tensor = self._torch.tensor([ids], device=self._model.device)
            with self._torch.inference_mode():
                found = self._model.generate(
                    input_ids=tensor, attention_mask=self._torch.ones_like(tensor), max_new_tokens=max_new_tokens
                )
            check_finite(self, [float(logits[0, : self._vocabulary].max()) for logits in found.logits])
            text = self._tokenizer.decode(found.sequences[0, len(ids) :], skip_special_tokens=True)
            texts.append(truncate_at_stop(text, stop))
        return texts


class _Masked(TransformersModel):
    """A `scoring.Scorer` of pseudo-log-likelihoods."""

    ends_documents = False

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._mask = self._tokenizer.mask_token_id
        around = self._tokenizer("")["input_ids"]  # [CLS] and [SEP], or their equivalents
        if self._mask is None or len(around) != 2:
            raise UserError(f"models.{self._name}: the tokenizer of {self._folder} has no mask or no special tokens")
        self._first, self._last = around
        self._room = self._limit - 2
        self.documents_by_word = self._documents_by_word if self._tokenizer.is_fast else None
        self.facts = self._facts("masked", f"both sides, windows of {self._room:,} tokens")

    def _pseudo(self, ids: Tokens, places: Sequence[int], words: Sequence[int | None] = ()) -> Continuation:
        """Score the tokens at `places`, each masked, with the rest of its word if `words` gives each token's word."""
        hidden = [
            {place, *(i for i in range(place + 1, len(words)) if words[i] == words[place] is not None)}
            for place in places
        ]
        rows = [
            [self._first, *(self._mask if i in masked else token for i, token in enumerate(ids)), self._last]
            for masked in hidden
        ]
        logprobs, greedy = [], True
        for place, logits in zip(places, self._logits(rows), strict=True):
            at = self._torch.log_softmax(logits[place + 1], -1)
            logprobs.append(float(at[ids[place]]))
            greedy &= int(at.argmax()) == ids[place]
        return Continuation(tuple(logprobs), greedy)

    def documents(self, texts: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """See `scoring.Scorer`. Windows do not overlap."""
        for index, ids in enumerate(self.encode(texts)):
            found = [self._pseudo(window, range(len(window))).logprobs for window in batched(ids, self._room)]
            yield index, -np.array([logprob for window in found for logprob in window])

    def _documents_by_word(self, texts: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """Score documents as `documents` does, by PLL-word-l2r: with a token the rest of its word is masked."""
        for index, text in enumerate(texts):
            encoding = self._tokenizer(text, add_special_tokens=False, verbose=False)
            windows = zip(
                *(batched(each, self._room) for each in (encoding["input_ids"], encoding.word_ids())), strict=True
            )
            found = [self._pseudo(ids, range(len(ids)), words).logprobs for ids, words in windows]
            yield index, -np.array([logprob for window in found for logprob in window])

    def continuations(self, requests: Sequence[Request]) -> list[list[Continuation]]:
        """See `scoring.Scorer`. The rest of the continuation is visible while one of its tokens is masked."""
        results: list[list[Continuation]] = []
        for context, texts in encode_requests(requests, self.encode, self.encode):
            results.append([])
            for targets in texts:
                ids = [*context, *targets][-self._room :]
                results[-1].append(self._pseudo(ids, range(max(0, len(ids) - len(targets)), len(ids))))
        return results

    def rows(self, rows: Sequence[Tokens]) -> Iterator[tuple[int, np.ndarray]]:
        """Refuse: a masked model predicts no token from the tokens before it alone.

        Raises:
          UserError: always.
        """
        raise UserError(
            f"models.{self._name}: the published protocols cannot evaluate a masked language model; leave it out"
        )

    def generate(self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """Refuse: a masked model does not generate.

        Raises:
          UserError: always.
        """
        raise UserError(
            f"models.{self._name}: a masked language model cannot generate text; set method likelihood, and "
            "bioasq.types [yesno]"
        )


def _windows(length: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """Yield (begin, first new token, end) of overlapping windows over a document with its start token.

    Every token but the first is new in exactly one window, and is predicted there from at least half a window or from
    all tokens before it.
    """
    new = 1
    while new < length:
        end = min(length, limit if new == 1 else new + limit - limit // 2)
        begin = max(0, end - limit)
        yield begin, new, end
        new = end
