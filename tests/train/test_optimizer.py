"""AdamW's update of each kind of parameter, and the learning rate over a run."""

import jax
import numpy as np
import optax
import pytest
from random_weights import random_weights

from biomamba_jax.config import ModelConfig, OptimizerConfig, ScheduleConfig
from biomamba_jax.errors import UserError
from biomamba_jax.parallel.sharding import leaves_by_path
from biomamba_jax.train.optimizer import decay_mask, evaluation_weights, make_optimizer, scale_by_layer_decay
from biomamba_jax.train.schedule import learning_rate


def model_and_params(kind: str = "mamba2", **changes):
    config = ModelConfig(kind=kind, d_model=16, n_layers=3, vocab_size=32, headdim=8, d_state=4, **changes)
    return config, random_weights(config).params


def advance(optimizer, grads, state, params):
    """The updates of one step, by one program."""
    return jax.jit(optimizer.update)(grads, state, params)


def full(params, value):
    return jax.tree.map(lambda x: np.full_like(x, value), params)


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
def test_only_matrices_convolution_taps_and_the_embedding_are_decayed(kind):
    _, params = model_and_params(kind, bias=True, tie_embeddings=False)
    mask = leaves_by_path(decay_mask(params))
    kept = {name.rsplit("/", 1)[-1] for name, decayed in mask.items() if not decayed}
    decayed = {name.rsplit("/", 1)[-1] for name, decayed in mask.items() if decayed}
    assert decayed == {"kernel", "weight", "embedding", "lm_head"}
    assert kept == {"A_log", "D", "dt_bias", "bias", "weight"}
    assert not any(flag for name, flag in mask.items() if "norm" in name)
    assert all(flag for name, flag in mask.items() if name.endswith("weight") and "conv" in name)


def test_a_rule_that_matches_no_parameter_is_refused_by_name():
    _, params = model_and_params()
    with pytest.raises(UserError, match="rule 'embedding' matches no parameter"):
        decay_mask({"renamed" if name == "embedding" else name: value for name, value in params.items()})


def test_one_update_is_the_textbooks_adamw():
    config = OptimizerConfig(learning_rate=0.1, beta1=0.9, beta2=0.99, epsilon=1e-8, weight_decay=0.5, clip=0)
    model, params = model_and_params()
    optimizer = make_optimizer(config, model, optax.constant_schedule(0.1))
    updates, _ = advance(optimizer, full(params, 0.3), optimizer.init(params), params)
    # After one step the bias-corrected moments are g and g^2: the step is -lr * (sign(g) + decay * w).
    embedding = np.asarray(params["embedding"])
    np.testing.assert_allclose(updates["embedding"], -0.1 * (1 + 0.5 * embedding), rtol=1e-5)
    np.testing.assert_allclose(updates["norm_f"]["weight"], -0.1 * np.ones(16), rtol=1e-5)


def test_the_defaults_are_the_recipe_of_the_mamba_paper():
    """Gu and Dao 2023, appendix E.2.1: AdamW with beta = (0.9, 0.95), weight decay 0.1, gradients clipped to norm 1."""
    model, params = model_and_params()
    optimizer = make_optimizer(OptimizerConfig(), model, optax.constant_schedule(0.1))
    state, weights, advance = optimizer.init(params), params, jax.jit(optimizer.update)
    embedding, mean, square = np.asarray(params["embedding"], np.float64), 0.0, 0.0
    for step, size in enumerate((3.0, 0.001), 1):
        norm = size * sum(x.size for x in jax.tree.leaves(params)) ** 0.5
        gradient = size / max(norm, 1)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
        direction = mean / (1 - 0.9**step) / ((square / (1 - 0.95**step)) ** 0.5 + 1e-8)
        embedding = embedding - 0.1 * (direction + 0.1 * embedding)
        updates, state = advance(full(params, size), state, weights)
        weights = jax.tree.map(np.add, weights, updates)
    np.testing.assert_allclose(weights["embedding"], embedding, atol=2e-5)
    assert evaluation_weights(weights, state) is weights  # no moving average


def test_gradients_are_clipped_by_their_global_norm():
    config = OptimizerConfig(clip=1.0, weight_decay=0.0)
    model, params = model_and_params()
    optimizer = make_optimizer(config, model, optax.constant_schedule(1.0))
    _, state = advance(optimizer, full(params, 100.0), optimizer.init(params), params)
    first_moments = next(s.mu for s in state if hasattr(s, "mu"))
    np.testing.assert_allclose(optax.global_norm(first_moments), 0.1 * 1.0, rtol=1e-4)


@pytest.mark.parametrize(("embedding_rate", "expected"), [("bottom", 0.5**4), ("full", 1.0)])
def test_layers_learn_more_slowly_the_lower_they_lie(embedding_rate, expected):
    config, params = model_and_params()
    scale = scale_by_layer_decay(config, 0.5, embedding_rate)
    updates, _ = advance(scale, full(params, 1.0), scale.init(params), params)
    np.testing.assert_allclose(updates["layers"]["mixer"]["D"][:, 0], [0.5**3, 0.5**2, 0.5])
    np.testing.assert_allclose(updates["embedding"], expected)
    np.testing.assert_allclose(updates["norm_f"]["weight"], 1)


def test_the_average_follows_the_weights_and_is_what_is_evaluated():
    config, params = model_and_params()
    optimizer = make_optimizer(OptimizerConfig(ema=0.9), config, optax.constant_schedule(0.1))
    state, weights, expected, advance = optimizer.init(params), params, params, jax.jit(optimizer.update)
    for _ in range(3):
        updates, state = advance(full(params, 1.0), state, weights)
        weights = jax.tree.map(np.add, weights, updates)
        expected = jax.tree.map(lambda average, new: 0.9 * average + 0.1 * new, expected, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), evaluation_weights(weights, state), expected)


def test_without_an_average_the_weights_themselves_are_evaluated():
    config, params = model_and_params()
    optimizer = make_optimizer(OptimizerConfig(), config, optax.constant_schedule(0.1))
    assert evaluation_weights(params, optimizer.init(params)) is params


def rates(steps: int = 100, **settings) -> np.ndarray:
    schedule = learning_rate(ScheduleConfig(**settings), 1.0, steps)
    return np.array([schedule(step) for step in range(steps + 1)])


def test_every_schedule_warms_up_from_its_first_step():
    for kind in ("cosine", "linear", "wsd", "constant"):
        rate = rates(kind=kind, warmup_fraction=0.1)
        np.testing.assert_allclose(rate[:10], np.arange(1, 11) / 10, rtol=1e-5)


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_schedules_end_at_the_final_fraction_and_never_rise_after_the_warm_up(kind):
    rate = rates(kind=kind, warmup_fraction=0.1, final_fraction=0.2)
    np.testing.assert_allclose(rate[-1], 0.2, rtol=1e-5)
    assert (np.diff(rate[10:]) <= 1e-7).all()


def test_wsd_is_stable_and_then_decays_as_a_cosine():
    rate = rates(kind="wsd", warmup_fraction=0.1, stable_fraction=0.65, final_fraction=0.1)
    np.testing.assert_allclose(rate[10:76], 1)
    middle = 75 + 25 / 2
    np.testing.assert_allclose((rate[int(middle)] + rate[int(middle) + 1]) / 2, (1 + 0.1) / 2, rtol=1e-2)


def test_a_run_without_warm_up_starts_at_the_peak():
    np.testing.assert_allclose(rates(kind="cosine", warmup_fraction=0.0)[0], 1)
