"""The Mosaic GPU kernels of `ssd`: numbers by Pallas's interpreter against the plain recurrence in float64, and
programs by the compiler for an H100 that is not there."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch, ssd
from biomamba_jax.ops.ssd import pallas_gpu
from tests import h100
from tests.ops import mosaic_interpreter
from tests.ops.oracles import assert_close, with_one_small
from tests.ops.test_ssd import (
    HEAD_AXES,
    PER_HEAD,
    PER_SMALL_STEP,
    Shape,
    assert_equal_the_recurrence,
    extreme_inputs,
    given_decays,
    in_dtype,
    of_kernels,
    random_inputs,
    segment_layouts,
    small_steps,
)
from tests.tolerances import TOLERANCES

CHUNK = 64
PAIR = Shape(rows=1, length=70, heads=2, headdim=64, d_state=24, groups=1, chunk=CHUNK)  # states pass between chunks
GROUPS = PAIR._replace(rows=2, heads=4, groups=2, length=40)
TWO_TILES = PAIR._replace(heads=1, d_state=128)  # of 64 states


def interpreted(inputs, segment_ids):
    return mosaic_interpreter.in_threads(_interpreted, jax.tree.map(np.asarray, inputs), segment_ids)


def _interpreted(inputs, segment_ids):
    kernels = partial(pallas_gpu.ssd, interpret=mosaic_interpreter.parameters())
    return jax.tree.map(np.asarray, of_kernels(kernels, jax.tree.map(jnp.asarray, inputs), segment_ids))


def assert_matches_recurrence(inputs: dict[str, np.ndarray], segment_ids, dtype: str, per=None) -> None:
    arrays = in_dtype(inputs, dtype)
    # The kernels' products are of bfloat16 whatever the dtype of the inputs.
    tolerance = TOLERANCES["ssd", "bfloat16"]
    assert_equal_the_recurrence(interpreted(arrays, segment_ids), arrays, segment_ids, tolerance, per)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [PAIR, GROUPS], ids=str)
@settings(max_examples=1)
@given(data=st.data())
def test_values_and_all_gradients_match_the_recurrence(shape, data):
    inputs = random_inputs(shape, data.draw(st.integers(0, 2**16)))
    assert_matches_recurrence(inputs, data.draw(segment_layouts(shape)), "bfloat16")


@pytest.mark.slow
def test_every_head_is_right_on_its_own_scale():
    segment_ids = np.repeat([[1, 2]], [50, 20], axis=1).astype(np.int32)
    inputs = with_one_small(random_inputs(PAIR, 10), HEAD_AXES)
    assert_matches_recurrence(inputs, segment_ids, "bfloat16", PER_HEAD)


@pytest.mark.slow
def test_given_decays_of_heads_with_their_own_b_and_c_match_the_recurrence():
    segment_ids = np.repeat([[1, 2]], [50, 20], axis=1).astype(np.int32)
    assert_matches_recurrence(given_decays(PAIR._replace(groups=2), 12), segment_ids, "bfloat16")


@pytest.mark.slow
def test_small_steps_have_their_gradient_head_by_head():
    segment_ids = np.repeat([[1, 2]], [50, 20], axis=1).astype(np.int32)
    assert_matches_recurrence(small_steps(PAIR, 11), segment_ids, "bfloat16", PER_SMALL_STEP)


@pytest.mark.slow
def test_extreme_steps_and_decays_stay_finite_and_right():
    resets = np.random.default_rng(1).random((PAIR.rows, PAIR.length)) < 0.02
    assert_matches_recurrence(extreme_inputs(PAIR, 1, 1), np.cumsum(resets, axis=1).astype(np.int32), "bfloat16")


@pytest.mark.slow
def test_two_tiles_of_states_match_and_everything_optional_can_be_left_out():
    inputs = random_inputs(TWO_TILES, 2)
    for name in ("D", "dt_bias", "initial_state"):
        del inputs[name]
    assert_matches_recurrence(inputs, None, "bfloat16")


@pytest.mark.slow
def test_float32_inputs_have_bfloat16_products_and_exact_skips():
    inputs = random_inputs(PAIR, 3)
    inputs["C"] *= 0
    assert_matches_recurrence(inputs, np.repeat([[1, 2]], [50, 20], axis=1).astype(np.int32), "float32")
    arrays = in_dtype(inputs, "float32")
    del arrays["initial_state"]
    values, _ = interpreted(arrays, None)
    skipped = inputs["D"][:, None] * inputs["x"]
    assert_close(values, {"y": skipped}, TOLERANCES["ssd", "float32"].value)


@pytest.mark.slow
def test_nothing_at_all_crosses_a_segment_boundary():
    """Not even a rounding error, in values or gradients, within a chunk or between chunks."""
    segment_ids = np.repeat([[1, 2, 3]], [30, 39, 1], axis=1).astype(np.int32)
    inside = segment_ids == 2
    inputs, other = random_inputs(PAIR, 4), random_inputs(PAIR, 5)
    changed = dict(inputs)
    for name in ("x", "dt", "B", "C", "dy"):
        where = inside.reshape(*inside.shape, *[1] * (inputs[name].ndim - 2))
        changed[name] = np.where(where, inputs[name], other[name])
    changed["initial_state"] = other["initial_state"]
    values, gradients = interpreted(in_dtype(inputs, "bfloat16"), segment_ids)
    changed_values, changed_gradients = interpreted(in_dtype(changed, "bfloat16"), segment_ids)
    np.testing.assert_array_equal(values["y"][inside], changed_values["y"][inside])
    for name in ("x", "B", "C"):
        np.testing.assert_array_equal(gradients[name][inside], changed_gradients[name][inside], err_msg=name)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("changes", "target", "reason"),
    [
        ({}, ("cpu", None), "needs a GPU, and this program is for cpu"),
        ({}, ("gpu", 80), "this one is sm_80"),
        ({}, ("gpu", 100), "this one is sm_100"),
        ({"headdim": 32}, ("gpu", 90), "headdim is 32, not 64"),
        ({"d_state": 256}, ("gpu", 90), "d_state is 256, more than 128"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(changes, target, reason):
    inputs = in_dtype(random_inputs(GROUPS._replace(**changes), 7), "bfloat16")
    with dispatch.target_platform(*target), pytest.raises(UserError, match=reason):
        ssd(*(inputs[k] for k in ("x", "dt", "A", "B", "C")), implementation="pallas_gpu")


def gradients_at_130m(devices, segments: bool, dtype: str = "bfloat16"):
    """A builder: values and all gradients in a batch of 8 x 1,024, as in a training step of Mamba-2 130m."""
    del devices
    vector = jax.ShapeDtypeStruct((24,), jnp.float32)
    shapes = ((8, 1024, 24, 64), (8, 1024, 24), (8, 1024, 1, 128))
    x, dt, narrow = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    arrays = {"x": x, "dt": dt, "A": vector, "B": narrow, "C": narrow, "D": vector, "dt_bias": vector}
    ids = jax.ShapeDtypeStruct((8, 1024), jnp.int32) if segments else None

    def run(arrays, ids):
        y, pull_back = jax.vjp(lambda v: ssd(**v, segment_ids=ids, implementation="pallas_gpu"), arrays)
        return y, pull_back(y)

    return run, (arrays, ids)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_they_lower_for_hopper_wherever_jax_is_and_fit_into_shared_memory(dtype):
    function, arguments = gradients_at_130m(None, segments=True, dtype=dtype)
    with dispatch.target_platform("gpu", 90):
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 3


@pytest.mark.ahead_of_time
@pytest.mark.parametrize("segments", [True, False])
def test_they_compile_for_an_h100_and_keep_their_values_in_registers(segments):
    program = h100.compiled("tests.ops.test_ssd_pallas_gpu:gradients_at_130m", segments=segments)
    kernels = {kernel.name.removesuffix("_mosaic_gpu_kernel"): kernel for kernel in program.kernels}
    assert set(kernels) == {"ssd_forward", "ssd_backward_states", "ssd_backward"}
    assert {name: kernel.spilled_bytes for name, kernel in kernels.items()} == dict.fromkeys(kernels, 0)
