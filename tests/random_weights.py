"""Random weights of any shape for tests of formats and parity: of sensible size, and nothing in them is 0 or 1."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.typing import DTypeLike

from biomamba_jax.config import ModelConfig
from biomamba_jax.folders import DIGESTS
from biomamba_jax.interop import Weights, write_model
from biomamba_jax.interop.configs import portable
from biomamba_jax.interop.names import native_shapes
from biomamba_jax.model import LanguageModel
from biomamba_jax.parallel.sharding import leaves_by_path

# Mean and spread by a parameter's last name; matrices are spread by the root of their inputs instead.
_MOMENTS = {"A_log": (1.0, 0.5), "D": (1.0, 0.2), "dt_bias": (-4.0, 1.0), "bias": (0.0, 0.1), "embedding": (0.0, 0.3)}


def random_weights(config: ModelConfig, seed: int = 0) -> Weights:
    """Weights without a tokenizer and without a history."""
    draw = np.random.default_rng(seed)

    def values(path: str, shape: tuple[int, ...]) -> np.ndarray:
        name = path.rpartition("/")[2]
        if name in ("kernel", "lm_head") or "conv" in path:
            fan_in = shape[-1] if name != "kernel" else shape[-2]
            mean, spread = _MOMENTS.get(name, (0.0, fan_in**-0.5))
        else:
            mean, spread = _MOMENTS.get(name, (1.0, 0.2))  # norms
        return (mean + spread * draw.standard_normal(shape, dtype=np.float32)).astype(np.float32)

    params = {path: values(path, shape) for path, shape in native_shapes(config).items()}
    return Weights(portable(config), unflatten_dict(params, sep="/"))


def random_model(config: ModelConfig, *, dtype: DTypeLike | None = None) -> LanguageModel:
    """A model of random weights. Compiling the package's own initializers takes longer than most tests."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, dtype=dtype, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree.map(jnp.asarray, random_weights(config).params))


def write_undigested(weights: Weights, folder: Path, dialect: str) -> None:
    """Write a folder as another program does, without digests of its files: a test may change them."""
    write_model(weights, folder, dialect)
    (folder / DIGESTS).unlink()


def same_weights(left: Weights, right: Weights) -> bool:
    """True if two models are the same to the bit: sizes, parameters and head."""
    a, b = (
        leaves_by_path(
            each.params | ({"head": {"weight": each.head.weight, "bias": each.head.bias}} if each.head else {})
        )
        for each in (left, right)
    )
    return left.config == right.config and a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@contextmanager
def flipped_bit(path: Path, draw: random.Random) -> Iterator[None]:
    """Flip a random bit of a file, and flip it back at the end."""
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    path.write_bytes(flipped)
    try:
        yield
    finally:
        path.write_bytes(whole)
