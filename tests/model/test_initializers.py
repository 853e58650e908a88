"""Initial values are the authors'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from biomamba_jax.config import ModelConfig
from biomamba_jax.model import LanguageModel

LAYERS = 4


@pytest.fixture(scope="module", params=["mamba1", "mamba2"])
def params(request):
    config = ModelConfig(kind=request.param, d_model=128, n_layers=LAYERS, vocab_size=1000, headdim=8)
    return request.param, nnx.to_pure_dict(nnx.state(LanguageModel(config, rngs=nnx.Rngs(0))))


def test_time_steps_are_log_uniform_between_their_bounds(params):
    dt = np.log(jax.nn.softplus(params[1]["layers"]["mixer"]["dt_bias"]))
    low, high = np.log(1e-3), np.log(1e-1)
    assert low - 1e-3 <= dt.min() and dt.max() <= high + 1e-3
    np.testing.assert_allclose([dt.mean(), dt.std()], [(low + high) / 2, (high - low) / 12**0.5], rtol=0.1)


def test_decay_rates(params):
    kind, tree = params
    A = np.exp(tree["layers"]["mixer"]["A_log"])
    if kind == "mamba1":
        np.testing.assert_allclose(A, np.broadcast_to(np.arange(1, 17), A.shape), rtol=1e-5)
    else:
        assert A.min() >= 1 and A.max() <= 16
        np.testing.assert_allclose(A.mean(), 8.5, rtol=0.1)


def test_the_embedding_is_normal_and_linears_are_uniform_by_their_fan_in(params):
    _, tree = params
    np.testing.assert_allclose(np.std(tree["embedding"]), 0.02, rtol=0.02)
    kernel = np.asarray(tree["layers"]["mixer"]["in_x"]["kernel"])
    np.testing.assert_allclose(np.abs(kernel).max(), 128**-0.5, rtol=1e-3)
    np.testing.assert_allclose(kernel.std(), 128**-0.5 / 3**0.5, rtol=0.02)


def test_output_projections_shrink_with_depth(params):
    kernel = np.asarray(params[1]["layers"]["mixer"]["out"]["kernel"])
    np.testing.assert_allclose(np.abs(kernel).max(), (256 * LAYERS) ** -0.5, rtol=1e-3)


def test_the_skip_is_one_and_layers_differ(params):
    mixer = params[1]["layers"]["mixer"]
    np.testing.assert_array_equal(mixer["D"], 1)
    assert not np.allclose(mixer["in_x"]["kernel"][0], mixer["in_x"]["kernel"][1])


def test_the_same_seed_gives_the_same_model():
    config = ModelConfig(d_model=16, n_layers=2, vocab_size=30, headdim=8)
    first, second = (nnx.state(LanguageModel(config, rngs=nnx.Rngs(3))) for _ in range(2))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, jnp.asarray(b)), first, second)
