"""The Triton kernels of `causal_conv1d`: numbers by Triton's interpreter, against the plain loop in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomamba_jax.errors import UserError
from biomamba_jax.ops import causal_conv1d
from tests.compilers import needs_triton
from tests.ops import triton_interpreter
from tests.ops.oracles import assert_close, in_dtype, in_float64
from tests.ops.test_causal_conv1d import ACTIVATIONS, ARRAYS, SHAPES, Shape, random_inputs
from tests.ops.test_causal_conv1d import values_and_gradients as by_name
from tests.tolerances import TOLERANCES

TWO_BLOCKS = Shape(rows=1, length=35, channels=130, width=4)  # of tokens and of channels


def assert_equals_the_plain_loop(
    inputs: dict[str, jax.Array], segment_ids, dtype: str, activation: str | None = "silu"
) -> None:
    values, gradients = triton_interpreter.values_and_gradients(
        "causal_conv1d", inputs, ARRAYS, segment_ids, activation=activation
    )
    want_values, want_gradients = in_float64(by_name("reference", activation), inputs, segment_ids)
    tolerance = TOLERANCES["causal_conv1d", dtype]
    assert_close(values, want_values, tolerance.value)
    assert_close(gradients, want_gradients, tolerance.gradient)
    assert values["y"].dtype == dtype and values["final_state"].dtype == dtype


@needs_triton
@pytest.mark.parametrize("shape", [*SHAPES[1:], TWO_BLOCKS], ids=str)
def test_equals_the_plain_loop_in_values_and_all_gradients(shape):
    changes = np.random.default_rng(0).random((shape.rows, shape.length)) < 0.3
    inputs = in_dtype(random_inputs(shape, 1), "float32", ACTIVATIONS)
    assert_equals_the_plain_loop(inputs, np.cumsum(changes, axis=1).astype(np.int32), "float32")


@needs_triton
def test_bfloat16_inputs_lose_no_more_than_the_rounding_of_the_results():
    segment_ids = np.repeat([[1, 2]], [5, 14], axis=1).repeat(2, axis=0)
    assert_equals_the_plain_loop(
        in_dtype(random_inputs(SHAPES[0], 0), "bfloat16", ACTIVATIONS), segment_ids, "bfloat16"
    )


@needs_triton
def test_activation_bias_segments_and_state_can_be_left_out():
    inputs = in_dtype(random_inputs(SHAPES[0], 1), "float32", ACTIVATIONS)
    del inputs["bias"], inputs["initial_state"]
    assert_equals_the_plain_loop(inputs, None, "float32", activation=None)


@needs_triton
def test_independent_kernels_of_one_program_keep_out_of_each_others_way_when_interpreted():
    shape = Shape(rows=1, length=35, channels=32, width=4)  # large enough that XLA on CPU runs them at the same time
    inputs = [in_dtype(random_inputs(shape, seed), "float32", ACTIVATIONS) for seed in range(24)]
    calls = [{name: given[name] for name in ARRAYS} for given in inputs]
    got = triton_interpreter.values_at_once("causal_conv1d", calls, activation="silu")
    for y, given in zip(got, inputs, strict=True):
        want, _ = in_float64(by_name("reference"), given, None)
        assert_close({"y": y}, {"y": want["y"]}, TOLERANCES["causal_conv1d", "float32"].value)


@pytest.mark.usefixtures("unchecked_shapes")
def test_without_a_gpu_the_kernels_refuse_and_say_why():
    inputs = random_inputs(SHAPES[0], 2)
    with pytest.raises(UserError, match="'triton' cannot be used: it needs a GPU, and this program is for cpu"):
        causal_conv1d(jnp.asarray(inputs["x"]), jnp.asarray(inputs["weight"]), implementation="triton")
