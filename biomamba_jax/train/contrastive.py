"""Contrastive training of embeddings on pairs of texts, by the loop that pretraining uses.

A query must be nearest to its own document among the documents of the batch (InfoNCE, van den Oord et al. 2018, by
cosine similarity), of all devices, the hard negatives that each pair brings included. An example is packed as one
document of a row:

    inputs    start query   start document   start negative ...   as in `embed`
    targets   q ... q       d ... d          n ... n              number of the document x kinds + kind of text
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from biomamba_jax.config.embed import ContrastiveConfig, Pooling
from biomamba_jax.data.examples import Encoded, EncodedExamples
from biomamba_jax.data.tokenizer import Tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.interop import Weights
from biomamba_jax.model import LanguageModel
from biomamba_jax.model.pooling import pooling_weights
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.cross_entropy import LossSums
from biomamba_jax.ops.numerics import segment_ends, segment_firsts
from biomamba_jax.parallel.collectives import UNSHARDED, Collectives
from biomamba_jax.parallel.mesh import make_mesh
from biomamba_jax.train.heldout import examples_evaluator
from biomamba_jax.train.loop import TrainingRun, run
from biomamba_jax.train.optimizer import Params, decay_mask
from biomamba_jax.train.program import abstract_model, train_program
from biomamba_jax.train.setup import example_steps
from biomamba_jax.train.step import Batch, LossFunction

ROW_AXES = ("data", "fsdp")
QUERY, DOCUMENT = 0, 1
"""Kinds of text; those from 2 on are negatives."""


def encode_pairs(
    queries: Sequence[str],
    documents: Sequence[str],
    negatives: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    sequence_length: int,
) -> EncodedExamples:
    """Tokenize pairs: an example is a query, its document and its negatives.

    A query is cut at a quarter of a row, then documents at equal shares of the rest; `shortened` counts the examples.

    Args:
      queries: at least one; none is empty.
      documents: that of each query.
      negatives: indices of other documents for each query, equally many.
      tokenizer: encodes the texts.
      sequence_length: tokens of a row.

    Raises:
      UserError: rows are too short for an example.
    """
    kinds, start = 2 + len(negatives[0]), tokenizer.start_id
    share = (sequence_length - sequence_length // 4) // (kinds - 1)
    if share < 2:
        raise UserError(f"data.sequence_length = {sequence_length}: has no room for {kinds} texts; raise it")
    encoded, shortened = [], 0
    of_queries, of_documents = tokenizer.encode_batch(queries), tokenizer.encode_batch(documents)
    for index, (query, others) in enumerate(zip(of_queries, negatives, strict=True)):
        numbers = [index, index, *others]
        texts = [of_documents[number] for number in numbers[1:]]
        parts = [query[: sequence_length // 4 - 1], *(text[: share - 1] for text in texts)]
        shortened += parts != [query, *texts]
        inputs = [token for part in parts for token in (start, *part)]
        marks = np.repeat([n * kinds + kind for kind, n in enumerate(numbers)], [len(part) + 1 for part in parts])
        encoded.append(Encoded(np.array(inputs, np.int32), marks.astype(np.int32)))
    return EncodedExamples("pairs", encoded, shortened)


def train_embeddings(
    config: ContrastiveConfig, weights: Weights, train: EncodedExamples, held_out: EncodedExamples
) -> bool:
    """Train as `config` says, from the newest checkpoint in its run directory where there is one.

    Args:
      config: the run, with the model of `weights`.
      weights: what to start from.
      train: what `encode_pairs` made of the pairs to train on.
      held_out: what it made of those for the held-out loss.

    Returns:
      True if the run is complete; False after SIGTERM or Ctrl-C.

    Raises:
      UserError: config, weights and checkpoint do not fit together, or gradients stayed non-finite.
    """
    graph, layout = abstract_model(config.model, make_mesh(config.mesh), config.train.reduce_dtype)
    mesh, rows = layout.mesh, config.data
    if mesh.shape["tensor"] * mesh.shape["sequence"] > 1:
        raise UserError("mesh.tensor and mesh.sequence: must be 1 for contrastive training")

    def loss(pairs: EncodedExamples) -> LossFunction:
        kinds, per_row = 2 + rows.hard_negatives, rows.sequence_length // int(pairs.lengths.min())
        axes = tuple(axis for axis in ROW_AXES if mesh.shape[axis] > 1)
        return contrastive_loss(graph, config.pooling, config.temperature, kinds, per_row, layout.collectives, axes)

    steps, epoch_steps = example_steps(config, train)
    program = train_program(
        config, graph, layout, loss(train), steps, params=weights.params, weight_decay_mask=_decay_mask
    )
    cut = train.shortened + held_out.shortened
    messages = [f"{len(train):,} pairs to train on, {len(held_out):,} held out"]
    messages += [f"{cut:,} pairs do not fit into their share of a row and lose their ends"] if cut else []
    training = TrainingRun(
        config=config,
        program=program,
        steps=steps,
        epoch_steps=epoch_steps,
        evaluate=examples_evaluator(loss(held_out), layout, held_out, config.data, "pairs"),
        documents=train,
        tokenizer=weights.tokenizer_file,
        messages=messages,
    )
    return run(training, weights.params)


def _decay_mask(params: Params) -> Params:
    """Return pretraining's mask; a language model head, which is not used, is not decayed."""
    return decay_mask(params) | ({"lm_head": False} if "lm_head" in params else {})


