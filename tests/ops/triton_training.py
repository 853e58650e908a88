"""A small model trained with one implementation of the heavy operations, for test_training_triton.py."""

import jax
import numpy as np
import optax
from flax import nnx

from biomamba_jax.config import LossConfig, ModelConfig, OptimizerConfig
from biomamba_jax.model import LanguageModel
from biomamba_jax.ops import dispatch
from biomamba_jax.train.optimizer import make_optimizer
from biomamba_jax.train.setup import initial_state
from biomamba_jax.train.step import language_model_loss, make_train_step

LENGTH = 8


def losses(kind: str, implementation: str, steps: int) -> list[float]:
    """The loss before each step on packed random rows of a few tokens, where they repeat after four steps."""
    choose = dispatch.choose

    def forced(op, _, implementations, *rest):
        return (
            choose(op, None, implementations, *rest)
            if op == "linear_cross_entropy"
            else implementations[implementation]
        )

    dispatch.choose = forced
    try:
        config = ModelConfig(kind=kind, d_model=8, n_layers=1, vocab_size=17, headdim=8, d_state=4)
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), config, optax.constant_schedule(1e-2))
        graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
        state = initial_state(config, optimizer, seed=0)
        advance = jax.jit(make_train_step(language_model_loss(graph, LossConfig()), optimizer, 1))
        found = []
        for step in range(steps):
            random = np.random.default_rng(step % 4)
            tokens = random.integers(0, 17, (2, LENGTH + 1), np.int32)
            segment_ids = np.sort(random.integers(1, 4, (2, LENGTH), np.int32), axis=1)
            batch = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segment_ids}
            state, report = advance(state, batch)
            found.append(float(report.sums.nll / report.sums.weight))
        return found
    finally:
        dispatch.choose = choose
