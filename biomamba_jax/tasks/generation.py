"""Text generation: one pass over the prompts, then the whole decoding loop in one compiled program.

Prompts of unequal length are left-padded; the padding is another segment, whose state the model resets where the prompt
begins. Lengths are rounded up to a few sizes, so that few programs are compiled. The loop exits early when every row
has ended, or every few tokens where the host must see the text in between: to stream it, or to find stop strings.
"""

import dataclasses
import itertools
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from biomamba_jax.config.generate import Sampling
from biomamba_jax.data.records import batched
from biomamba_jax.data.tokenizer import Tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.model.decode import InferenceModel, LayerStates
from biomamba_jax.ops.array_typing import Array, Float, Int, UInt
from biomamba_jax.tasks.padding import bucket_length, bucket_rows, pad_left
from biomamba_jax.tasks.sampling import Steps, Values, next_tokens

FinishReason = Literal["eos", "stop", "length"]
ShouldStop = Callable[[list[list[int]], list[bool]], list[bool]]
OnText = Callable[[int, str], None]

_CHECK_EVERY = 16
"""Tokens between two searches for stop strings."""
_STREAM_EVERY = 4
"""Tokens between two pieces of streamed text."""
_DECODE_CONTEXT = 16
"""Final tokens of the prompt that new tokens are detokenized together with."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """A prompt and its continuation; `str` of one is the text."""

    prompt: str
    """The prompt as it was given."""
    text: str
    """The continuation, without the stop string."""
    tokens: list[int]
    """Generated ids, without the end-of-text token; those that spell a stop string are included."""
    finish_reason: FinishReason
    """Reason that the text ended: the end-of-text token, a stop string, or max_new_tokens."""

    def __str__(self) -> str:
        return self.text


class Generator:
    """Continues prompts with a model and its tokenizer.

    Args:
      model: the model.
      tokenizer: its tokenizer; only `decode` works without one.
      name: the model's name in errors.

    Raises:
      UserError: the tokenizer has ids that the model does not have.
    """

    def __init__(self, model: InferenceModel, tokenizer: Tokenizer | None = None, name: str = "the model"):
        self.model, self._tokenizer, self.name = model, tokenizer, name
        known = model.config.known_vocab
        if tokenizer is not None and tokenizer.vocab_size > known:
            raise UserError(
                f"{tokenizer.path}: has {tokenizer.vocab_size} ids, the model {known}; "
                "give the tokenizer that the model was trained with"
            )
        self.vocab_size = known if tokenizer is None else tokenizer.vocab_size
        """Ids from here on are never generated."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
          UserError: the model has none.
        """
        if self._tokenizer is None:
            raise UserError(f"{self.name}: has no tokenizer.json or tokenizer.model; put the model's one there")
        return self._tokenizer

    def __call__(
        self,
        prompts: Iterable[str],
        sampling: Sampling,
        *,
        batch_size: int = 8,
        on_text: OnText | None = None,
    ) -> Iterator[Generation]:
        """Continue each prompt, in order; prompts are read as they are needed.

        Args:
          prompts: texts to continue.
          sampling: how tokens are chosen and when to stop.
          batch_size: prompts that are decoded together.
          on_text: called with a prompt's index and each new piece of its text as it is generated.

        Yields:
          The continuation of each prompt.

        Raises:
          UserError: the model has no tokenizer, or its logits are NaN.
        """
        repeats: dict[str, Iterator[int]] = defaultdict(itertools.count)
        for number, batch in enumerate(batched(prompts, batch_size)):
            ids = self.tokenizer.encode_prompts(batch)
            detokenizers = [Detokenizer(self.tokenizer, prompt, sampling.stop) for prompt in ids]
            update = partial(_detokenize, detokenizers, on_text, number * batch_size)
            rows = self.decode(
                ids,
                sampling,
                eos_id=self.tokenizer.eos_id,
                occurrences=[next(repeats[prompt]) for prompt in batch],
                should_stop=update if on_text or sampling.stop else None,
                check_every=_STREAM_EVERY if on_text else _CHECK_EVERY,
            )
            update(rows, [True] * len(rows))
            for prompt, tokens, detokenizer in zip(batch, rows, detokenizers, strict=True):
                reason: FinishReason = "length" if len(tokens) == sampling.max_new_tokens else "eos"
                if detokenizer.stopped_at is not None:
                    tokens, reason = tokens[: detokenizer.stopped_at], "stop"
                yield Generation(prompt, detokenizer.text, tokens, reason)

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        eos_id: int | None = None,
        occurrences: Sequence[int] | None = None,
        should_stop: ShouldStop | None = None,
        check_every: int = _CHECK_EVERY,
    ) -> list[list[int]]:
        """Continue prompts of token ids in one batch.

        Args:
          prompts: token ids of each prompt.
          sampling: how tokens are chosen; its stop strings are not used here.
          eos_id: the token that ends a row; None: every row gets max_new_tokens.
          occurrences: how often each prompt has been continued before, for another sample; None: never.
          should_stop: called every `check_every` tokens with the tokens so far and whether each row has ended; returns
            which rows to end.
          check_every: tokens between two calls of `should_stop`.

        Returns:
          The new ids of each prompt, without `eos_id`.

        Raises:
          UserError: an empty prompt, an id that the model does not have, or NaN logits.
        """
        if not prompts:
            return []
        known = self.model.config.known_vocab
        for prompt in prompts:
            if not len(prompt) or min(prompt) < 0 or max(prompt) >= known:
                raise UserError(f"a prompt must have ids in 0..{known - 1}, and at least one; it has {list(prompt)}")
        count, limit = len(prompts), sampling.max_new_tokens
        steps, values = Steps.of(sampling), Values.of(sampling)
        logits, states = prefill(self.model, *pad_left(prompts))
        batch = logits.shape[0]
        rows = _DecodeState(
            count=jnp.int32(0),
            tokens=jnp.zeros((batch, bucket_length(limit)), jnp.int32),
            ended=jnp.arange(batch) >= count,  # rows of padding
            seen=_seen(prompts, self.model.config.padded_vocab) if sampling.repetition_penalty != 1 else None,
            keys=_prompt_keys(prompts, occurrences or [0] * count, sampling.seed),
            states=states,
            eos_id=jnp.int32(-1 if eos_id is None else eos_id),
            vocab_size=jnp.int32(self.vocab_size),
        )
        rows = _append_token(rows, logits, values, steps)
        done = 1
        while True:
            tokens, ended = np.asarray(rows.tokens)[:count, :done], np.asarray(rows.ended)[:count]
            new = [row[: row.index(eos_id)] if eos_id in row else row for row in tokens.tolist()]
            if any(token < 0 for row in new for token in row):
                raise UserError(
                    f"{self.name}: its logits are NaN in {self.model.weight_dtype}: the weights are damaged or "
                    "overflow; try dtype float32, or another checkpoint"
                )
            if done >= limit or ended.all():
                return new
            if should_stop is not None:
                stopped = np.array(should_stop(new, ended.tolist()))
                rows = dataclasses.replace(rows, ended=rows.ended.at[:count].set(ended | stopped))
            until = limit if should_stop is None else min(limit, done + check_every)
            rows = _decode_until(self.model, rows, jnp.int32(until), values, steps)
            done = int(rows.count)


@struct.dataclass
class _DecodeState:
    """Carry of the decoding loop."""

    count: Int[Array, ""]
    """New tokens so far, the same for all rows."""
    tokens: Int[Array, "B capacity"]
    """The new tokens; arbitrary after a row has ended."""
    ended: Array
    """[B] bool."""
    seen: Array | None
    """[B V] bool, tokens that the repetition penalty applies to."""
    keys: Array
    """[B] random keys; that of the n-th token is folded with n."""
    states: LayerStates
    """Recurrent states after the last token."""
    eos_id: Int[Array, ""]
    """Token that ends a row; -1: none."""
    vocab_size: Int[Array, ""]
    """Ids from here on are never generated."""


@jax.jit
def prefill(
    model: InferenceModel, tokens: Int[Array, "B L"], segment_ids: Int[Array, "B L"]
) -> tuple[Float[Array, "B V"], LayerStates]:
    """Run the model over left-padded prompts; return the logits of the first new token and the recurrent states."""
    hidden, states = model.hidden(tokens, None, segment_ids)
    return model.logits(hidden[:, -1]), states


@partial(jax.jit, static_argnames=("steps",), donate_argnames=("rows",))
def _append_token(rows: _DecodeState, logits: Array, values: Values, steps: Steps) -> _DecodeState:
    logits = jnp.where(jnp.arange(logits.shape[1]) < rows.vocab_size, logits, -jnp.inf)
    keys = jax.vmap(jax.random.fold_in, (0, None))(rows.keys, rows.count)
    token = next_tokens(logits, rows.seen, keys, values, steps)
    return dataclasses.replace(
        rows,
        count=rows.count + 1,
        tokens=jax.lax.dynamic_update_slice(rows.tokens, token[:, None], (0, rows.count)),
        ended=rows.ended | (token == rows.eos_id) | (token < 0),
        seen=None if rows.seen is None else rows.seen.at[jnp.arange(token.size), token].set(True),
    )


@partial(jax.jit, static_argnames=("steps",), donate_argnames=("rows",))
def _decode_until(
    model: InferenceModel, rows: _DecodeState, until: Int[Array, ""], values: Values, steps: Steps
) -> _DecodeState:
    """Append tokens until there are `until` of them or every row has ended."""

    def step(rows: _DecodeState) -> _DecodeState:
        last = jax.lax.dynamic_slice_in_dim(rows.tokens, rows.count - 1, 1, axis=1)
        hidden, states = model.hidden(last, rows.states)
        return _append_token(dataclasses.replace(rows, states=states), model.logits(hidden[:, 0]), values, steps)

    return jax.lax.while_loop(lambda rows: (rows.count < until) & ~rows.ended.all(), step, rows)


def _seen(prompts: Sequence[Sequence[int]], vocabulary: int) -> Array:
    """Return bool [B V]: the tokens of each prompt."""
    seen = np.zeros((bucket_rows(len(prompts)), vocabulary), bool)
    for row, prompt in enumerate(prompts):
        seen[row, np.asarray(prompt)] = True
    return jnp.asarray(seen)


def _prompt_keys(prompts: Sequence[Sequence[int]], occurrences: Sequence[int], seed: int) -> Array:
    """Return a random key for each row that depends only on the seed, the prompt and how often it occurred before."""
    columns = np.zeros((2, bucket_rows(len(prompts))), np.uint32)
    columns[:, : len(prompts)] = [zlib.crc32(np.asarray(prompt, "<i4").tobytes()) for prompt in prompts], occurrences
    return _fold_keys(jax.random.key(seed), *columns)


@jax.jit
def _fold_keys(root: Array, checksums: UInt[Array, " B"], occurrences: UInt[Array, " B"]) -> Array:
    fold = jax.vmap(jax.random.fold_in)
    return fold(jax.vmap(jax.random.fold_in, (None, 0))(root, checksums), occurrences)


class Detokenizer:
    """Incremental detokenizer of one growing row, which also finds its first stop string.

    Args:
      tokenizer: the row's tokenizer.
      prompt: token ids before the row.
      stop: strings that end the text.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
        # Decoded together with the prompt: some tokenizers drop a space at the beginning of a text.
        self._decode, self._context = tokenizer.decode, list(prompt[-_DECODE_CONTEXT:])
        self._start = len(self._decode(self._context))
        self._stop = stop
        self._searched = 0
        self.text = ""
        """Text that no further token changes."""
        self.stopped_at: int | None = None
        """Number of tokens that spell the text up to the end of the first stop string; None before there is one."""

    def update(self, tokens: list[int], ended: bool) -> str:
        """Take all tokens so far and return the new text.

        Until the row has `ended`, text that may still change is held back: an incomplete character or stop string.
        """
        if self.stopped_at is not None:
            return ""
        text = self._decode_after_prompt(tokens)
        if any(stop in text for stop in self._stop):
            self.stopped_at = next(
                count
                for count in range(self._searched, len(tokens) + 1)
                if any(stop in self._decode_after_prompt(tokens[:count]) for stop in self._stop)
            )
            text = truncate_at_stop(text, self._stop)
        elif not ended:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)]
        self._searched = len(tokens)
        new, self.text = text[len(self.text) :], text
        return new

    def _decode_after_prompt(self, tokens: list[int]) -> str:
        return self._decode([*self._context, *tokens])[self._start :]


def _detokenize(
    detokenizers: Sequence[Detokenizer], on_text: OnText | None, first: int, rows: list[list[int]], ended: list[bool]
) -> list[bool]:
    """Stream the new text of each row of a batch whose first prompt has index `first`; return which rows to stop."""
    for index, (detokenizer, tokens) in enumerate(zip(detokenizers, rows, strict=True)):
        piece = detokenizer.update(tokens, ended[index])
        if on_text is not None and piece:
            on_text(first + index, piece)
    return [detokenizer.stopped_at is not None for detokenizer in detokenizers]


def truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return `text` before the stop string that is completed first, the longest of several; all of it without one.

    Not the one that begins first: text that is searched as it is generated has ended before that one is complete.
    """
    found = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    return text[: sum(min(found))] if found else text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest prefix of `stop` that `text` ends with."""
    return next(size for size in range(min(len(stop), len(text)), -1, -1) if text.endswith(stop[:size]))
