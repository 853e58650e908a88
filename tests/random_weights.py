"""Random weights of any shape for tests of formats and parity: of sensible size, and nothing in them is 0 or 1."""

from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from biomamba_jax.config import ModelConfig
from biomamba_jax.folders import DIGESTS
from biomamba_jax.interop import Weights, write_model
from biomamba_jax.interop.configs import portable
from biomamba_jax.interop.names import native_shapes

# Mean and spread by a parameter's last name; matrices are spread by the root of their inputs instead.
_MOMENTS = {"A_log": (1.0, 0.5), "D": (1.0, 0.2), "dt_bias": (-4.0, 1.0), "bias": (0.0, 0.1), "embedding": (0.0, 0.3)}


def random_weights(config: ModelConfig, seed: int = 0) -> Weights:
    """Weights without a tokenizer and without a history."""
    random = np.random.default_rng(seed)

    def values(path: str, shape: tuple[int, ...]) -> np.ndarray:
        name = path.rpartition("/")[2]
        if name in ("kernel", "lm_head") or "conv" in path:
            fan_in = shape[-1] if name != "kernel" else shape[-2]
            mean, spread = _MOMENTS.get(name, (0.0, fan_in**-0.5))
        else:
            mean, spread = _MOMENTS.get(name, (1.0, 0.2))  # norms
        return (mean + spread * random.standard_normal(shape, dtype=np.float32)).astype(np.float32)

    params = {path: values(path, shape) for path, shape in native_shapes(config).items()}
    return Weights(portable(config), unflatten_dict(params, sep="/"))


def write_undigested(weights: Weights, folder: Path, dialect: str) -> None:
    """Write a folder as another program does, without digests of its files: a test may change them."""
    write_model(weights, folder, dialect)
    (folder / DIGESTS).unlink()
