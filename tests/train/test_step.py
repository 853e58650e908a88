"""One training step: loss, gradient and update, accumulation, and skipped updates."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from random_weights import random_weights

from biomamba_jax.config import LossConfig, ModelConfig, OptimizerConfig
from biomamba_jax.model import LanguageModel
from biomamba_jax.train.optimizer import make_optimizer
from biomamba_jax.train.program import initial_state
from biomamba_jax.train.step import language_model_loss, make_train_step


def graph_of(config: ModelConfig) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))


CONFIG = ModelConfig(kind="mamba2", d_model=16, n_layers=2, vocab_size=29, headdim=8, d_state=4)
GRAPH = graph_of(CONFIG)
PLAIN = language_model_loss(GRAPH, LossConfig())
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-2), CONFIG, optax.constant_schedule(1e-2))


def batch(rows: int = 4, length: int = 12, seed: int = 0):
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 29, (rows, length + 1), np.int32)
    segment_ids = np.sort(random.integers(1, 4, (rows, length), np.int32), axis=1)
    segment_ids[0, length // 2 :] = 0  # a row with much padding: parts of unequal weight
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segment_ids}


@functools.cache
def step(accumulation: int = 1, loss=PLAIN):
    return jax.jit(make_train_step(loss, OPTIMIZER, accumulation))


@jax.jit
def model(params, example):
    """Logits of the ids that there are."""
    return nnx.merge(GRAPH, params)(example["inputs"], None, example["segment_ids"])[0][..., :29]


@pytest.fixture(scope="module")
def state():
    return jax.jit(lambda: initial_state(CONFIG, OPTIMIZER, 0, random_weights(CONFIG).params))()


def test_the_loss_is_the_mean_over_tokens_that_are_not_padding(state):
    example = batch()
    _, report = step()(state, example)
    each = optax.softmax_cross_entropy_with_integer_labels(model(state.params, example), example["targets"])
    mask = example["segment_ids"] != 0
    np.testing.assert_allclose(report.sums.nll, (each * mask).sum(), rtol=1e-5)
    assert report.sums.weight == mask.sum()


def test_accumulation_gives_the_same_update_though_parts_hold_unequal_tokens(state):
    whole, _ = step(1)(state, batch())
    for parts in (2, 4):
        accumulated, report = step(parts)(state, batch())
        assert report.sums.weight == (batch()["segment_ids"] != 0).sum()
        for ours, theirs in zip(jax.tree.leaves(accumulated.params), jax.tree.leaves(whole.params), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)


@jax.jit
def sum_gradient(params, example):
    return jax.grad(lambda params: PLAIN(params, example)[0])(params)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_is_that_of_the_mean_over_the_counted_tokens(state, accumulation):
    """AdamW hides a gradient's scale: plain SGD shows it. A prompt's targets are -1 and padding is of segment 0."""
    example = batch()
    example["targets"] = np.where(np.arange(12) % 3 == 0, -1, example["targets"])
    counted = ((example["segment_ids"] != 0) & (example["targets"] >= 0)).sum()
    mean = jax.tree.map(lambda x: x / counted, jax.device_get(sum_gradient(state.params, example)))
    sgd = optax.sgd(1.0)
    begin = state.replace(optimizer=sgd.init(state.params))
    new, report = jax.jit(make_train_step(PLAIN, sgd, accumulation))(begin, example)
    for before, after, gradient in zip(*map(jax.tree.leaves, (state.params, new.params, mean)), strict=True):
        np.testing.assert_allclose(before - after, gradient, atol=1e-6, rtol=1e-4)
    np.testing.assert_allclose(report.gradient_norm, jax.jit(optax.global_norm)(mean), rtol=1e-5)
    assert report.sums.weight == counted and report.tokens == (example["segment_ids"] != 0).sum()


def test_smoothing_and_z_loss_change_the_objective_alone(state):
    example = batch()
    config = LossConfig(label_smoothing=0.2, z_loss=0.01)
    objective, sums = jax.jit(language_model_loss(GRAPH, config))(state.params, example)
    logits = model(state.params, example)
    logprobs, mask = jax.nn.log_softmax(logits), example["segment_ids"] != 0
    nll = -jnp.take_along_axis(logprobs, example["targets"][..., None], -1)[..., 0]
    smoothed = 0.8 * nll - 0.2 * logprobs.mean(-1) + 0.01 * jax.nn.logsumexp(logits, -1) ** 2
    np.testing.assert_allclose(sums.nll, (nll * mask).sum(), rtol=1e-5)
    np.testing.assert_allclose(objective, (smoothed * mask).sum(), rtol=1e-5)


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_counters(state):
    def broken(params, example):
        loss, sums = PLAIN(params, example)
        return loss * jnp.nan, sums

    skipped, report = step(loss=broken)(state, batch())
    for ours, theirs in zip(
        jax.tree.leaves((skipped.params, skipped.optimizer)),
        jax.tree.leaves((state.params, state.optimizer)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert (skipped.step, skipped.skipped, skipped.skipped_in_a_row) == (1, 1, 1)
    assert not np.isfinite(report.gradient_norm)
    recovered, _ = step()(skipped, batch())
    assert (recovered.step, recovered.skipped, recovered.skipped_in_a_row) == (2, 1, 0)


def test_a_loss_that_is_not_finite_changes_nothing_though_its_gradient_is(state):
    def broken(params, example):
        loss, sums = PLAIN(params, example)
        return loss, sums._replace(loss=jnp.float32(jnp.nan))

    skipped, report = step(loss=broken)(state, batch())
    assert np.isfinite(report.gradient_norm) and (skipped.skipped, skipped.skipped_in_a_row) == (1, 1)
    for ours, theirs in zip(jax.tree.leaves(skipped.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_repeated_steps_learn_the_batch(state):
    advance, example = step(), batch()
    losses = []
    for _ in range(40):
        state, report = advance(state, example)
        losses.append(float(report.sums.nll / report.sums.weight))
    assert losses[-1] < 0.5 * losses[0]


def test_padded_vocabulary_is_never_predicted(state):
    example = batch()
    embedding = np.array(state.params["embedding"])
    embedding[29:] = 50.0
    padded = {**state.params, "embedding": embedding}
    for vocab_size in (29, 32):  # 29 ids are padded to 32 rows: those three must not take part
        config = dataclasses.replace(CONFIG, vocab_size=vocab_size)
        loss = jax.jit(language_model_loss(graph_of(config), LossConfig()))
        unchanged = np.allclose(loss(state.params, example)[0], loss(padded, example)[0])
        assert unchanged == (vocab_size == 29)
