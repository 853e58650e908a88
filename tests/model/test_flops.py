"""FLOPs of training."""

import jax
import pytest
from flax import nnx

from biomamba_jax.config import ModelConfig
from biomamba_jax.model import LanguageModel
from biomamba_jax.model.flops import matrix_parameters, training_flops_per_token


@pytest.mark.parametrize(("kind", "beyond"), [("mamba1", 0.02), ("mamba2", 0.05), ("mamba3", 0.05)])
def test_training_takes_six_flops_per_parameter_and_token_and_little_more(kind, beyond):
    mlp = {"d_intermediate": 2500} if kind == "mamba3" else {}
    config = ModelConfig(kind=kind, d_model=2560, n_layers=8, vocab_size=50280, **mlp)
    shapes = nnx.eval_shape(lambda: nnx.state(LanguageModel(config, rngs=nnx.Rngs(0))))
    parameters = sum(x.size for x in jax.tree.leaves(nnx.to_pure_dict(shapes)))
    assert matrix_parameters(config) == pytest.approx(parameters, rel=0.005)
    assert 0.995 < training_flops_per_token(config) / (6 * parameters) < 1 + beyond


def test_the_recurrence_takes_six_flops_per_channel_and_state_forward_and_twice_that_backward():
    small, large = (ModelConfig(kind="mamba2", d_model=64, n_layers=2, vocab_size=64, d_state=n) for n in (16, 32))
    projections_and_convolution = 2 * 2 * 16 * (64 + 4)  # of B and C, 16 more channels each
    more = 3 * 2 * (projections_and_convolution + 6 * 128 * 16)
    assert training_flops_per_token(large) - training_flops_per_token(small) == more