def contrastive_loss(
    graph: nnx.GraphDef,
    pooling: Pooling,
    temperature: float,
    kinds: int,
    per_row: int,
    collectives: Collectives = UNSHARDED,
    axes: tuple[str, ...] = (),
) -> LossFunction:
    """Return the summed InfoNCE loss of a batch's queries; `correct` counts those nearest to their own document.

    Another copy of a query's own document, brought by another pair as a negative, does not count.

    Args:
      graph: the model's graph definition.
      pooling: see `EmbeddingConfig`.
      temperature: divides the cosine similarities.
      kinds: texts of an example.
      per_row: upper bound of the examples in a row.
      collectives: see `language_model_loss`.
      axes: mesh axes that rows are sharded over, whose documents are gathered.
    """

    def loss(params: Any, batch: Batch) -> tuple[Array, LossSums]:
        model: LanguageModel = nnx.merge(graph, params)
        segments, kind, number = batch["segment_ids"], batch["targets"] % kinds, batch["targets"] // kinds
        texts = jnp.where(segments != 0, segments * kinds + kind, 0)
        hidden, _ = model.hidden(batch["inputs"], segment_ids=texts, collectives=collectives)
        rows = jnp.arange(segments.shape[0])[:, None]
        unused = segments.shape[0] * per_row * kinds
        slot = jnp.where(segments != 0, (rows * per_row + segments - 1) * kinds + kind, unused).reshape(-1)
        position = jnp.arange(texts.shape[1]) - segment_firsts(texts)
        weights = pooling_weights(pooling, position, segment_ends(texts))
        weighted = weights[..., None] * hidden.astype(jnp.float32)

        def by_text(reduce: Any, values: Array) -> Array:
            return reduce(values, slot, unused + 1)[:-1].reshape(-1, kinds, *values.shape[1:])

        vectors = by_text(jax.ops.segment_sum, weighted.reshape(len(slot), -1))
        vectors *= jax.lax.rsqrt(jnp.sum(vectors**2, -1, keepdims=True) + 1e-12)  # empty slots stay 0
        numbers = by_text(jax.ops.segment_max, number.reshape(-1))  # below 0 in empty slots
        documents, owners = vectors[:, DOCUMENT:].reshape(-1, vectors.shape[-1]), numbers[:, DOCUMENT:].reshape(-1)
        own = jnp.arange(len(vectors)) * (kinds - 1)
        if axes:
            own += jax.lax.axis_index(axes) * len(owners)
            documents, owners = (jax.lax.all_gather(each, axes, tiled=True) for each in (documents, owners))
        exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        logits = jnp.matmul(vectors[:, QUERY], documents.T, **exact) / temperature
        is_own = jnp.arange(len(owners)) == own[:, None]
        copy = (owners == numbers[:, QUERY, None]) & ~is_own
        logits = jnp.where((owners < 0) | copy, -1e9, logits)
        valid = numbers[:, QUERY] >= 0
        chosen = jnp.take_along_axis(logits, own[:, None], 1)[:, 0]
        nats = jnp.where(valid, jax.nn.logsumexp(logits, -1) - chosen, 0).sum()
        correct = (valid & (logits.argmax(-1) == own)).sum().astype(jnp.float32)
        return nats, LossSums(nats, nats, correct, valid.sum().astype(jnp.float32))

    return loss
