"""The Triton kernels of `selective_scan`: numbers by Triton's interpreter, against the plain loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba_jax.errors import UserError
from biomamba_jax.ops import selective_scan
from tests.compilers import needs_triton
from tests.ops import triton_interpreter
from tests.ops.oracles import in_dtype, segment_layouts, with_one_small
from tests.ops.test_selective_scan import (
    ACTIVATIONS,
    ARRAYS,
    CHANNEL_AXES,
    PER_CHANNEL,
    Shape,
    assert_equal_the_plain_loop,
    random_inputs,
    small_steps,
)

ODD = Shape(rows=2, length=11, channels=5, d_state=3)  # no size fits a block
MANY = Shape(rows=1, length=20, channels=34, d_state=4)  # three chunks and two blocks of channels


def triton(inputs: dict[str, jax.Array], segment_ids: np.ndarray | None) -> tuple[dict, dict]:
    return triton_interpreter.values_and_gradients("selective_scan", inputs, ARRAYS, segment_ids, {"CHUNK": 8})


def assert_equals_the_plain_loop(inputs: dict[str, jax.Array], segment_ids, dtype: str, per=None) -> None:
    results = triton(inputs, segment_ids)
    assert_equal_the_plain_loop(results, inputs, segment_ids, dtype, per)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("shape", [ODD, MANY], ids=str)
@settings(max_examples=2)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_equals_the_plain_loop_in_values_and_all_gradients(shape, data, seed):
    segment_ids = data.draw(segment_layouts(shape.rows, shape.length))
    assert_equals_the_plain_loop(in_dtype(random_inputs(shape, seed), "float32", ACTIVATIONS), segment_ids, "float32")


@needs_triton
def test_bfloat16_inputs_lose_no_more_than_the_rounding_of_the_results():
    segment_ids = np.repeat([[1, 2]], [4, 7], axis=1).repeat(2, axis=0)
    assert_equals_the_plain_loop(in_dtype(random_inputs(ODD, 0), "bfloat16", ACTIVATIONS), segment_ids, "bfloat16")


@needs_triton
def test_every_channel_is_right_on_its_own_scale():
    inputs = in_dtype(with_one_small(random_inputs(ODD, 10), CHANNEL_AXES), "float32", ACTIVATIONS)
    segment_ids = np.repeat([[0, 1]], [4, 7], axis=1).repeat(2, axis=0).astype(np.int32)
    assert_equals_the_plain_loop(inputs, segment_ids, "float32", PER_CHANNEL)


@needs_triton
def test_small_steps_have_their_gradient_channel_by_channel():
    inputs = in_dtype(small_steps(ODD, 11), "float32", ACTIVATIONS)
    segment_ids = np.repeat([[0, 1]], [4, 7], axis=1).repeat(2, axis=0).astype(np.int32)
    assert_equals_the_plain_loop(inputs, segment_ids, "float32", PER_CHANNEL | {"dt_bias": 0})


@needs_triton
def test_everything_optional_can_be_left_out():
    inputs = in_dtype(random_inputs(ODD, 1), "float32", ACTIVATIONS)
    for name in ("D", "z", "dt_bias", "initial_state"):
        del inputs[name]
    assert_equals_the_plain_loop(inputs, None, "float32")


@needs_triton
def test_extreme_decays_stay_finite_and_right():
    inputs = random_inputs(MANY, 2)
    inputs["dt"] *= 20  # steps from 1e-30 to 100
    inputs["A"] = -np.logspace(-6, 6, 34 * 4).reshape(34, 4)
    segment_ids = (np.arange(20, dtype=np.int32)[None] > 9).astype(np.int32)
    assert_equals_the_plain_loop(in_dtype(inputs, "float32", ACTIVATIONS), segment_ids, "float32")


@needs_triton
def test_no_gradient_passes_a_change_of_segment():
    inputs = in_dtype(random_inputs(ODD, 4), "float32", ACTIVATIONS)
    inputs["A"] = jnp.zeros_like(inputs["A"])  # a decay rate of zero is reset like any other
    inputs["dy"] = inputs["dy"].at[:, :6].set(0)
    segment_ids = np.repeat((np.arange(11, dtype=np.int32) >= 6)[None], 2, axis=0).astype(np.int32)
    _, gradients = triton(inputs, segment_ids)
    for name in ("x", "dt", "B", "C", "z"):
        assert not np.any(gradients[name][:, :6]), name
    assert not np.any(gradients["initial_state"])


@pytest.mark.usefixtures("unchecked_shapes")
def test_without_a_gpu_the_kernels_refuse_and_say_why():
    arrays = {n: jnp.asarray(v, jnp.float32) for n, v in random_inputs(ODD, 5).items() if n in ARRAYS}
    with pytest.raises(UserError, match="'triton' cannot be used: it needs a GPU, and this program is for cpu"):
        selective_scan(**arrays, implementation="triton")
