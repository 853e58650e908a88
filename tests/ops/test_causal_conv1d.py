"""`causal_conv1d` against the plain loop in float64, and what packing, decoding and chunked calls rely on."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba_jax.errors import UserError
from biomamba_jax.ops import causal_conv1d
from biomamba_jax.ops.causal_conv1d import pallas_tpu
from biomamba_jax.ops.causal_conv1d.inputs import Inputs
from tests.ops.oracles import assert_close, in_dtype, in_float64, require_native, segment_layouts, with_one_small
from tests.tolerances import TOLERANCES

ARRAYS = ("x", "weight", "bias", "initial_state")
ACTIVATIONS = {"x", "initial_state", "dy", "d_final_state"}
CHANNEL_AXES = {"x": 2, "bias": 0, "initial_state": 2, "dy": 2, "d_final_state": 2}
PER_CHANNEL = {"y": 2, "final_state": 2, "x": 2, "weight": 0, "initial_state": 2}


class Shape(NamedTuple):
    """Few of them, since each is compiled anew."""

    rows: int
    length: int
    channels: int
    width: int


SHAPES = (
    Shape(rows=2, length=19, channels=6, width=4),
    Shape(rows=2, length=2, channels=6, width=4),  # shorter than the window
    Shape(rows=3, length=1, channels=5, width=4),
    Shape(rows=1, length=9, channels=7, width=2),
    Shape(rows=1, length=5, channels=8, width=1),  # no past at all
)


def random_inputs(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed).standard_normal
    rows, length, channels, width = shape
    return {
        "x": draw((rows, length, channels)),
        "weight": draw((channels, width)),
        "bias": draw(channels),
        "initial_state": draw((rows, width - 1, channels)),
        "dy": draw((rows, length, channels)),
        "d_final_state": draw((rows, width - 1, channels)),
    }


@cache
def values_and_gradients(implementation: str, activation: str | None = "silu"):
    """(inputs, segment_ids) -> values and gradients by name, compiled; arrays missing in inputs are left out."""

    if implementation == "native":
        require_native()

    def compute(inputs, segment_ids):
        def run(arrays):
            if implementation == "pallas_tpu":
                given = Inputs(**arrays, segment_ids=segment_ids)
                return pallas_tpu.causal_conv1d(given, activation, interpret=True)
            return causal_conv1d(
                **arrays,
                activation=activation,
                segment_ids=segment_ids,
                return_final_state=True,
                implementation=implementation,
            )

        (y, final_state), pull_back = jax.vjp(run, {a: inputs[a] for a in ARRAYS if a in inputs})
        (gradients,) = pull_back((inputs["dy"], inputs["d_final_state"]))
        return {"y": y, "final_state": final_state}, gradients

    return jax.jit(compute)


def assert_equals_oracle(
    inputs: dict[str, jax.Array],
    segment_ids,
    dtype: str,
    activation: str | None = "silu",
    implementation: str = "xla",
    per=None,
) -> None:
    values, gradients = values_and_gradients(implementation, activation)(inputs, segment_ids)
    oracle = values_and_gradients("reference", activation)
    want_values, want_gradients = in_float64(oracle, inputs, segment_ids)
    tolerance = TOLERANCES["causal_conv1d", dtype]
    assert_close(values, want_values, tolerance.value, per)
    assert_close(gradients, want_gradients, tolerance.gradient, per)
    assert values["y"].dtype == dtype and values["final_state"].dtype == dtype


@pytest.mark.parametrize("implementation", ["xla", "native"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=12)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_equals_the_plain_loop_in_values_and_all_gradients(shape, implementation, data, seed):
    segment_ids = data.draw(segment_layouts(shape.rows, shape.length))
    inputs = in_dtype(random_inputs(shape, seed), "float32", ACTIVATIONS)
    assert_equals_oracle(inputs, segment_ids, "float32", implementation=implementation)


@pytest.mark.parametrize("implementation", ["xla", "native", "pallas_tpu"])
def test_every_channel_is_right_on_its_own_scale(implementation):
    inputs = in_dtype(with_one_small(random_inputs(SHAPES[0], 10), CHANNEL_AXES), "float32", ACTIVATIONS)
    segment_ids = np.repeat([[0, 1]], [7, 12], axis=1).repeat(2, axis=0).astype(np.int32)
    assert_equals_oracle(inputs, segment_ids, "float32", implementation=implementation, per=PER_CHANNEL)


@pytest.mark.parametrize("implementation", ["xla", "native"])
@settings(max_examples=12)
@given(segment_ids=segment_layouts(2, 19), seed=st.integers(0, 2**32 - 1))
def test_bfloat16_inputs_lose_no_more_than_the_rounding_of_the_results(implementation, segment_ids, seed):
    inputs = in_dtype(random_inputs(SHAPES[0], seed), "bfloat16", ACTIVATIONS)
    assert_equals_oracle(inputs, segment_ids, "bfloat16", implementation=implementation)


def test_float64_inputs_are_computed_in_float64():
    with jax.enable_x64(True):
        inputs = in_dtype(random_inputs(SHAPES[0], 0), "float64", ACTIVATIONS)
        assert_equals_oracle(inputs, np.repeat(np.arange(19, dtype=np.int32)[None] // 5, 2, axis=0), "float64")


@pytest.mark.parametrize("implementation", ["xla", "native"])
def test_activation_bias_segments_and_state_can_be_left_out(implementation):
    inputs = in_dtype(random_inputs(SHAPES[0], 1), "float32", ACTIVATIONS)
    del inputs["bias"], inputs["initial_state"]
    assert_equals_oracle(inputs, None, "float32", activation=None, implementation=implementation)


def test_equals_the_convolution_of_torch():
    torch = pytest.importorskip("torch")
    inputs = in_dtype(random_inputs(SHAPES[0], 2), "float32", ACTIVATIONS)
    x, weight, bias = (torch.tensor(np.array(inputs[name])) for name in ("x", "weight", "bias"))
    want = torch.nn.functional.conv1d(x.mT, weight[:, None, :], bias, padding=3, groups=6)[..., :19].mT
    got = causal_conv1d(inputs["x"], inputs["weight"], inputs["bias"], activation=None)
    assert_close({"y": got}, {"y": want.numpy()}, TOLERANCES["causal_conv1d", "float32"].value)


@pytest.mark.parametrize("first", [1, 2, 3, 4, 18])
def test_no_tap_and_no_gradient_reaches_across_a_change_of_segment(first):
    inputs = in_dtype(random_inputs(SHAPES[0], 3), "float32", ACTIVATIONS)
    inputs["dy"] = np.where(np.arange(19)[:, None] < first, 0, inputs["dy"])
    segment_ids = np.repeat((np.arange(19, dtype=np.int32) >= first)[None], 2, axis=0).astype(np.int32)
    values, gradients = values_and_gradients("xla")(inputs, segment_ids)
    alone = jax.jit(causal_conv1d)(np.array(inputs["x"])[:, first:], inputs["weight"], inputs["bias"])
    assert_close({"y": values["y"][:, first:]}, {"y": alone}, TOLERANCES["causal_conv1d", "float32"].value)
    assert not np.any(gradients["x"][:, :first])
    assert not np.any(gradients["initial_state"])


def test_the_final_state_is_zero_where_the_segment_is_younger_than_the_window():
    x = jnp.arange(1.0, 6.0).reshape(1, 5, 1)
    _, state = causal_conv1d(x, jnp.ones((1, 4)), segment_ids=jnp.array([[7, 7, 7, 9, 9]]), return_final_state=True)
    np.testing.assert_array_equal(state[0, :, 0], [0, 4, 5])


def test_the_final_state_of_a_short_call_keeps_what_the_initial_one_held():
    held = jnp.array([[[1.0], [2.0], [3.0]]])
    _, state = causal_conv1d(jnp.full((1, 1, 1), 4.0), jnp.ones((1, 4)), initial_state=held, return_final_state=True)
    np.testing.assert_array_equal(state[0, :, 0], [2, 3, 4])


@pytest.mark.parametrize("cuts", [(1,), (2,), (10,), (1, 2, 3, 4)], ids=str)
def test_calls_joined_by_the_state_equal_one_call(cuts):
    inputs = in_dtype(random_inputs(SHAPES[0], 4), "float32", ACTIVATIONS)

    def in_calls(arrays):
        state, outputs = arrays["initial_state"], []
        for x in jnp.split(arrays["x"], cuts, axis=1):
            y, state = causal_conv1d(x, arrays["weight"], arrays["bias"], initial_state=state, return_final_state=True)
            outputs.append(y)
        return jnp.concatenate(outputs, axis=1), state

    @jax.jit
    def compute(inputs):
        results, pull_back = jax.vjp(in_calls, {name: inputs[name] for name in ARRAYS})
        return results, pull_back((inputs["dy"], inputs["d_final_state"]))[0]

    tolerance = TOLERANCES["causal_conv1d", "float32"]
    values, gradients = values_and_gradients("xla")(inputs, None)
    (y, state), joined = compute(inputs)
    assert_close({"y": y, "final_state": state}, values, tolerance.value)
    assert_close(joined, gradients, tolerance.gradient)


def test_segment_ids_take_no_gradient():
    inputs = in_dtype(random_inputs(SHAPES[0], 5), "float32", ACTIVATIONS)
    arrays = {name: inputs[name] for name in ARRAYS}
    _, pull_back = jax.vjp(lambda ids: causal_conv1d(**arrays, segment_ids=ids), jnp.zeros((2, 19), jnp.int32))
    assert pull_back(inputs["dy"])[0].dtype == jax.dtypes.float0


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_array_that_does_not_fit_is_named():
    inputs = in_dtype(random_inputs(SHAPES[0], 6), "float32", ACTIVATIONS)
    with pytest.raises(UserError, match=r"causal_conv1d: bias has shape \(5,\), expected \(6,\)"):
        causal_conv1d(inputs["x"], inputs["weight"], inputs["bias"][1:])


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_unknown_activation_is_refused():
    inputs = in_dtype(random_inputs(SHAPES[0], 7), "float32", ACTIVATIONS)
    with pytest.raises(UserError, match="activation 'relu' is unknown"):
        causal_conv1d(inputs["x"], inputs["weight"], activation="relu")


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("x", "weight"), [((4, 3), (3, 4)), ((1, 4, 3), (3,))])
def test_arrays_without_the_axes_are_refused_by_name(x, weight):
    with pytest.raises(UserError, match=r"causal_conv1d: x must be \[B L C\] and weight \[C K\], not \("):
        causal_conv1d(jnp.zeros(x), jnp.zeros(weight))
