"""Training on any mesh gives the losses and gradients of one device."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from devices import on_devices
from random_weights import random_weights

from biomamba_jax.config import LossConfig, MeshConfig, ModelConfig, OptimizerConfig
from biomamba_jax.parallel.mesh import AXES, make_mesh, shard_batch
from biomamba_jax.parallel.sharding import mesh_axes
from biomamba_jax.train.optimizer import make_optimizer
from biomamba_jax.train.program import abstract_model, initial_state
from biomamba_jax.train.step import language_model_loss, make_train_step

STEPS = 10
ALL_MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8]
CONFIGS = {
    "mamba1": ModelConfig(kind="mamba1", d_model=16, n_layers=2, vocab_size=61, d_state=4, bias=True),
    "mamba2": ModelConfig(
        kind="mamba2", d_model=16, n_layers=2, vocab_size=61, headdim=4, d_state=4, n_groups=2, tie_embeddings=False
    ),
    "mamba3": ModelConfig(
        kind="mamba3", d_model=16, n_layers=2, vocab_size=61, headdim=4, d_state=4, n_groups=2, d_intermediate=100,
        mimo_rank=2, outproj_norm=True,
    ),
}  # fmt: skip


def packed_batch(rows: int = 8, length: int = 64) -> dict[str, np.ndarray]:
    """Rows of several documents, whose borders fall anywhere, and some padding."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, 61, (rows, length + 1), np.int32)
    segment_ids = np.cumsum(random.random((rows, length)) < 0.06, axis=1, dtype=np.int32) + 1
    segment_ids[0, 40:] = 0
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segment_ids}


def keep_gradients() -> optax.GradientTransformation:
    """Changes nothing; its state is the last gradient."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, state, params=None: (updates, updates)
    )


def train(config: ModelConfig, sizes: tuple[int, ...], accumulation: int = 1, reduce_dtype: str = "float32"):
    """Losses of all steps, gradient of the first, last parameters."""
    mesh = make_mesh(MeshConfig(*sizes), jax.devices()[: np.prod(sizes)])
    graph, layout = abstract_model(config, mesh, reduce_dtype)
    adam = make_optimizer(OptimizerConfig(ema=0.9), config, optax.constant_schedule(1e-3))
    optimizer = optax.chain(keep_gradients(), adam)
    # Mamba-1 draws its own, sharded, by initializers that take long to compile.
    params = None if config.kind == "mamba1" else random_weights(config).params
    like = jax.eval_shape(lambda: initial_state(config, optimizer, 0, params))
    state = jax.jit(lambda: initial_state(config, optimizer, 0, params), out_shardings=layout.shardings(like))()
    loss = language_model_loss(graph, LossConfig(label_smoothing=0.1, z_loss=1e-4), layout.collectives)
    step = jax.jit(make_train_step(loss, optimizer, accumulation, layout), donate_argnums=0)
    batch, losses, gradients = shard_batch(packed_batch(), mesh), [], None
    for _ in range(STEPS):
        state, report = step(state, batch)
        losses.append(float(report.sums.loss / report.sums.weight))
        gradients = gradients or jax.device_get(state.optimizer[0])
    for name, kept in (("gradients", state.optimizer[0]), ("average", state.optimizer[1][-1].average)):
        same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), kept, state.params)
        assert all(jax.tree.leaves(same)), f"{name} are sharded otherwise than their parameters"
    return losses, gradients, jax.device_get(state.params)


def check_meshes(config: ModelConfig, meshes: list[tuple[int, ...]]) -> None:
    expected = train(config, (1, 1, 1, 1))
    for sizes in meshes:
        where = str(dict(zip(AXES, sizes, strict=True)))
        losses, gradients, _ = train(config, sizes)
        np.testing.assert_allclose(losses, expected[0], rtol=1e-5, err_msg=where)
        for path, want in jax.tree_util.tree_leaves_with_path(expected[1]):
            got = gradients
            for key in path:
                got = got[key.key]
            error = np.abs(got - want).max() / np.abs(want).max()
            assert error < 2e-5, f"{where}: gradient of {jax.tree_util.keystr(path)} is off by {error:.1e}"


@pytest.mark.parametrize("kind", CONFIGS)
@on_devices(8)
def test_devices_train_as_one(kind):
    check_meshes(CONFIGS[kind], [(1, 2, 2, 2)])


@pytest.mark.parametrize("sizes", [(2, 4, 1, 1), (8, 1, 1, 1)], ids=["fsdp", "copies"])
@on_devices(8)
def test_gradients_summed_over_devices_in_bfloat16_are_those_of_float32_to_its_rounding(sizes):
    exact, rounded = (train(CONFIGS["mamba2"], sizes, reduce_dtype=dtype) for dtype in ("float32", "bfloat16"))
    np.testing.assert_allclose(rounded[0], exact[0], rtol=2e-3)
    specs = abstract_model(CONFIGS["mamba2"], make_mesh(MeshConfig(2, 4)))[1].specs
    for path, want in jax.tree_util.tree_leaves_with_path(exact[1]):
        got = rounded[1]
        for key in path:
            got = got[key.key]
        assert got.dtype == np.float32
        error = np.abs(got - want).max() / np.abs(want).max()
        name = "/".join(key.key for key in path)
        assert error < 4 * 2**-8 and (error > 1e-5) == ("fsdp" in mesh_axes(specs[name])), name


@pytest.mark.long
@pytest.mark.parametrize("kind", CONFIGS)
@on_devices(8)
def test_every_mesh_of_eight_devices_trains_as_one(kind):
    check_meshes(CONFIGS[kind], ALL_MESHES)


@on_devices(8)
def test_mamba_3_of_one_rank_trains_as_one_along_every_axis():
    config = dataclasses.replace(CONFIGS["mamba3"], mimo_rank=None, outproj_norm=False, n_groups=1)
    check_meshes(config, [(2, 2, 2, 1), (2, 1, 2, 2)])
