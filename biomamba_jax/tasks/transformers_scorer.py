"""Scores text with other people's models, run by transformers on torch: causal and masked language models of a folder.

The one place of the package that imports torch, and only when such a model is asked for (the [hf] extra).

A causal model that knows only so many positions reads a long document in windows that overlap by half, so that each
token is predicted from at least half a window. A masked model gives pseudo-log-likelihoods (Salazar et al. 2020, arXiv
1910.14659): each token is masked in turn and predicted from the text on both sides. They are no probabilities of the
text, are lower than a causal model's by their nature, and are labelled wherever they are shown.
"""

import importlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from biomamba_jax.config import EvaluateConfig
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json
from biomamba_jax.tasks.generation import before_stop
from biomamba_jax.tasks.scoring import (
    Continuation,
    ModelFacts,
    Request,
    Scorer,
    check_finite,
    move_spaces,
    split_continuation,
)

_MOST = 4096
"""Positions that a model without a limit is given at one time."""

Row = list[int]


def load(name: str, folder: Path, config: EvaluateConfig) -> Scorer:
    """The scorer of a Hugging Face folder: masked if its architecture is one of ...ForMaskedLM, else causal.

    Raises:
      UserError: the extra is not installed, or transformers cannot load the folder.
    """
    try:
        torch, transformers = (importlib.import_module(package) for package in ("torch", "transformers"))
    except ImportError as error:
        raise UserError(
            f"models.{name}: {folder} is run by transformers, and {error.name} is not installed: "
            "pip install 'biomamba-jax[hf]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    architectures = read_json(folder / "config.json").get("architectures") or [""]
    masked = architectures[0].endswith("ForMaskedLM")
    kind = transformers.AutoModelForMaskedLM if masked else transformers.AutoModelForCausalLM
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, config.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    try:  # local_files_only: what is evaluated is this folder, whatever its config names
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = kind.from_pretrained(folder, local_files_only=True, dtype=dtype).to(device).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"models.{name}: transformers cannot load {folder} ({reason})") from None
    return (_Masked if masked else _Causal)(name, folder, torch, model, tokenizer, config.batch_size)


class _Model:
    """What both kinds share."""

    def __init__(self, name: str, folder: Path, torch: Any, model: Any, tokenizer: Any, batch_size: int):
        self._torch, self._model, self._tokenizer, self._batch_size = torch, model, tokenizer, batch_size
        limit = getattr(model.config, "max_position_embeddings", None)
        self._limit = min(int(limit), _MOST) if limit else _MOST
        self._limit -= _reserved_positions(model)
        self._vocabulary = max(tokenizer.get_vocab().values()) + 1  # rows of the head behind it stand for no token
        self._rows = model.get_input_embeddings().weight.shape[0]
        if self._vocabulary > self._rows:
            raise UserError(
                f"models.{name}: the tokenizer of {folder} has {self._vocabulary} ids, but the model's embedding only "
                f"{self._rows} rows; the two do not belong together"
            )
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._name, self._folder = name, folder

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

    def encode(self, texts: Sequence[str]) -> list[Row]:
        """See `scorers.Scorer`."""
        if not texts:
            return []
        return self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def _logits(self, rows: Sequence[Row]) -> Iterator[tuple[Row, Any]]:
        """Each row, at most `limit` long, with its float32 logits [tokens, ids]; padding stands behind shorter rows."""
        torch = self._torch
        for start in range(0, len(rows), self._batch_size):
            batch = rows[start : start + self._batch_size]
            longest = max(map(len, batch))
            ids = torch.tensor([[*row, *[self._pad] * (longest - len(row))] for row in batch])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
            with torch.inference_mode():
                logits = self._model(
                    input_ids=ids.to(self._model.device), attention_mask=mask.to(self._model.device)
                ).logits
            for row, values in zip(batch, logits, strict=True):
                yield row, values[: len(row), : self._vocabulary].float()


