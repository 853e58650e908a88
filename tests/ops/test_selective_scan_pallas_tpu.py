"""The TPU kernels of `selective_scan`, interpreted on the CPU, against the plain loop in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from devices import on_devices
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch, selective_scan
from biomamba_jax.ops.selective_scan import pallas_tpu
from biomamba_jax.ops.selective_scan.inputs import Inputs
from tests.ops.oracles import assert_close, in_dtype, segment_layouts, with_one_small
from tests.ops.test_selective_scan import (
    ACTIVATIONS,
    ARRAYS,
    CHANNEL_AXES,
    PER_CHANNEL,
    Shape,
    assert_equals_oracle,
    random_inputs,
    small_steps,
    values_and_gradients,
)
from tests.tolerances import TOLERANCES

SMALL = Shape(rows=2, length=37, channels=6, d_state=4)  # all of it padded
FOUR_CHUNKS = Shape(rows=2, length=200, channels=130, d_state=8)  # of 64 steps; two steps of the forward kernel's grid
TWO_TILES = Shape(rows=1, length=16, channels=130, d_state=8)  # of 128 channels, where a tile holds no more


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SMALL, FOUR_CHUNKS], ids=str)
@settings(max_examples=4)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_equals_the_plain_loop_in_values_and_all_gradients(shape, data, seed):
    segment_ids = data.draw(segment_layouts(shape.rows, shape.length))
    inputs = in_dtype(random_inputs(shape, seed), "float32", ACTIVATIONS)
    assert_equals_oracle("pallas_tpu", inputs, segment_ids, "float32")


@pytest.mark.slow
@settings(max_examples=4)
@given(segment_ids=segment_layouts(2, 37), seed=st.integers(0, 2**32 - 1))
def test_bfloat16_inputs_lose_no_more_than_the_rounding_of_the_results(segment_ids, seed):
    inputs = in_dtype(random_inputs(SMALL, seed), "bfloat16", ACTIVATIONS)
    assert_equals_oracle("pallas_tpu", inputs, segment_ids, "bfloat16")


def test_tiles_of_channels_share_B_and_C_and_their_gradients(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "_STATE_REGISTERS", 1)
    inputs = in_dtype(random_inputs(TWO_TILES, 0), "float32", ACTIVATIONS)
    assert_equals_oracle("pallas_tpu", inputs, np.arange(16, dtype=np.int32)[None] // 10, "float32")


def test_small_steps_have_their_gradient_channel_by_channel():
    inputs = in_dtype(small_steps(SMALL, 11), "float32", ACTIVATIONS)
    segment_ids = np.repeat([[0, 1]], [11, 26], axis=1).repeat(2, axis=0).astype(np.int32)
    assert_equals_oracle("pallas_tpu", inputs, segment_ids, "float32", PER_CHANNEL | {"dt_bias": 0})


def test_everything_optional_can_be_left_out():
    inputs = in_dtype(random_inputs(SMALL, 1), "float32", ACTIVATIONS)
    for name in ("D", "z", "dt_bias", "initial_state"):
        del inputs[name]
    assert_equals_oracle("pallas_tpu", inputs, None, "float32")


@pytest.mark.slow
def test_long_and_extreme_decays_stay_finite_and_right():
    shape = Shape(rows=1, length=512, channels=8, d_state=4)
    inputs = random_inputs(shape, 2)
    inputs["dt"] *= 20  # steps from 1e-30 to 100
    inputs["A"] = -np.logspace(-6, 6, 32).reshape(8, 4)
    segment_ids = (np.arange(512, dtype=np.int32)[None] > 300).astype(np.int32)
    assert_equals_oracle("pallas_tpu", in_dtype(inputs, "float32", ACTIVATIONS), segment_ids, "float32")


def test_every_channel_is_right_on_its_own_scale():
    inputs = in_dtype(with_one_small(random_inputs(SMALL, 10), CHANNEL_AXES), "float32", ACTIVATIONS)
    segment_ids = np.repeat([[0, 1]], [11, 26], axis=1).repeat(2, axis=0).astype(np.int32)
    assert_equals_oracle("pallas_tpu", inputs, segment_ids, "float32", PER_CHANNEL)


def test_a_decay_rate_of_zero_is_reset_like_any_other():
    inputs = in_dtype(random_inputs(SMALL, 3), "float32", ACTIVATIONS)
    inputs["A"] = jnp.zeros_like(inputs["A"])
    segment_ids = np.repeat((np.arange(37, dtype=np.int32) // 10)[None], 2, axis=0)
    assert_equals_oracle("pallas_tpu", inputs, segment_ids, "float32")


def test_no_gradient_passes_a_change_of_segment():
    inputs = in_dtype(random_inputs(SMALL, 4), "float32", ACTIVATIONS)
    inputs["dy"] = inputs["dy"].at[:, :20].set(0)
    segment_ids = np.repeat((np.arange(37, dtype=np.int32) >= 20)[None], 2, axis=0).astype(np.int32)
    _, gradients = values_and_gradients("pallas_tpu")(inputs, segment_ids)
    for name in ("x", "dt", "B", "C", "z"):
        assert not np.any(gradients[name][:, :20]), name
    assert not np.any(gradients["initial_state"])


def gradient_of_layers(scan, mesh=None, check_vma=False):
    """A loss of two rematerialised layers in `lax.scan`, each a scan of rows and channels spread over the mesh."""

    def layer(x, arrays):
        y, state = scan(Inputs(x, *arrays))
        return x + y, state

    if mesh is not None:
        row, channel = "data", "model"
        wide, narrow, vector = P(row, None, channel), P(row), P(channel)
        arrays = (wide, vector, narrow, narrow, vector, wide, vector)
        specs = {"in_specs": (wide, arrays), "out_specs": (wide, P(row, channel))}
        # Pallas's interpreter does not follow which values vary; the compiled kernels do (test_kernels_for_tpu.py).
        layer = jax.shard_map(layer, mesh=mesh, **specs, check_vma=check_vma)

    def loss(x, stacked):
        x, states = jax.lax.scan(jax.checkpoint(layer), x, stacked)
        return jnp.sum(x**2) + jnp.sum(states**2)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


@pytest.mark.slow
@on_devices(8)
def test_rows_and_channels_spread_over_a_mesh_under_remat_and_scan_over_layers_equal_one_device():
    inputs = in_dtype(random_inputs(Shape(rows=2, length=16, channels=256, d_state=8), 5), "float32", ACTIVATIONS)
    names = ("dt", "A", "B", "C", "D", "z", "dt_bias")
    stacked = tuple(jnp.stack([inputs[n], 0.5 * inputs[n]]) for n in names)
    scan = partial(pallas_tpu.selective_scan, interpret=True)
    automatic = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), automatic, devices=jax.devices()[:4])
    want = gradient_of_layers(scan)(inputs["x"], stacked)
    got = gradient_of_layers(scan, mesh)(inputs["x"], stacked)
    tolerance = TOLERANCES["selective_scan", "float32"].gradient
    named = dict(zip(names, want[1], strict=True)) | {"x": want[0]}
    assert_close(dict(zip(names, got[1], strict=True)) | {"x": got[0]}, named, tolerance)


@pytest.mark.slow
def test_the_race_detector_reports_none(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "_STATE_REGISTERS", 1)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # no public way to the verdict yet

    inputs = in_dtype(random_inputs(TWO_TILES, 6), "float32", ACTIVATIONS)
    arrays = {name: inputs[name] for name in ARRAYS}
    scan = partial(pallas_tpu.selective_scan, interpret=pltpu.InterpretParams(detect_races=True))
    _, pull_back = jax.vjp(jax.jit(lambda a: scan(Inputs(**a))), arrays)
    jax.block_until_ready(pull_back((inputs["dy"], inputs["d_final_state"])))
    assert interpret_pallas_call.races.races_found is False


def test_a_tpu_program_takes_the_kernels_and_its_single_tokens_do_not():
    arrays = {n: jnp.asarray(v, jnp.float32) for n, v in random_inputs(SMALL, 7).items() if n in ARRAYS}
    one = {n: v[:, :1] if n in ACTIVATIONS else v for n, v in arrays.items()}
    with dispatch.target_platform("tpu"):
        whole = jax.make_jaxpr(lambda a: selective_scan(**a))(arrays)
        step = jax.make_jaxpr(lambda a: selective_scan(**a))(one)
    assert "pallas_call" in str(whole) and "pallas_call" not in str(step)


@pytest.mark.usefixtures("unchecked_shapes")
def test_without_a_tpu_the_kernels_refuse_and_say_why():
    arrays = {n: jnp.asarray(v, jnp.float32) for n, v in random_inputs(SMALL, 8).items() if n in ARRAYS}
    with pytest.raises(UserError, match="'pallas_tpu' cannot be used: it needs a TPU, and this program is for cpu"):
        selective_scan(**arrays, implementation="pallas_tpu")
