"""Scores text with our own models.

Documents that fit into a row are packed, each a segment of its own; longer ones go on from row to row with the
recurrent state, so that every token is predicted from all of its document. A context is read once, whatever the number
of texts that may follow it. Rows of documents are spread over the devices of this host.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from biomamba_jax.config import EvaluateConfig
from biomamba_jax.data.packing import Piece, best_fit_decreasing
from biomamba_jax.errors import UserError
from biomamba_jax.model.decode import InferenceModel, LayerStates
from biomamba_jax.model.state import empty_state
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.cross_entropy import token_negative_log_likelihoods
from biomamba_jax.tasks.generation import encode_prompts, left_padded, prefill, round_up, round_up_rows
from biomamba_jax.tasks.model import Model
from biomamba_jax.tasks.model import load as load_model
from biomamba_jax.tasks.sampling import Sampling
from biomamba_jax.tasks.scoring import Continuation, ModelFacts, Request, move_spaces, split_continuation

_BLOCK = 2048
"""Documents that are tokenized, packed and scored together; what is in memory of a domain at one time."""


def load(name: str, path: str | Path, config: EvaluateConfig) -> "NativeScorer":
    """The scorer of a folder that `biomamba_jax.load` reads."""
    if jax.process_count() > 1:
        raise UserError(f"evaluate runs on one host, not on {jax.process_count()}; start it on one of them")
    return NativeScorer(name, load_model(path, config.dtype), str(path), config.window, config.batch_size)


class NativeScorer:
    """See `scorers.Scorer`.

    Args:
      window: tokens of a row.
      batch_size: rows at one time; rounded up to a multiple of the devices.
    """

    ends_documents = True

    def __init__(self, name: str, model: Model, path: str, window: int, batch_size: int):
        self._model, self._generator = model, model.generator
        self._tokenizer, self._vocabulary = model.tokenizer, model.generator.vocab_size
        self._window, self._batch_size = window, batch_size
        devices = jax.local_device_count()
        self._rows = -(-batch_size // devices) * devices
        self._mesh = jax.make_mesh((devices,), ("rows",), axis_types=(AxisType.Auto,), devices=jax.local_devices())
        inference = self._generator.model
        self.facts = ModelFacts(
            name=name,
            path=path,
            kind="causal",
            run_by="biomamba-jax",
            parameters=sum(x.size for x in jax.tree.leaves(inference)),
            tokenizer=f"{self._tokenizer.name} ({self._tokenizer.vocab_size:,} ids)",
            context="the whole document",
            dtype=inference.dtype.name,
        )

    # --- Documents ---

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """See `scorers.Scorer`."""
        return self._tokenizer.encode_batch(texts)

    def documents(self, texts: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
        """See `scorers.Scorer`."""
        eos = self._tokenizer.eos_id
        for first in range(0, len(texts), _BLOCK):
            block = [[eos, *ids, eos] for ids in self.encode(texts[first : first + _BLOCK])]
            for index, nats in self.rows(block):
                yield first + index, nats

    def rows(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, np.ndarray]]:
        """See `scorers.Scorer`."""
        ids = [np.asarray(row, np.int32) for row in rows]
        lengths = np.array([len(row) - 1 for row in ids])  # tokens that are predicted
        width = min(self._window, round_up(int(lengths.sum())))
        short = np.flatnonzero((lengths > 0) & (lengths <= width))
        if len(short):
            yield from self._packed(ids, short, lengths[short], width)
        rest = np.flatnonzero(lengths > width)
        rest = rest[np.argsort(lengths[rest], kind="stable")]  # those of a batch end at about the same time
        for start in range(0, len(rest), self._rows):
            yield from self._long(ids, rest[start : start + self._rows].tolist(), width)
        yield from ((index, np.zeros(0)) for index in np.flatnonzero(lengths <= 0).tolist())

    def _packed(
        self, ids: Sequence[np.ndarray], chosen: np.ndarray, lengths: np.ndarray, width: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        pieces: dict[int, list[Piece]] = {}
        packed = best_fit_decreasing(lengths, width).tolist()
        for document, length, row in zip(chosen.tolist(), lengths.tolist(), packed, strict=True):
            pieces.setdefault(row, []).append(Piece(document, 0, length))
        plan = list(pieces.values())
        for start in range(0, len(plan), self._rows):
            batch = plan[start : start + self._rows]
            nats, _ = self._score(ids, batch, width, None)
            for row, of_row in zip(nats, batch, strict=False):
                ends = np.cumsum([piece.stop for piece in of_row])
                for piece, end in zip(of_row, ends.tolist(), strict=True):
                    yield piece.document, row[end - piece.stop : end]

    def _long(self, ids: Sequence[np.ndarray], chosen: list[int], width: int) -> Iterator[tuple[int, np.ndarray]]:
        """One document a row, all of them from their beginnings on, as many rounds as the longest one needs."""
        parts: dict[int, list[np.ndarray]] = {document: [] for document in chosen}
        states = None
        for start in range(0, max(len(ids[document]) - 1 for document in chosen), width):
            stops = [min(start + width, len(ids[document]) - 1) for document in chosen]
            batch = [[Piece(d, start, stop)] if start < stop else [] for d, stop in zip(chosen, stops, strict=True)]
            nats, states = self._score(ids, batch, width, states)
            for row, pieces in zip(nats, batch, strict=False):
                for piece in pieces:
                    parts[piece.document].append(row[: piece.stop - piece.start])
        for document, of_parts in parts.items():
            yield document, np.concatenate(of_parts)

    def _score(
        self, ids: Sequence[np.ndarray], batch: Sequence[Sequence[Piece]], width: int, states: LayerStates | None
    ) -> tuple[np.ndarray, LayerStates]:
        """Float64 nats [rows, width] of the pieces, one behind the other in each row, and the states after the rows.

        A piece [start, stop) stands for the tokens start + 1 ... stop, predicted from those one place before.
        """
        rows = {name: np.zeros((self._rows, width), np.int32) for name in ("inputs", "targets", "segment_ids")}
        for row, pieces in enumerate(batch):
            begin = 0
            for segment, (document, start, stop) in enumerate(pieces, 1):
                here = row, slice(begin, begin + stop - start)
                rows["inputs"][here] = ids[document][start:stop]
                rows["targets"][here] = ids[document][start + 1 : stop + 1]
                rows["segment_ids"][here] = segment
                begin += stop - start
        model = self._generator.model
        states = states if states is not None else _empty_states(model, self._rows)
        nats, states = _row_nats(model, rows, states, self._vocabulary, self._mesh)
        return np.asarray(nats, np.float64), states

    # --- Continuations ---

    def continuations(self, requests: Sequence[Request]) -> list[list[Continuation]]:
        """See `scorers.Scorer`."""
        requests = [move_spaces(request) for request in requests]
        contexts = encode_prompts(self._tokenizer, [request.context for request in requests])
        wholes = iter(encode_prompts(self._tokenizer, [r.context + text for r in requests for text in r.continuations]))
        alone = iter(self._tokenizer.encode_batch([text for r in requests for text in r.continuations]))
        targets = [
            [split_continuation(next(wholes), context, next(alone)) for _ in request.continuations]
            for request, context in zip(requests, contexts, strict=True)
        ]
        results: list[list[Continuation]] = [[] for _ in requests]
        # Contexts of a batch are about as long as each other, and the first batch shows whether all fit into memory.
        order = sorted(range(len(requests)), key=lambda index: -len(contexts[index]))
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            scored = self._continue([contexts[i] for i in chosen], [targets[i] for i in chosen])
            for index, continuations in zip(chosen, scored, strict=True):
                results[index] = continuations
        return results

    def _continue(
        self, contexts: Sequence[Sequence[int]], targets: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Continuation]]:
        model, vocabulary = self._generator.model, self._vocabulary
        logits, states = prefill(model, *left_padded(contexts))
        first = np.asarray(_log_softmax(logits, vocabulary), np.float64)
        guess = first.argmax(-1)
        flat = [(row, list(ids)) for row, texts in enumerate(targets) for ids in texts]
        longer = [index for index, (_, ids) in enumerate(flat) if len(ids) > 1]
        rest: dict[int, tuple[list[float], bool]] = {}
        for start in range(0, len(longer), self._batch_size):
            chosen = longer[start : start + self._batch_size]
            ids = [flat[index][1] for index in chosen]
            shape = round_up_rows(len(ids)), round_up(max(map(len, ids)) - 1)
            inputs, wanted = np.zeros((2, *shape), np.int32)
            for row, tokens in enumerate(ids):
                inputs[row, : len(tokens) - 1], wanted[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
            origin = np.zeros(shape[0], np.int32)
            origin[: len(ids)] = [flat[index][0] for index in chosen]
            nats, greedy = jax.device_get(_after_prefix(model, states, origin, inputs, wanted, vocabulary))
            for row, index in enumerate(chosen):
                length = len(ids[row]) - 1
                rest[index] = (-nats[row, :length].astype(np.float64)).tolist(), bool(greedy[row, :length].all())
        results: list[list[Continuation]] = [[] for _ in targets]
        for index, (row, tokens) in enumerate(flat):
            if not tokens:  # a continuation without a token is certain
                results[row].append(Continuation((), True))
                continue
            more, greedy = rest.get(index, ([], True))
            began = float(first[row, tokens[0]])
            results[row].append(Continuation((began, *more), bool(guess[row] == tokens[0]) and greedy))
        return results

    # --- Generation ---

    def generate(self, prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str]) -> list[str]:
        """See `scorers.Scorer`."""
        sampling = Sampling(max_new_tokens=max_new_tokens, stop=list(stop))
        return [result.text for result in self._generator(prompts, sampling, batch_size=self._batch_size)]


def _empty_states(model: InferenceModel, rows: int) -> LayerStates:
    stacked = empty_state(model.config, rows, model.dtype).layers
    return tuple(jax.tree.map(lambda x, layer=layer: x[layer], stacked) for layer in range(model.config.n_layers))


@partial(jax.jit, static_argnames=("vocabulary", "mesh"))
def _row_nats(
    model: InferenceModel, rows: dict[str, Array], states: LayerStates, vocabulary: int, mesh: jax.sharding.Mesh
) -> tuple[Float[Array, "B L"], LayerStates]:
    """Nats of every target, and the states; each device computes its own rows, so that kernels need not be divided."""

    def local(model: InferenceModel, rows: dict[str, Array], states: LayerStates) -> tuple[Array, LayerStates]:
        hidden, states = model.hidden(rows["inputs"], states, rows["segment_ids"])
        return _nats(model, hidden, rows["targets"], vocabulary), states

    over = PartitionSpec("rows")
    mapped: Any = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), over, over), out_specs=(over, over), check_vma=False
    )
    return mapped(model, rows, states)


@partial(jax.jit, static_argnames=("vocabulary",))
def _after_prefix(
    model: InferenceModel,
    states: LayerStates,
    origin: Int[Array, " B"],
    inputs: Int[Array, "B L"],
    targets: Int[Array, "B L"],
    vocabulary: int,
) -> tuple[Float[Array, "B L"], Array]:
    """Nats of targets behind the contexts of rows `origin`, and whether each is the likeliest token."""
    hidden, _ = model.hidden(inputs, jax.tree.map(lambda x: x[origin], states))
    logits = jnp.where(jnp.arange(model.head.shape[0]) < vocabulary, model.logits(hidden), -jnp.inf)
    return _nats(model, hidden, targets, vocabulary), jnp.argmax(logits, -1) == targets


def _nats(model: InferenceModel, hidden: Array, targets: Array, vocabulary: int) -> Float[Array, "B L"]:
    flat = hidden.reshape(-1, hidden.shape[-1])
    nats = token_negative_log_likelihoods(flat, model.head, targets.reshape(-1), valid_vocab_size=vocabulary)
    return nats.reshape(targets.shape)


@partial(jax.jit, static_argnames=("vocabulary",))
def _log_softmax(logits: Float[Array, "B V"], vocabulary: int) -> Float[Array, "B V"]:
    return jax.nn.log_softmax(jnp.where(jnp.arange(logits.shape[-1]) < vocabulary, logits, -jnp.inf), axis=-1)
