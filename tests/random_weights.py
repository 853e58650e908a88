"""Random weights of any shape for tests of formats: nothing in them is zero, one or equal to a neighbour."""

import jax
import numpy as np
from flax import nnx

from biomamba_jax.config import ModelConfig
from biomamba_jax.interop import Weights
from biomamba_jax.interop.native import portable
from biomamba_jax.model import LanguageModel


def random_weights(config: ModelConfig, seed: int = 0) -> Weights:
    """The authors' initial values, with noise on everything, so that norms, D and biases matter."""
    params = nnx.to_pure_dict(nnx.state(LanguageModel(config, rngs=nnx.Rngs(seed))))
    random = np.random.default_rng(seed)

    def noisy(x: jax.Array) -> np.ndarray:
        spread = 0.1 if x.ndim < 3 else 0.1 * float(np.std(x)) + 1e-3
        return np.asarray(x) + (spread * random.standard_normal(x.shape)).astype(np.float32)

    return Weights(portable(config), jax.tree.map(noisy, params))
