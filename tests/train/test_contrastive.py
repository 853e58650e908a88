"""Contrastive training: InfoNCE against a plain loop over texts one by one, on one device and on four."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_devices
from flax import nnx
from random_weights import random_weights
from tiny_models import CONFIGS, train_tokenizer, write_tiny_model

import biomamba_jax
from biomamba_jax.config import MeshConfig
from biomamba_jax.data.examples import Encoded, EncodedExamples
from biomamba_jax.data.pipeline import evaluation_batches
from biomamba_jax.errors import UserError
from biomamba_jax.interop import read_model
from biomamba_jax.model import LanguageModel
from biomamba_jax.parallel.mesh import make_mesh, shard_batch
from biomamba_jax.train.contrastive import ROW_AXES, contrastive_loss, encode_pairs
from biomamba_jax.train.program import abstract_model

QUERIES = ["insulin", "glucose fell in mice", "the patients", "diabetes type 2", "β-cell mice"]
DOCUMENTS = ["given insulin, and", "serum glucose", "were given the insulin with", "type 2 diabetes", "mice β"]
NEGATIVES = [[2], [4], [0], [0], [1]]
TEMPERATURE = 0.1


@pytest.fixture(scope="module", params=list(CONFIGS))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    return write_tiny_model(path / "model", request.param, train_tokenizer(path), spread=1)


def graph_of(weights):
    return nnx.split(nnx.eval_shape(lambda: LanguageModel(weights.config, rngs=nnx.Rngs(0))))[0]


def expected(model, pooling):
    """Mean loss and accuracy from embeddings of each text by itself; a query's own document counts once."""

    def unit(texts):
        vectors = model.embed(texts, pooling=pooling).astype(np.float64)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    queries, documents = unit(QUERIES), unit(DOCUMENTS)
    nats, correct = [], []
    for index, query in enumerate(queries):
        columns = [*range(5), *(n for (n,) in NEGATIVES if n != index)]
        logits = documents[columns] @ query / TEMPERATURE
        nats.append(np.log(np.exp(logits).sum()) - logits[index])
        correct.append(logits.argmax() in [i for i, column in enumerate(columns) if column == index])
    return np.mean(nats), np.mean(correct)


@pytest.mark.parametrize("pooling", ["mean", "last", "weighted"])
def test_loss_is_that_of_texts_embedded_one_by_one(folder, pooling):
    model, weights = biomamba_jax.load(folder), read_model(folder)
    pairs = encode_pairs(QUERIES, DOCUMENTS, NEGATIVES, model.tokenizer, 192)
    assert pairs.shortened == 0
    per_row = 192 // int(pairs.lengths.min())
    (batch,) = evaluation_batches(pairs, sequence_length=192, batch_size=4)
    loss = contrastive_loss(graph_of(weights), pooling, TEMPERATURE, 3, per_row)
    total, sums = jax.jit(loss)(jax.tree.map(jnp.asarray, weights.params), batch)
    nats, accuracy = expected(model, pooling)
    assert float(sums.weight) == 5
    assert float(total) / 5 == pytest.approx(nats, rel=1e-4)
    assert float(sums.correct) / 5 == pytest.approx(accuracy)


def test_texts_that_do_not_fit_lose_their_ends_and_are_counted(folder):
    tokenizer = biomamba_jax.load(folder).tokenizer
    pairs = encode_pairs(["insulin " * 99], ["glucose " * 99], [[]], tokenizer, 64)
    inputs, targets = pairs[0]
    assert pairs.shortened == 1
    assert np.bincount(targets).tolist() == [16, 48]
    assert [index for index, token in enumerate(inputs) if token == tokenizer.start_id] == [0, 16]
    with pytest.raises(UserError, match="sequence_length"):
        encode_pairs(["a"], ["b"], [[0] * 9], tokenizer, 16)


@on_devices(8)
def test_four_devices_find_the_negatives_of_one_and_have_its_gradient():
    weights = random_weights(dataclasses.replace(CONFIGS["mamba2"], vocab_size=310))
    draw = np.random.default_rng(0)
    lengths = draw.integers(4, 30, (11, 3))
    marks = [np.repeat([i * 3, i * 3 + 1, (i + 1) % 11 * 3 + 2], sizes) for i, sizes in enumerate(lengths)]
    documents = [Encoded(draw.integers(3, 300, len(mark)).astype(np.int32), mark) for mark in marks]
    examples = EncodedExamples("made up", documents, 0)
    (batch,) = evaluation_batches(examples, sequence_length=128, batch_size=8)
    results = []
    for sizes in ((1, 1), (2, 2)):
        mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: sizes[0] * sizes[1]])
        graph, layout = abstract_model(weights.config, mesh)
        axes = ROW_AXES if mesh.size > 1 else ()
        loss = contrastive_loss(graph, "mean", TEMPERATURE, 3, 11, layout.collectives, axes)

        def sums_and_gradients(params, batch, loss=loss):
            (_, sums), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch)
            return sums, gradients

        params = jax.device_put(weights.params, layout.shardings(weights.params))
        found = jax.jit(layout.sharded_sum(sums_and_gradients))(params, shard_batch(batch, mesh))
        results.append(jax.device_get(found))
    assert results[0][0].weight == 11
    jax.tree.map(lambda one, four: np.testing.assert_allclose(four, one, rtol=2e-3, atol=2e-4), *results)
