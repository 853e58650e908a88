"""Text from prompts: one pass over the prompts, then the whole loop over new tokens in one compiled program.

Prompts of unequal length lie at the right end of their rows; what is left of a prompt is another segment, whose state
the model forgets where the prompt begins. Lengths are rounded up to a few sizes, so that few programs are compiled. The
loop leaves early when every row has ended, or after some tokens where the text has to be looked at in between: to show
it as it grows, or to find strings that end it.
"""

import dataclasses
import itertools
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import struct

from biomamba_jax.data.tokenizer import Tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.model.decode import InferenceModel, LayerStates
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.tasks.sampling import Sampling, Steps, Values, next_tokens

FinishReason = Literal["eos", "stop", "length"]
Look = Callable[[list[list[int]], list[bool]], list[bool]]

_LOOK_EVERY = 16
"""Tokens between two looks for strings that end the text."""
_SHOW_EVERY = 4
"""Tokens between two pieces of text on a terminal."""
_CONTEXT = 16
"""Last tokens of the prompt that the new ones are spelled together with."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a prompt was continued with."""

    prompt: str
    text: str
    """The continuation, without what ended it."""
    tokens: list[int]
    """The ids generated, without the end-of-text token; with those of a stop string."""
    finish_reason: FinishReason
    """The end-of-text token, a stop string, or max_new_tokens."""

    def __str__(self) -> str:
        return self.text


