"""The compiled step has the intended collectives and no others: activations are never all-gathered."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import optax
import pytest
from devices import on_devices
from jax.sharding import NamedSharding

from biomamba_jax.config import LossConfig, MeshConfig, ModelConfig
from biomamba_jax.parallel.mesh import BATCH_SPEC, make_mesh
from biomamba_jax.train.program import abstract_model, initial_state
from biomamba_jax.train.step import language_model_loss, make_train_step

ROWS, LENGTH = 8, 24
CONFIGS = {
    "mamba1": ModelConfig(kind="mamba1", d_model=32, n_layers=3, vocab_size=80, d_state=4, dt_rank=8),
    "mamba2": ModelConfig(kind="mamba2", d_model=32, n_layers=3, vocab_size=80, headdim=4, d_state=5),
}


def collectives(config: ModelConfig, **sizes: int) -> dict[str, Counter]:
    """Return kind -> shape of the result -> occurrences in the compiled step, where a loop over layers counts once."""
    graph, layout = abstract_model(config, make_mesh(MeshConfig(**{"data": 1} | sizes)))
    optimizer = optax.sgd(0.1)
    state = jax.eval_shape(lambda: initial_state(config, optimizer, 0))
    state = jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, layout.shardings(state))
    rows = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32, sharding=NamedSharding(layout.mesh, BATCH_SPEC))
    step = make_train_step(language_model_loss(graph, LossConfig(), layout.collectives), optimizer, 1, layout)
    batch = dict.fromkeys(("inputs", "targets", "segment_ids"), rows)
    text = re.sub(r"/\*.*?\*/", "", jax.jit(step).lower(state, batch).compile().as_text())
    found: dict[str, Counter] = {}
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    for results, kind in re.findall(rf"= (\(?[^=]*?) ({kinds})(?:-start)?\(", text):
        for shape in re.findall(r"\[([\d,]*)\]", results):
            found.setdefault(kind, Counter())[tuple(map(int, shape.split(","))) if shape else ()] += 1
    return found


def parameter_shapes(config: ModelConfig) -> set[tuple[int, ...]]:
    shapes = jax.eval_shape(lambda: initial_state(config, optax.sgd(0.1), 0)).params
    return {leaf.shape for leaf in jax.tree.leaves(shapes)}


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@on_devices(8)
def test_fsdp_gathers_each_layer_twice_and_scatters_its_gradients_once(kind):
    # Global shape of each kernel -> its shard on one of 8 devices. The tied embedding's two gradients
    # are added before they are reduce-scattered.
    kernels = {
        "mamba1": {(32, 64): (4, 64), (64, 16): (8, 16), (8, 64): (8, 8), (64, 32): (64, 4)},
        "mamba2": {(32, 64): (4, 64), (32, 10): (4, 10), (32, 16): (4, 16), (64, 32): (64, 4)},
    }[kind]
    a_layer = {whole: 2 if whole == (32, 64) else 1 for whole in kernels}  # in_x and in_z have the same shape
    found = collectives(CONFIGS[kind], fsdp=8)
    assert found.pop("all-gather") == {whole: 2 * count for whole, count in a_layer.items()} | {(80, 32): 1}
    assert found.pop("reduce-scatter") == {kernels[whole]: count for whole, count in a_layer.items()} | {(80, 4): 1}
    assert set(found.pop("all-reduce")) <= parameter_shapes(CONFIGS[kind]) | {()}
    assert not found


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@on_devices(8)
def test_tensor_all_reduces_activations_where_channels_and_the_vocabulary_meet(kind):
    # A layer's output and the gradient of its input, the same of the model's ends, and three figures a token for the
    # softmax; the rest is small: Mamba-1's dt, B and C, or Mamba-2's gradient of B and C and means for its norm.
    small = {"mamba1": {(8, 24, 16): 2}, "mamba2": {(8, 24, 10): 1, (8, 24, 1): 3}}[kind]
    found = collectives(CONFIGS[kind], tensor=8)
    sums = found.pop("all-reduce")
    sums.pop(())
    assert sums == {(8, 24, 32): 4, (192,): 3} | small
    assert not found


@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@on_devices(8)
def test_sequence_passes_states_to_the_right_and_their_gradients_to_the_left(kind):
    # One shift and three doublings for states, of which the last needs no decay; there and back.
    states = {"mamba1": {(8, 64, 4): 8 + 6}, "mamba2": {(8, 16, 4, 5): 8, (8, 16, 1, 1): 6}}[kind]
    halos = {"mamba1": {(8, 3, 64): 2}, "mamba2": {(8, 3, 64): 2, (8, 3, 10): 2}}[kind]
    found = collectives(CONFIGS[kind], data=1, sequence=8)
    assert found.pop("collective-permute") == states | halos | {(8,): 1}
    assert set(found.pop("all-reduce")) <= parameter_shapes(CONFIGS[kind]) | {()}
    assert not found
