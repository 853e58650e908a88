"""Ops on rows whose tokens are sharded over devices return what they return on one device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_devices
from jax.sharding import PartitionSpec
from tolerances import TOLERANCES

from biomamba_jax import ops
from biomamba_jax.config import MeshConfig
from biomamba_jax.errors import UserError
from biomamba_jax.parallel import sequence
from biomamba_jax.parallel.mesh import make_mesh

ROWS, LENGTH, DEVICES = 3, 64, 8
PER_DEVICE = LENGTH // DEVICES
TOKENS = PartitionSpec(None, "sequence")
EVERYWHERE = PartitionSpec()


def segments() -> np.ndarray:
    """Return rows with a segment over several devices, with segments that end with shards, and with any segments."""
    ids = np.ones((ROWS, LENGTH), np.int32)
    ids[0, 5:] = 2
    ids[0, 5 + 4 * PER_DEVICE :] = 3
    ids[1] = np.arange(LENGTH) // (2 * PER_DEVICE)
    ids[2] = np.cumsum(np.random.default_rng(1).random(LENGTH) < 0.15)
    return ids


def inputs(op: str) -> dict[str, tuple[np.ndarray, PartitionSpec]]:
    """Return float64 arguments and their PartitionSpecs by name."""
    random = np.random.default_rng(0)
    shapes = {
        "causal_conv1d": {
            "x": (ROWS, LENGTH, 6),
            "weight": (6, 4),
            "bias": (6,),
            "initial_state": (ROWS, 3, 6),
        },
        "selective_scan": {
            "x": (ROWS, LENGTH, 6),
            "dt": (ROWS, LENGTH, 6),
            "A": (6, 5),
            "B": (ROWS, LENGTH, 5),
            "C": (ROWS, LENGTH, 5),
            "D": (6,),
            "z": (ROWS, LENGTH, 6),
            "dt_bias": (6,),
            "initial_state": (ROWS, 6, 5),
        },
        "ssd": {
            "x": (ROWS, LENGTH, 4, 3),
            "dt": (ROWS, LENGTH, 4),
            "A": (4,),
            "B": (ROWS, LENGTH, 2, 5),
            "C": (ROWS, LENGTH, 2, 5),
            "D": (4,),
            "dt_bias": (4,),
            "initial_state": (ROWS, 4, 3, 5),
        },
    }[op]
    arrays = {name: random.normal(size=shape) for name, shape in shapes.items()}
    if "A" in arrays:
        arrays["A"] = -np.exp(arrays["A"] - 1)
        arrays["dt"] -= 2
    return {name: (v, TOKENS if v.ndim > 2 and v.shape[1] == LENGTH else EVERYWHERE) for name, v in arrays.items()}


@pytest.mark.parametrize("op", ["causal_conv1d", "selective_scan", "ssd"])
@on_devices(DEVICES)
@jax.enable_x64(True)
def test_outputs_states_and_gradients_are_those_of_one_device(op):
    mesh = make_mesh(MeshConfig(data=1, sequence=DEVICES))
    given = inputs(op)
    random = np.random.default_rng(2)
    y_weights = random.normal(size=given["x"][0].shape)
    state_weights = random.normal(size=given["initial_state"][0].shape)

    def loss(function, arrays, y_weights, last, segment_ids):
        y, state = function(**arrays, segment_ids=segment_ids)
        return jnp.sum(y * y_weights) + jnp.sum(jnp.where(last, state * state_weights, 0)), (y, state)

    for segment_ids, left_out in ((segments(), ""), (None, "initial_state")):
        arrays = {name: v for name, (v, _) in given.items() if name != left_out}
        specs = {name: spec for name, (_, spec) in given.items() if name != left_out}

        def on_each_device(arrays, y_weights, segment_ids, specs=specs):
            continues = sequence.continues_segment(segment_ids, ROWS, DEVICES)
            function = partial(getattr(sequence, op), continues=continues, size=DEVICES)
            last = jax.lax.axis_index("sequence") == DEVICES - 1
            found = jax.value_and_grad(loss, argnums=1, has_aux=True)(function, arrays, y_weights, last, segment_ids)
            (_, (y, state)), gradients = found
            gradients = {
                name: g if specs[name] == TOKENS else jax.lax.psum(g, "sequence") for name, g in gradients.items()
            }
            return y, jax.lax.psum(jnp.where(last, state, 0), "sequence"), gradients

        mapped = jax.shard_map(
            on_each_device,
            mesh=mesh,
            in_specs=(specs, TOKENS, None if segment_ids is None else TOKENS),
            out_specs=(TOKENS, EVERYWHERE, specs),
            check_vma=False,
        )
        y, state, gradients = jax.jit(mapped)(arrays, y_weights, segment_ids)

        plain = partial(getattr(ops, op), return_final_state=True, implementation="reference")
        want = jax.jit(jax.value_and_grad(partial(loss, plain), has_aux=True))(arrays, y_weights, True, segment_ids)
        (_, (want_y, want_state)), want_gradients = want
        tolerance = TOLERANCES[op, "float64"]
        compare("y", y, want_y, tolerance.value)
        compare("state", state, want_state, tolerance.value)
        for name in arrays:
            compare(f"gradient of {name}", gradients[name], want_gradients[name], tolerance.gradient)


def compare(name: str, got: jax.Array, want: jax.Array, tolerance: float) -> None:
    error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    assert error <= tolerance, f"{name}: {error:.1e} > {tolerance:.0e}"


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_device_with_too_few_tokens_for_the_convolution_is_refused():
    x = jnp.zeros((1, 2, 4))
    with pytest.raises(UserError, match=r"mesh.sequence = 8: leaves 2 tokens"):
        sequence.causal_conv1d(x, jnp.zeros((4, 4)), None, continues=jnp.ones(1, bool), size=8)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["mamba1", "mamba2"])
@on_devices(8)
def test_memory_of_each_device_falls_as_a_row_of_262144_tokens_is_sharded_over_more(kind):
    import optax
    from jax.sharding import NamedSharding

    from biomamba_jax.config import LossConfig, ModelConfig
    from biomamba_jax.parallel.mesh import BATCH_SPEC
    from biomamba_jax.train.program import abstract_model, initial_state
    from biomamba_jax.train.step import language_model_loss, make_train_step

    config = ModelConfig(kind=kind, d_model=8, n_layers=2, vocab_size=16, headdim=4, d_state=4, remat="full")
    optimizer, memory = optax.sgd(0.1), {}
    for devices in (1, 2, 4, 8):
        mesh = make_mesh(MeshConfig(data=1, sequence=devices), jax.devices()[:devices])
        graph, layout = abstract_model(config, mesh)
        state = jax.jit(lambda: initial_state(config, optimizer, 0))()
        state = jax.device_put(state, layout.shardings(state))
        tokens = np.random.default_rng(0).integers(1, 16, (1, 2**18), np.int32)
        tokens = jax.device_put(tokens, NamedSharding(mesh, BATCH_SPEC))
        batch = {"inputs": tokens, "targets": tokens, "segment_ids": jnp.ones_like(tokens)}
        step = jax.jit(
            make_train_step(language_model_loss(graph, LossConfig(), layout.collectives), optimizer, 1, layout)
        )
        compiled = step.lower(state, batch).compile()
        memory[devices] = compiled.memory_analysis().temp_size_in_bytes
        print(f"{kind}, {devices} devices: {memory[devices] / 2**20:.1f} MiB each")
    _, report = compiled(state, batch)
    assert np.isfinite(report.gradient_norm)
    assert all(memory[2 * n] < 0.6 * memory[n] for n in (1, 2, 4)), memory