def round_up(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: at most a third of it is in vain."""
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


class Generator:
    """Continues prompts.

    Args:
      model: the model.
      tokenizer: its tokenizer; only `decode` does without.
      name: what errors call the model.

    Raises:
      UserError: the tokenizer has ids that the model does not know.
    """

    def __init__(self, model: InferenceModel, tokenizer: Tokenizer | None = None, name: str = "the model"):
        self.model, self.tokenizer, self._name = model, tokenizer, name
        self.vocab_size = model.config.known_vocab
        """Ids from here on are never generated."""
        if tokenizer is not None:
            if tokenizer.vocab_size > self.vocab_size:
                raise UserError(
                    f"{tokenizer.path}: has {tokenizer.vocab_size} ids, the model {self.vocab_size}; "
                    "give the tokenizer that the model was trained with"
                )
            self.vocab_size = tokenizer.vocab_size

    def __call__(
        self,
        prompts: Iterable[str],
        sampling: Sampling,
        *,
        batch_size: int = 8,
        on_text: Callable[[int, str], None] | None = None,
    ) -> Iterator[Generation]:
        """Continues each prompt, `batch_size` at a time, in their order, as they come.

        Args:
          on_text: called with the index of a prompt and each new piece of its text as it grows.
        """
        remaining, first, repeats = iter(prompts), 0, Counter[str]()
        while batch := list(itertools.islice(remaining, batch_size)):
            nth = []
            for prompt in batch:
                nth.append(repeats[prompt])
                repeats[prompt] += 1
            yield from self._batch(batch, nth, first, sampling, on_text)
            first += len(batch)

    def _batch(
        self,
        prompts: list[str],
        nth: list[int],
        first: int,
        sampling: Sampling,
        on_text: Callable[[int, str], None] | None,
    ) -> list[Generation]:
        assert self.tokenizer is not None
        ids = encode_prompts(self.tokenizer, prompts)
        spellings = [Spelling(self.tokenizer, prompt, sampling.stop) for prompt in ids]

        def look(rows: list[list[int]], ended: list[bool]) -> list[bool]:
            for index, (spelling, tokens) in enumerate(zip(spellings, rows, strict=True)):
                piece = spelling.extend(tokens, ended[index])
                if on_text is not None and piece:
                    on_text(first + index, piece)
            return [spelling.stopped_at is not None for spelling in spellings]

        every = _SHOW_EVERY if on_text else _LOOK_EVERY if sampling.stop else None
        rows = self.decode(
            ids, sampling, eos_id=self.tokenizer.eos_id, nth=nth, look=look if every else None, look_every=every or 0
        )
        look(rows, [True] * len(rows))
        generations = []
        for prompt, tokens, spelling in zip(prompts, rows, spellings, strict=True):
            reason: FinishReason = "length" if len(tokens) == sampling.max_new_tokens else "eos"
            if spelling.stopped_at is not None:
                tokens, reason = tokens[: spelling.stopped_at], "stop"
            generations.append(Generation(prompt, spelling.text, tokens, reason))
        return generations

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        eos_id: int | None = None,
        nth: Sequence[int] | None = None,
        look: Look | None = None,
        look_every: int = _LOOK_EVERY,
    ) -> list[list[int]]:
        """Continues prompts of token ids, all in one batch.

        Args:
          eos_id: the token that ends a row; None: every row gets max_new_tokens.
          nth: how many times each prompt has been continued before, for another draw; left out: never.
          look: called every `look_every` tokens with the tokens so far and whether each row has ended; tells which rows
            to end.

        Returns:
          The new ids of each prompt, without `eos_id`.

        Raises:
          UserError: an empty prompt, an id that the model does not know, or a model whose logits are NaN.
        """
        if not prompts:
            return []
        for prompt in prompts:
            if not len(prompt) or min(prompt) < 0 or max(prompt) >= self.model.config.known_vocab:
                known = self.model.config.known_vocab
                raise UserError(f"a prompt must have ids in 0..{known - 1}, and at least one; it has {list(prompt)}")
        nth = nth or [0] * len(prompts)
        steps, values, limit = Steps.of(sampling), Values.of(sampling), sampling.max_new_tokens
        logits, states = prefill(self.model, *left_padded(prompts))
        batch = logits.shape[0]
        rows = _Rows(
            count=jnp.int32(0),
            tokens=jnp.zeros((batch, round_up(limit)), jnp.int32),
            ended=jnp.arange(batch) >= len(prompts),  # rows that only fill the batch
            seen=_seen(prompts, self.model.config.padded_vocab) if sampling.repetition_penalty != 1 else None,
            keys=_prompt_keys(prompts, nth, sampling.seed),
            states=states,
            eos_id=jnp.int32(-1 if eos_id is None else eos_id),
            vocab_size=jnp.int32(self.vocab_size),
        )
        rows = _choose(rows, logits, values, steps)
        done = 1
        while True:
            tokens, ended = np.asarray(rows.tokens)[: len(prompts), :done], np.asarray(rows.ended)[: len(prompts)]
            new = [_before(eos_id, row) for row in tokens.tolist()]
            if any(token < 0 for row in new for token in row):
                raise UserError(
                    f"{self._name}: its logits are NaN in {self.model.dtype}: the weights are damaged or overflow; "
                    "try dtype float32, or another checkpoint"
                )
            if done >= limit or ended.all():
                return new
            if look is not None:
                stopped = np.array(look(new, ended.tolist()))
                rows = dataclasses.replace(rows, ended=rows.ended.at[: len(prompts)].set(ended | stopped))
            until = limit if look is None else min(limit, done + look_every)
            rows = _go_on(self.model, rows, jnp.int32(until), values, steps)
            done = int(rows.count)


@struct.dataclass
class _Rows:
    """What the loop over new tokens carries."""

    count: Int[Array, ""]
    """New tokens so far, the same for all rows."""
    tokens: Int[Array, "B capacity"]
    """The new tokens; after a row has ended, whatever."""
    ended: Array
    """[B] bool."""
    seen: Array | None
    """[B V] bool, tokens that the repetition penalty falls on."""
    keys: Array
    """[B] random keys; that of the n-th token is folded with n."""
    states: LayerStates
    eos_id: Int[Array, ""]
    vocab_size: Int[Array, ""]


@jax.jit
def prefill(
    model: InferenceModel, tokens: Int[Array, "B L"], segment_ids: Int[Array, "B L"]
) -> tuple[Float[Array, "B V"], LayerStates]:
    """One pass over the prompts: logits of the first new token, and the states."""
    hidden, states = model.hidden(tokens, None, segment_ids)
    return model.logits(hidden[:, -1]), states


@partial(jax.jit, static_argnames=("steps",), donate_argnames=("rows",))
def _choose(rows: _Rows, logits: Array, values: Values, steps: Steps) -> _Rows:
    """`rows` with one more token."""
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
def _go_on(model: InferenceModel, rows: _Rows, until: Int[Array, ""], values: Values, steps: Steps) -> _Rows:
    """More tokens, until there are `until` or every row has ended."""

    def step(rows: _Rows) -> _Rows:
        last = jax.lax.dynamic_slice_in_dim(rows.tokens, rows.count - 1, 1, axis=1)
        hidden, states = model.hidden(last, rows.states)
        return _choose(dataclasses.replace(rows, states=states), model.logits(hidden[:, 0]), values, steps)

    return jax.lax.while_loop(lambda rows: (rows.count < until) & ~rows.ended.all(), step, rows)


def round_up_rows(rows: int) -> int:
    """The next power of two."""
    return 1 << (rows - 1).bit_length()


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token and segment ids [B L]: each prompt, segment 1, at the right end of its row, behind segment 0."""
    shape = round_up_rows(len(prompts)), round_up(max(map(len, prompts)))
    tokens, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, -len(prompt) :] = prompt
        segment_ids[row, -len(prompt) :] = 1
    return tokens, segment_ids


