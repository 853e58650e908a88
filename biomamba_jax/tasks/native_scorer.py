"""Scores text with this package's own models.

Documents that fit into a row are packed, each as a segment; longer ones continue from row to row with the recurrent
state, so that every token is predicted from the whole document before it. A context is read once, however many
continuations it has. Rows of documents are sharded over the devices of this host.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from biomamba_jax.config.generate import Sampling
from biomamba_jax.data.records import batched
from biomamba_jax.model.decode import InferenceModel, LayerStates
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.cross_entropy import token_negative_log_likelihoods
from biomamba_jax.tasks.devices import over_rows, row_mesh, rows_of
from biomamba_jax.tasks.generation import Generator, prefill
from biomamba_jax.tasks.packed import by_document, run_packed
from biomamba_jax.tasks.padding import bucket_length, bucket_rows, pad_left, pad_right
from biomamba_jax.tasks.scoring import Continuation, DocumentsScore, ModelFacts, Request, Tokens, encode_requests

_BLOCK = 2048
"""Documents that are tokenized, packed and scored together; bounds the memory that a domain takes."""


class NativeScorer:
    """A `scoring.Scorer` that runs one of this package's models.

    Args:
      name: the model's name in the config.
      generator: the model and its tokenizer.
      path: its folder.
      window: tokens in a row.
      batch_size: rows in a batch; rounded up to a multiple of the devices.

    Raises:
      UserError: the model has no tokenizer.
    """

    ends_documents = True
    documents_by_word: DocumentsScore | None = None

    def __init__(self, name: str, generator: Generator, path: str, window: int, batch_size: int):
        self._generator, self._model, self._tokenizer = generator, generator.model, generator.tokenizer
        self._window, self._batch_size = window, batch_size
        self.padding_id = self._tokenizer.eos_id
        self._mesh = row_mesh()
        self._rows = rows_of(batch_size, self._mesh)
        config = self._model.config
        padding = (config.padded_vocab - config.known_vocab) * config.d_model * (1 if config.tie_embeddings else 2)
        self.facts = ModelFacts(
            name=name,
            path=path,
            kind="causal",
            run_by="biomamba-jax",
            parameters=self._model.parameters - padding,
            tokenizer=f"{self._tokenizer.name} ({self._tokenizer.vocab_size:,} ids)",
            context="the whole document",
            dtype=self._model.weight_dtype.name,
        )

    # --- Documents ---

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """See `scoring.Scorer`."""
        return self._tokenizer.encode_batch(texts)

    def spell(self, texts: Sequence[str]) -> list[str]:
        """See `scoring.Scorer`."""
        return self._tokenizer.spell(texts)

    def documents(self, texts: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """See `scoring.Scorer`."""
        start, eos = self._tokenizer.start_id, self._tokenizer.eos_id
        for first in range(0, len(texts), _BLOCK):
            block = [[start, *ids, eos] for ids in self.encode(texts[first : first + _BLOCK])]
            for index, nats in self.rows(block):
                yield first + index, nats

    def rows(self, rows: Sequence[Tokens]) -> Iterator[tuple[int, np.ndarray]]:
        """See `scoring.Scorer`."""
        arrays = [np.asarray(row, np.int32) for row in rows]
        inputs, targets = [row[:-1] for row in arrays], [row[1:] for row in arrays]
        nats = partial(_row_nats, self._model, self._generator.vocab_size, self._mesh)
        # One shape of batches: an evaluation has many, of which few are not full.
        shape = self._window, self._rows, self._mesh
        batches = run_packed(self._model, inputs, nats, *shape, targets=targets, shrink=False)
        for index, found in by_document(batches, inputs):
            yield index, found.astype(np.float64)
        yield from ((index, np.zeros(0)) for index, own in enumerate(inputs) if not own.size)

    # --- Continuations ---

    def continuations(self, requests: Sequence[Request]) -> list[list[Continuation]]:
        """See `scoring.Scorer`."""
        encoded = encode_requests(requests, self.encode, self._tokenizer.encode_prompts)
        results: list[list[Continuation]] = [[] for _ in encoded]
        # Contexts of a batch have similar lengths, and the first batch shows whether all fit into memory.
        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index][0]))
        for chosen in batched(order, self._batch_size):
            contexts, targets = zip(*(encoded[index] for index in chosen), strict=True)
            for index, scored in zip(chosen, self._score_batch(contexts, targets), strict=True):
                results[index] = scored
        return results

    def _score_batch(self, contexts: Sequence[Tokens], targets: Sequence[Sequence[Tokens]]) -> list[list[Continuation]]:
        """Score the continuations `targets[row]` after `contexts[row]`: first tokens from the prefill, others after."""
        vocab_size = self._generator.vocab_size
        logits, states = prefill(self._model, *pad_left(contexts))
        first = np.asarray(_log_softmax(logits, vocab_size), np.float64)
        flat = [(row, ids) for row, texts in enumerate(targets) for ids in texts]
        scored = [
            Continuation((float(first[row, ids[0]]),), bool(first[row].argmax() == ids[0]))
            if ids
            else Continuation((), True)  # an empty continuation is certain
            for row, ids in flat
        ]
        for chosen in batched((index for index, (_, ids) in enumerate(flat) if len(ids) > 1), self._batch_size):
            rows, ids = zip(*(flat[index] for index in chosen), strict=True)
            shape = bucket_rows(len(ids)), bucket_length(max(map(len, ids)) - 1)
            inputs, wanted = (pad_right([row[part] for row in ids], shape) for part in (slice(-1), slice(1, None)))
            origin = np.pad(np.array(rows, np.int32), (0, shape[0] - len(rows)))
            found = _score_after_prefix(self._model, states, origin, inputs, wanted, vocab_size)
            for index, row, nats, greedy in zip(chosen, ids, *jax.device_get(found), strict=False):
                rest = (-nats[: len(row) - 1].astype(np.float64)).tolist()
                began = scored[index]
                scored[index] = Continuation(
                    (*began.logprobs, *rest), began.greedy and bool(greedy[: len(row) - 1].all())
                )
        remaining = iter(scored)
        return [[next(remaining) for _ in texts] for texts in targets]

    # --- Generation ---

    def generate(self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """See `scoring.Scorer`."""
        sampling = Sampling(max_new_tokens=max_new_tokens, stop=list(stop))
        stripped = [prompt.rstrip() for prompt in prompts]
        return [result.text for result in self._generator(stripped, sampling, batch_size=self._batch_size)]


@partial(jax.jit, static_argnames=("vocab_size", "mesh"))
def _row_nats(
    model: InferenceModel, vocab_size: int, mesh: Mesh, rows: dict[str, Array], states: LayerStates
) -> tuple[Float[Array, "B L"], LayerStates]:
    """Return the nats of every target and the states."""

    def local(model: InferenceModel, rows: dict[str, Array], states: LayerStates) -> tuple[Array, LayerStates]:
        hidden, states = model.hidden(rows["inputs"], states, rows["segment_ids"])
        return _nats(model, hidden, rows["targets"], vocab_size), states

    return over_rows(local, mesh)(model, rows, states)


@partial(jax.jit, static_argnames=("vocab_size",))
def _score_after_prefix(
    model: InferenceModel,
    states: LayerStates,
    origin: Int[Array, " B"],
    inputs: Int[Array, "B L"],
    targets: Int[Array, "B L"],
    vocab_size: int,
) -> tuple[Float[Array, "B L"], Array]:
    """Return the nats of targets after the prefixes of rows `origin`, and bool [B L]: each is the most likely token."""
    hidden, _ = model.hidden(inputs, jax.tree.map(lambda x: x[origin], states))
    logits = jnp.where(jnp.arange(model.config.padded_vocab) < vocab_size, model.logits(hidden), -jnp.inf)
    return _nats(model, hidden, targets, vocab_size), jnp.argmax(logits, -1) == targets


def _nats(model: InferenceModel, hidden: Array, targets: Array, vocab_size: int) -> Float[Array, "B L"]:
    flat, head = hidden.reshape(-1, hidden.shape[-1]), model.head.dense(model.dtype)
    nats = token_negative_log_likelihoods(flat, head, targets.reshape(-1), valid_vocab_size=vocab_size)
    return nats.reshape(targets.shape)


@partial(jax.jit, static_argnames=("vocab_size",))
def _log_softmax(logits: Float[Array, "B V"], vocab_size: int) -> Float[Array, "B V"]:
    return jax.nn.log_softmax(jnp.where(jnp.arange(logits.shape[-1]) < vocab_size, logits, -jnp.inf), axis=-1)
