"""Language models of all kinds: one function for training and decoding, and no leaks between documents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import random_model

from biomamba_jax.config import ModelConfig
from biomamba_jax.model import LanguageModel

CHUNK = 16
SMALL = {
    "mamba1": ModelConfig(kind="mamba1", d_model=24, n_layers=2, vocab_size=61, d_state=8),
    "mamba2": ModelConfig(
        kind="mamba2", d_model=32, n_layers=2, vocab_size=61, d_state=16, headdim=16, n_groups=2, chunk_size=CHUNK
    ),
}
SISO = dataclasses.replace(SMALL["mamba2"], kind="mamba3", d_intermediate=100)
SMALL |= {"mamba3": SISO, "mamba3_mimo": dataclasses.replace(SISO, mimo_rank=2, outproj_norm=True)}


@nnx.jit(static_argnames="kind")
def make(kind: str) -> LanguageModel:
    """A new model, but for norms and D that are not all ones and for layers that differ."""
    graph, params = nnx.split(LanguageModel(SMALL[kind], rngs=nnx.Rngs(0)))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return nnx.merge(graph, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params))


@pytest.fixture(scope="module", params=SMALL)
def model(request) -> LanguageModel:
    return make(request.param)


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 61, (batch, length), np.int32)


@nnx.jit
def run(model, tokens, state=None, segment_ids=None):
    return model(tokens, state, segment_ids)


# Single tokens, less than a chunk, a whole one and more; calls of one length are one program.
@pytest.mark.parametrize("lengths", [(1, 1, 1, 1, 1, 1, 1, CHUNK + 1, CHUNK), (5, 1, CHUNK + 1, CHUNK, 1)])
def test_any_split_of_a_text_into_calls_gives_the_same_logits(model, lengths):
    text = tokens(2, 40)
    whole, end = run(model, text)
    state, parts = None, []
    for part in np.split(text, np.cumsum(lengths)[:-1], axis=1):
        logits, state = run(model, part, state)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5, rtol=0)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(end), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_call_that_begins_another_document_forgets_the_last_one(model):
    first, second = tokens(2, 5, seed=1), tokens(2, 40)
    _, state = run(model, first, None, np.full(first.shape, 7))
    logits, _ = run(model, second, state, np.full(second.shape, 8))
    np.testing.assert_allclose(logits, run(model, second)[0], atol=1e-5, rtol=0)


DOCUMENTS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 1)


def test_a_packed_row_gives_the_logits_and_gradients_of_its_documents_run_alone(model):
    """Both are rows of one program; that a row of one document is one without segment ids is tested above."""
    documents = [tokens(1, length, 3 + i)[0] for i, length in enumerate(DOCUMENTS)]
    rows = np.zeros((len(DOCUMENTS) + 1, sum(DOCUMENTS)), np.int32)
    rows[0], segment_ids = np.concatenate(documents), np.ones_like(rows)
    segment_ids[0] = np.repeat(np.arange(len(DOCUMENTS)) + 1, DOCUMENTS)
    for row, document in zip(rows[1:], documents, strict=True):
        row[: document.size] = document  # what follows a document does not reach it
    packed = (np.arange(len(rows)) == 0)[:, None] & (rows >= 0)
    alone = np.arange(rows.shape[1]) < np.array([0, *DOCUMENTS])[:, None]
    graph, params = nnx.split(model)

    def loss(params, counted):
        logits, _ = nnx.merge(graph, params)(jnp.asarray(rows), None, jnp.asarray(segment_ids))
        return jnp.sum(jnp.sin(logits) * counted[..., None]), logits  # any function of every logit

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    (together, logits), (apart, _) = gradient(params, packed), gradient(params, alone)
    np.testing.assert_allclose(logits[packed], logits[alone], atol=1e-5, rtol=0)
    for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_unrolling_and_recomputing_layers_change_no_result():
    text = jnp.asarray(tokens(1, 20))

    def value_and_gradient(**changes):
        graph, params = nnx.split(random_model(dataclasses.replace(SMALL["mamba2"], **changes)))
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(nnx.merge(graph, p)(text)[0] ** 2)))(params)

    plain = value_and_gradient()
    for changes in ({"unroll": 2, "remat": "dots"}, {"remat": "full"}):
        for ours, theirs in zip(jax.tree.leaves(value_and_gradient(**changes)), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def shapes(config: ModelConfig, **options) -> dict:
    """The parameters of a new model as shapes and dtypes."""
    return nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0), **options))))


def test_an_untied_head_is_a_parameter_of_its_own():
    config = dataclasses.replace(SMALL["mamba1"], tie_embeddings=False)
    assert shapes(config)["lm_head"].shape == shapes(config)["embedding"].shape == (64, 24)
    model = random_model(config)
    logits, _ = run(model, tokens(1, 20))
    model.lm_head[...] *= 2
    np.testing.assert_array_equal(run(model, tokens(1, 20))[0], 2 * logits)


def test_the_vocabulary_is_padded():
    assert shapes(SMALL["mamba2"])["embedding"].shape == (64, 32)


def test_bfloat16_compute_keeps_parameters_states_and_logits_in_float32():
    logits, state = run(random_model(SMALL["mamba2"], dtype=jnp.bfloat16), tokens(1, 20))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(shapes(SMALL["mamba2"], dtype=jnp.bfloat16))}
    assert dtypes == {jnp.dtype(jnp.float32)}
    assert logits.dtype == state.layers.ssm.dtype == jnp.float32
    assert state.layers.conv_x.dtype == jnp.bfloat16