def _seen(prompts: Sequence[Sequence[int]], vocabulary: int) -> Array:
    """[B V] bool: which tokens each prompt has."""
    seen = np.zeros((round_up_rows(len(prompts)), vocabulary), bool)
    for row, prompt in enumerate(prompts):
        seen[row, np.asarray(prompt)] = True
    return jnp.asarray(seen)


def _prompt_keys(prompts: Sequence[Sequence[int]], nth: Sequence[int], seed: int) -> Array:
    """A random key for each row that depends on the seed, the prompt, and how often it came before; on nothing else."""
    sums = [zlib.crc32(np.asarray(prompt, "<i4").tobytes()) for prompt in prompts]
    filling = [0] * (round_up_rows(len(prompts)) - len(prompts))
    root = jax.random.key(seed)
    return _keys(root, jnp.array(sums + filling, jnp.uint32), jnp.array([*nth, *filling], jnp.uint32))


@jax.jit
def _keys(root: Array, checksums: Int[Array, " B"], repeats: Int[Array, " B"]) -> Array:
    fold = jax.vmap(jax.random.fold_in)
    return fold(jax.vmap(jax.random.fold_in, (None, 0))(root, checksums), repeats)


def _before(eos_id: int | None, tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(eos_id)] if eos_id in tokens else tokens


class Spelling:
    """The text of a growing row, and the first string in it that ends it.

    Attributes:
      text: what has been spelled for good.
      stopped_at: how many tokens it takes to spell the first stop string; None while there is none.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]):
        # Spelled behind the prompt: some tokenizers drop a space at the beginning of a text.
        self._decode, self._context = tokenizer.decode, list(prompt[-_CONTEXT:])
        self._start = len(self._decode(self._context))
        self._stop = stop
        self._looked_at = 0
        self.text = ""
        self.stopped_at: int | None = None

    def extend(self, tokens: list[int], ended: bool) -> str:
        """Takes all tokens so far and returns the text that is new.

        What may still change is held back until the row has `ended`: part of a character, and of a stop string.
        """
        if self.stopped_at is not None:
            return ""
        text = self._spell(tokens)
        if any(stop in text for stop in self._stop):
            self.stopped_at = next(
                count
                for count in range(self._looked_at, len(tokens) + 1)
                if any(stop in self._spell(tokens[:count]) for stop in self._stop)
            )
            text = before_stop(text, self._stop)
        elif not ended:
            text = text.rstrip("\ufffd")
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)]
        self._looked_at = len(tokens)
        new, self.text = text[len(self.text) :], text
        return new

    def _spell(self, tokens: list[int]) -> str:
        return self._decode([*self._context, *tokens])[self._start :]


def before_stop(text: str, stops: Sequence[str]) -> str:
    """`text` before the stop string that is complete first, of several the longest; all of it where there is none.

    Not the one that begins first: a text that is looked at as it grows has ended before that one is complete.
    """
    found = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
    if not found:
        return text
    end, minus_length = min(found)
    return text[: end + minus_length]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest beginning of `stop` that `text` ends with."""
    return next(size for size in range(min(len(stop), len(text)), -1, -1) if text.endswith(stop[:size]))


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of prompts, with what the model saw in front of a text in training.

    A Hugging Face tokenizer.json says so itself (GPT-NeoX's adds nothing), and reads special tokens in a prompt as
    what they mean, as transformers does. Our SentencePiece models begin each document with the end-of-text token; so
    does a prompt that is empty.
    """
    if tokenizer.path.suffix == ".json":
        library = tokenizers.Tokenizer.from_file(str(tokenizer.path))
        library.no_padding()
        library.no_truncation()
        rows = [encoding.ids for encoding in library.encode_batch(list(prompts))]
    else:
        rows = [[tokenizer.eos_id, *ids] for ids in tokenizer.encode_batch(prompts)]
    return [row or [tokenizer.eos_id] for row in rows]