class _Causal(_Model):
    """See `scorers.Scorer`."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        tokenizer = self._tokenizer
        self._own: Row = tokenizer("")["input_ids"][:1]  # what it puts in front of a text; GPT-2's puts nothing there
        starts = [*self._own, tokenizer.bos_token_id, tokenizer.eos_token_id]
        self._start: Row = [token for token in starts if token is not None][:1]
        if not self._start:
            raise UserError(f"models.{self._name}: the tokenizer of {self._folder} has no bos and no eos to begin with")
        self._end: Row = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.ends_documents = bool(self._end)
        self._generate_greedily()
        limited = f"up to {self._limit:,} tokens, at least half of them"
        self.facts = self._facts("causal", limited)

    def documents(self, texts: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """See `scorers.Scorer`."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(order), 64 * self._batch_size):
            block = order[start : start + 64 * self._batch_size]
            rows = [[*self._start, *ids, *self._end] for ids in self.encode([texts[index] for index in block])]
            for place, nats in self.rows(rows):
                yield block[place], nats

    def rows(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, np.ndarray]]:
        """See `scorers.Scorer`."""
        windows = [(place, *span) for place, ids in enumerate(rows) for span in _windows(len(ids), self._limit)]
        nats = [np.zeros(max(0, len(ids) - 1)) for ids in rows]
        inputs = [list(rows[place][begin:end]) for place, begin, _, end in windows]
        for (place, begin, new, end), (row, logits) in zip(windows, self._logits(inputs), strict=True):
            logp = self._logprobs(logits[:-1], row[1:])
            nats[place][new - 1 : end - 1] = -logp[new - begin - 1 :]
        yield from enumerate(nats)

    def _logprobs(self, logits: Any, targets: Row) -> np.ndarray:
        """Float64 log probability of each target."""
        wanted = self._torch.tensor(targets, device=logits.device)
        nats = self._torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        return -nats.double().cpu().numpy()

    def continuations(self, requests: Sequence[Request]) -> list[list[Continuation]]:
        """See `scorers.Scorer`. Continuations of one token share one pass over their context."""
        requests = [move_spaces(request) for request in requests]
        contexts = [[*self._own, *ids] or self._start for ids in self.encode([r.context for r in requests])]
        pairs = [(place, text) for place, request in enumerate(requests) for text in request.continuations]
        wholes = self.encode([requests[place].context + text for place, text in pairs])
        alone = self.encode([text for _, text in pairs])
        jobs: list[tuple[int, Row, Row]] = []
        for (place, _), whole, ids in zip(pairs, wholes, alone, strict=True):
            context = contexts[place]
            targets = split_continuation([*self._own, *whole], context, ids)[-self._limit :]
            inputs = [*context, *targets[:-1]][-self._limit :]
            jobs.append((place, inputs, targets))
        rows = sorted({tuple(inputs) for _, inputs, _ in jobs}, key=len)
        by_row: dict[tuple[int, ...], list[int]] = {}
        for index, (_, inputs, _) in enumerate(jobs):
            by_row.setdefault(tuple(inputs), []).append(index)
        scored: dict[int, Continuation] = {}
        for row, logits in self._logits([list(row) for row in rows]):
            for index in by_row[tuple(row)]:
                targets = jobs[index][2]
                if not targets:
                    scored[index] = Continuation((), True)
                    continue
                last = logits[-len(targets) :]
                greedy = last.argmax(-1).tolist() == list(targets)
                scored[index] = Continuation(tuple(self._logprobs(last, targets).tolist()), greedy)
        results: list[list[Continuation]] = [[] for _ in requests]
        for index, (place, _, _) in enumerate(jobs):
            results[place].append(scored[index])
        return results

    def _generate_greedily(self) -> None:
        """Puts settings of greedy text in the place of the folder's (beams, penalties), with which transformers fills
        whatever a call leaves out; what ends a text stays."""
        own = self._model.generation_config
        ends = self._tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
        self._model.generation_config = type(own)(
            do_sample=False,
            num_beams=1,
            eos_token_id=ends,
            pad_token_id=self._pad,
            suppress_tokens=list(range(self._vocabulary, self._rows)) or None,
            return_dict_in_generate=True,
            output_logits=True,
        )

    def generate(self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """See `scorers.Scorer`. One prompt at a time, so that no model needs to know padding on the left."""
        texts = []
        for ids in self.encode(prompts):
            ids = ([*self._own, *ids] or self._start)[-max(1, self._limit - max_new_tokens) :]
            tensor = self._torch.tensor([ids], device=self._model.device)
            with self._torch.inference_mode():
                found = self._model.generate(
                    input_ids=tensor, attention_mask=self._torch.ones_like(tensor), max_new_tokens=max_new_tokens
                )
            check_finite(self, [float(logits[0, : self._vocabulary].max()) for logits in found.logits])
            text = self._tokenizer.decode(found.sequences[0, len(ids) :], skip_special_tokens=True)
            texts.append(before_stop(text, stop))
        return texts


class _Masked(_Model):
    """See `scorers.Scorer`; pseudo-log-likelihoods."""

    ends_documents = False

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._mask = self._tokenizer.mask_token_id
        around = self._tokenizer("")["input_ids"]  # [CLS] and [SEP], or what it has instead
        if self._mask is None or len(around) != 2:
            raise UserError(f"models.{self._name}: the tokenizer of {self._folder} has no mask or no special tokens")
        self._first, self._last = around
        self._room = self._limit - 2
        self.facts = self._facts("masked", f"both sides, windows of {self._room:,} tokens")

    def _pseudo(self, jobs: Iterable[tuple[Row, range]]) -> Iterator[list[Continuation]]:
        """For each row of plain tokens and range of its places, the figures of each place masked by itself."""
        for ids, places in jobs:
            rows = [[self._first, *ids[:place], self._mask, *ids[place + 1 :], self._last] for place in places]
            found = []
            for place, (_, logits) in zip(places, self._logits(rows), strict=True):
                at = self._torch.log_softmax(logits[place + 1], -1)
                found.append(Continuation((float(at[ids[place]]),), int(at.argmax()) == ids[place]))
            yield found

    def documents(self, texts: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """See `scorers.Scorer`. Windows do not overlap."""
        for index, ids in enumerate(self.encode(texts)):
            parts = [ids[start : start + self._room] for start in range(0, len(ids), self._room)]
            found = self._pseudo((part, range(len(part))) for part in parts)
            yield index, np.array([-token.total for part in found for token in part])

    def continuations(self, requests: Sequence[Request]) -> list[list[Continuation]]:
        """See `scorers.Scorer`. The rest of the continuation is visible while one of its tokens is masked."""
        results = []
        for request in map(move_spaces, requests):
            (context,) = self.encode([request.context])
            jobs = []
            for text in request.continuations:
                whole, alone = self.encode([request.context + text, text])
                targets = split_continuation(whole, context, alone)
                ids = [*context, *targets][-self._room :]
                jobs.append((ids, range(max(0, len(ids) - len(targets)), len(ids))))
            found = [(tuple(t.total for t in tokens), all(t.greedy for t in tokens)) for tokens in self._pseudo(jobs)]
            results.append([Continuation(*each) for each in found])
        return results

    def rows(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, np.ndarray]]:
        """Refused: nothing is predicted from what stands before it alone.

        Raises:
          UserError: always.
        """
        raise UserError(f"models.{self._name}: a masked language model has no place in protocol paper; leave it out")

    def generate(self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """Refused: a masked model does not write.

        Raises:
          UserError: always.
        """
        raise UserError(
            f"models.{self._name}: a masked language model cannot generate text; set method likelihood, and "
            "bioasq.types [yesno]"
        )


def _reserved_positions(model: Any) -> int:
    """Rows of the position embedding that no text reaches: RoBERTa and its kin begin to count behind the padding's."""
    found = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    ]
    return max(found, default=0)


def _windows(length: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first token that is new, end) of overlapping windows over a document with its start symbol.

    Every token but the first is new in one window, and has half a window before it there unless it stands earlier.
    """
    new = 1
    while new < length:
        end = min(length, limit if new == 1 else new + limit - limit // 2)
        begin = max(0, end - limit)
        yield begin, new, end
        new = end
