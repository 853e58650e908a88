"""Language models of all kinds: one function for training and decoding, and no leaks between documents."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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


def make(kind: str, **changes) -> LanguageModel:
    """A model with weights that differ from layer to layer, and norms and D that are not all ones."""

    @nnx.jit
    def build():
        model = LanguageModel(dataclasses.replace(SMALL[kind], **changes), rngs=nnx.Rngs(0))
        graph, params = nnx.split(model)
        keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
        return nnx.merge(graph, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params))

    return build()


@pytest.fixture(scope="module", params=SMALL)
def model(request) -> LanguageModel:
    return make(request.param)


def tokens(batch: int, length: int, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 61)


@nnx.jit
def run(model, tokens, state=None, segment_ids=None):
    return model(tokens, state, segment_ids)


@pytest.mark.parametrize("cuts", [(1, 2, 3), (17,), (CHUNK, 2 * CHUNK), (5, 6, 39)])
def test_any_split_of_a_text_into_calls_gives_the_same_logits(model, cuts):
    text = tokens(2, 40)
    whole, end = run(model, text)
    state, parts = None, []
    for part in jnp.split(text, cuts, axis=1):
        logits, state = run(model, part, state)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5, rtol=0)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(end), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_call_that_begins_another_document_forgets_the_last_one(model):
    text = tokens(1, 24)
    first, second = text[:, :10], text[:, 10:]
    _, state = run(model, first, None, jnp.full((1, 10), 7))
    logits, _ = run(model, second, state, jnp.full((1, 14), 8))
    np.testing.assert_allclose(logits, run(model, second)[0], atol=1e-5, rtol=0)


DOCUMENTS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 1)


def packed_and_alone():
    """Return a row of all documents, its segment ids, each document in its own row, and where those hold tokens."""
    documents = [tokens(1, length, 3 + i) for i, length in enumerate(DOCUMENTS)]
    segment_ids = jnp.concatenate([jnp.full((1, length), i + 1) for i, length in enumerate(DOCUMENTS)], 1)
    # What follows a document does not reach it; rows of one length are one program.
    alone = jnp.concatenate([jnp.pad(each, ((0, 0), (0, max(DOCUMENTS) - each.size))) for each in documents])
    return jnp.concatenate(documents, 1), segment_ids, alone, jnp.arange(max(DOCUMENTS)) < jnp.array(DOCUMENTS)[:, None]


def test_a_packed_row_gives_the_logits_of_its_documents_run_alone(model):
    row, segment_ids, alone, counted = packed_and_alone()
    logits, _ = run(model, row, None, segment_ids)
    np.testing.assert_allclose(logits[0], run(model, alone)[0][counted], atol=1e-5, rtol=0)


def test_a_packed_row_gives_the_gradients_of_its_documents_run_alone(model):
    row, segment_ids, alone, counted = packed_and_alone()
    graph, params = nnx.split(model)

    def loss(params, text, segment_ids, counted):
        logits, _ = nnx.merge(graph, params)(text, None, segment_ids)
        return jnp.sum(jnp.sin(logits) * counted[..., None])  # any function of every logit

    gradient = jax.jit(jax.grad(loss))
    together, apart = gradient(params, row, segment_ids, jnp.ones_like(row)), gradient(params, alone, None, counted)
    for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(apart), strict=True):
        assert np.linalg.norm(ours - theirs) <= 1e-5 * np.linalg.norm(theirs)


def test_unrolling_and_recomputing_layers_change_no_result():
    text = tokens(1, 20)

    def value_and_gradient(**changes):
        graph, params = nnx.split(make("mamba2", **changes))
        return jax.jit(jax.value_and_grad(lambda p: jnp.sum(nnx.merge(graph, p)(text)[0] ** 2)))(params)

    plain = value_and_gradient()
    for changes in ({"unroll": 2}, {"remat": "dots"}, {"remat": "full"}):
        for ours, theirs in zip(jax.tree.leaves(value_and_gradient(**changes)), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_an_untied_head_is_a_parameter_of_its_own():
    model = make("mamba1", tie_embeddings=False)
    params = nnx.to_pure_dict(nnx.state(model))
    assert params["lm_head"].shape == params["embedding"].shape
    assert not np.allclose(params["lm_head"], params["embedding"])


def test_the_vocabulary_is_padded():
    assert make("mamba2").embedding[...].shape == (64, 32)


def test_bfloat16_compute_keeps_parameters_states_and_logits_in_float32():
    model = LanguageModel(SMALL["mamba2"], dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    logits, state = run(model, tokens(1, 20))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    assert logits.dtype == state.layers.ssm.dtype == jnp.float32
    assert state.layers.conv_x.dtype == jnp.bfloat16
