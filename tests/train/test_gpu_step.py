"""A training step of the 130m models over eight H100s compiles with the Mosaic GPU kernels in it, and no GPU."""

import pytest

from tests import h100


def step(devices, kind: str):
    """Return the step and the shapes of its arguments, with rows sharded over all devices."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import NamedSharding

    from biomamba_jax.config import LossConfig, MeshConfig, ModelConfig, OptimizerConfig
    from biomamba_jax.parallel.mesh import BATCH_SPEC, make_mesh
    from biomamba_jax.train.optimizer import make_optimizer
    from biomamba_jax.train.program import abstract_model, initial_state
    from biomamba_jax.train.step import language_model_loss, make_train_step

    config = ModelConfig(kind=kind, d_model=768, n_layers=24, vocab_size=50277, compute_dtype="bfloat16")
    optimizer = make_optimizer(OptimizerConfig(), config, optax.constant_schedule(1e-3))
    graph, layout = abstract_model(config, make_mesh(MeshConfig(8, 1, 1, 1), devices))
    state = jax.eval_shape(lambda: initial_state(config, optimizer, 0))
    state = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, layout.shardings(state))
    rows = jax.ShapeDtypeStruct((64, 1024), jnp.int32, sharding=NamedSharding(layout.mesh, BATCH_SPEC))
    batch = dict.fromkeys(("inputs", "targets", "segment_ids"), rows)
    return make_train_step(language_model_loss(graph, LossConfig(), layout.collectives), optimizer, layout=layout), (
        state,
        batch,
    )


@pytest.mark.ahead_of_time
@pytest.mark.parametrize(("kind", "kernels"), [("mamba1", 2), ("mamba2", 3)])
def test_a_step_over_eight_h100s_has_the_kernels_in_it(kind, kernels):
    program = h100.compiled("tests.train.test_gpu_step:step", kind=kind)
    # One layer's forward kernel runs again in the backward pass where activations are not kept.
    assert program.mosaic_calls >= kernels
    assert all(kernel.spilled_bytes == 0 for kernel in program.kernels)
