"""A small model trained with one implementation of the heavy operations, for test_training_with_kernels.py."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from biomamba_jax.config import LossConfig, ModelConfig, OptimizerConfig
from biomamba_jax.model import LanguageModel
from biomamba_jax.ops import dispatch
from biomamba_jax.train.optimizer import make_optimizer
from biomamba_jax.train.program import initial_state
from biomamba_jax.train.step import language_model_loss, make_train_step

LENGTH = 8
SIZES: Mapping[str, Mapping[str, int]] = {
    "triton": {"d_model": 8, "headdim": 8, "d_state": 4},
    "pallas_tpu": {"d_model": 64, "headdim": 64, "d_state": 8},
    "pallas_gpu": {"d_model": 32, "headdim": 64, "d_state": 8},
}
"""Small ones that the kernels of that name take: pairs of heads of 64 channels on TPU, heads of 64 on Mosaic GPU."""


def losses(
    kind: str,
    implementation: str,
    steps: int,
    sizes: Mapping[str, int],
    *,
    options: Mapping[str, Any] | None = None,
    compiler_options: Mapping[str, Any] | None = None,
) -> list[float]:
    """The loss before each step on packed random rows of a few tokens, which repeat after four steps.

    Args:
      sizes: of the model, a value of `SIZES`.
      options: given to the implementation besides.
      compiler_options: for the step.
    """
    choose = dispatch.choose

    def forced(op: str, _: Any, implementations: Mapping[str, Any], *rest: Any, **options_of_choice: Any) -> Any:
        if op == "linear_cross_entropy" or implementation not in implementations:
            return choose(op, None, implementations, *rest, **options_of_choice)
        return functools.partial(implementations[implementation], **(options or {}))

    dispatch.choose = forced
    try:
        config = ModelConfig(kind=kind, n_layers=1, vocab_size=17, **sizes)
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), config, optax.constant_schedule(1e-2))
        graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
        state = initial_state(config, optimizer, seed=0)
        step = make_train_step(language_model_loss(graph, LossConfig()), optimizer, 1)
        advance = jax.jit(step, compiler_options=compiler_options)
        found = []
        for number in range(steps):
            state, report = advance(state, _batch(number % 4))
            found.append(float(report.sums.nll / report.sums.weight))
        return found
    finally:
        dispatch.choose = choose


def _batch(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 17, (2, LENGTH + 1), np.int32)
    segment_ids = np.sort(random.integers(1, 4, (2, LENGTH), np.int32), axis=1)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segment_ids}
