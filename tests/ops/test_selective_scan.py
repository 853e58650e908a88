"""`selective_scan` against the plain loop in float64, and what packing, decoding and memory rely on."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch, selective_scan
from biomamba_jax.ops.selective_scan import native, pallas_tpu, reference, xla
from biomamba_jax.ops.selective_scan.inputs import Inputs
from tests.ops.oracles import assert_close, in_dtype, in_float64, require_native, segment_layouts, with_one_small
from tests.tolerances import TOLERANCES

ARRAYS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
ACTIVATIONS = {"x", "dt", "B", "C", "z", "dy"}
CHANNEL_AXES = {"x": 2, "dy": 2, "initial_state": 1, "d_final_state": 1}
PER_CHANNEL = {"y": 2, "final_state": 1, "x": 2, "dt": 2, "A": 0, "z": 2, "initial_state": 1}
CHUNK = 8
FORMS = ("sequential", "associative", "native")


class Shape(NamedTuple):
    """Few of them, since each is compiled anew."""

    rows: int
    length: int
    channels: int
    d_state: int


SHAPES = (
    Shape(rows=2, length=37, channels=6, d_state=4),
    Shape(rows=1, length=CHUNK - 1, channels=3, d_state=16),
    Shape(rows=1, length=CHUNK, channels=5, d_state=1),
    Shape(rows=3, length=CHUNK + 1, channels=7, d_state=3),
    Shape(rows=3, length=1, channels=5, d_state=4),
)


def random_inputs(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """float64 arrays by name, with steps and decays in the range of trained models and beyond."""
    draw = np.random.default_rng(seed).standard_normal
    rows, length, channels, d_state = shape
    return {
        "x": draw((rows, length, channels)),
        "dt": 2 * draw((rows, length, channels)),
        "A": -np.exp(draw((channels, d_state))),
        "B": draw((rows, length, d_state)),
        "C": draw((rows, length, d_state)),
        "D": draw(channels),
        "z": draw((rows, length, channels)),
        "dt_bias": draw(channels) - 1,
        "initial_state": draw((rows, channels, d_state)),
        "dy": draw((rows, length, channels)),
        "d_final_state": draw((rows, channels, d_state)),
    }


def implementation(name: str):
    if name == "reference":
        return reference.selective_scan
    if name == "pallas_tpu":
        return partial(pallas_tpu.selective_scan, interpret=True)
    if name == "native":
        require_native()
        return partial(native.selective_scan, plan=native.Plan(chunk=CHUNK, range=2))
    return partial(xla.selective_scan, chunk_size=CHUNK, associative=name == "associative")


@cache
def values_and_gradients(name: str):
    """(inputs, segment_ids) -> values and gradients by name, compiled; arrays missing in inputs are left out."""

    def compute(inputs, segment_ids):
        def run(arrays):
            return implementation(name)(Inputs(**arrays, segment_ids=segment_ids))

        (y, final_state), pull_back = jax.vjp(run, {a: inputs[a] for a in ARRAYS if a in inputs})
        (gradients,) = pull_back((inputs["dy"].astype(y.dtype), inputs["d_final_state"].astype(final_state.dtype)))
        return {"y": y, "final_state": final_state}, gradients

    return jax.jit(compute)


def assert_equals_oracle(name: str, inputs: dict[str, jax.Array], segment_ids, dtype: str, per=None) -> None:
    assert_equal_the_plain_loop(values_and_gradients(name)(inputs, segment_ids), inputs, segment_ids, dtype, per)


def assert_equal_the_plain_loop(results, inputs: dict[str, jax.Array], segment_ids, dtype: str, per=None) -> None:
    """Values and gradients equal those of the plain loop in float64, in the dtypes of `selective_scan`."""
    values, gradients = results
    want_values, want_gradients = in_float64(values_and_gradients("reference"), inputs, segment_ids)
    tolerance = TOLERANCES["selective_scan", dtype]
    assert_close(values, want_values, tolerance.value, per)
    assert_close(gradients, want_gradients, tolerance.gradient, per)
    assert values["y"].dtype == dtype and values["final_state"].dtype == jnp.promote_types(dtype, jnp.float32)
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype, name


def small_steps(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """Inputs whose raw steps are about -6 in the first channel and -20 in the last: softplus of 2e-3 to 2e-9."""
    inputs = random_inputs(shape, seed)
    return inputs | {"dt": 0.15 * inputs["dt"], "dt_bias": np.linspace(-6, -20, shape.channels)}


@pytest.mark.parametrize("form", FORMS)
def test_small_steps_have_their_gradient_channel_by_channel(form):
    segment_ids = np.repeat([[0, 1]], [11, 26], axis=1).repeat(2, axis=0).astype(np.int32)
    inputs = in_dtype(small_steps(SHAPES[0], 11), "float32", ACTIVATIONS)
    assert_equals_oracle(form, inputs, segment_ids, "float32", PER_CHANNEL | {"dt_bias": 0})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=8)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_equals_the_plain_loop_in_values_and_all_gradients(shape, form, data, seed):
    segment_ids = data.draw(segment_layouts(shape.rows, shape.length))
    inputs = in_dtype(random_inputs(shape, seed), "float32", ACTIVATIONS)
    assert_equals_oracle(form, inputs, segment_ids, "float32")


@pytest.mark.parametrize("form", FORMS)
def test_every_channel_is_right_on_its_own_scale(form):
    inputs = in_dtype(with_one_small(random_inputs(SHAPES[0], 10), CHANNEL_AXES), "float32", ACTIVATIONS)
    segment_ids = np.repeat([[0, 1]], [11, 26], axis=1).repeat(2, axis=0).astype(np.int32)
    assert_equals_oracle(form, inputs, segment_ids, "float32", PER_CHANNEL)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=8)
@given(segment_ids=segment_layouts(2, 37), seed=st.integers(0, 2**32 - 1))
def test_bfloat16_inputs_lose_no_more_than_the_rounding_of_the_results(form, segment_ids, seed):
    inputs = in_dtype(random_inputs(SHAPES[0], seed), "bfloat16", ACTIVATIONS)
    assert_equals_oracle(form, inputs, segment_ids, "bfloat16")


@pytest.mark.parametrize("form", FORMS[:2])
def test_float64_inputs_are_computed_in_float64(form):
    with jax.enable_x64(True):
        inputs = in_dtype(random_inputs(SHAPES[0], 0), "float64", ACTIVATIONS)
        segment_ids = np.repeat(np.arange(37, dtype=np.int32)[None] // 10, 2, axis=0)
        assert_equals_oracle(form, inputs, segment_ids, "float64")


@pytest.mark.parametrize("form", FORMS)
def test_everything_optional_can_be_left_out(form):
    inputs = in_dtype(random_inputs(SHAPES[0], 1), "float32", ACTIVATIONS)
    for name in ("D", "z", "dt_bias", "initial_state"):
        del inputs[name]
    assert_equals_oracle(form, inputs, None, "float32")


@pytest.mark.parametrize("form", FORMS)
def test_long_and_extreme_decays_stay_finite_and_right(form):
    shape = Shape(rows=1, length=4096, channels=8, d_state=4)
    inputs = random_inputs(shape, 2)
    inputs["dt"] *= 20  # steps from 1e-30 to 100
    inputs["A"] = -np.logspace(-6, 6, 32).reshape(8, 4)
    segment_ids = (np.arange(4096, dtype=np.int32)[None] > 3000).astype(np.int32)
    assert_equals_oracle(form, in_dtype(inputs, "float32", ACTIVATIONS), segment_ids, "float32")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_a_packed_row_equals_its_documents_run_one_by_one(form, first):
    inputs = in_dtype(random_inputs(SHAPES[0], 3), "float32", ACTIVATIONS)
    segment_ids = np.repeat((np.arange(37, dtype=np.int32) >= first)[None], 2, axis=0).astype(np.int32)
    values, gradients = values_and_gradients(form)(inputs, segment_ids)

    def part(tokens: slice) -> dict[str, jax.Array]:
        return {name: v[:, tokens] if name in ACTIVATIONS else v for name, v in inputs.items()}

    zeros = jnp.zeros_like(inputs["initial_state"])
    v1, g1 = values_and_gradients(form)(part(slice(None, first)) | {"d_final_state": zeros}, None)
    v2, g2 = values_and_gradients(form)(part(slice(first, None)) | {"initial_state": zeros}, None)
    tolerance = TOLERANCES["selective_scan", "float32"]
    y = jnp.concatenate([v1["y"], v2["y"]], axis=1)
    assert_close(values, {"y": y, "final_state": v2["final_state"]}, tolerance.value)
    joined = {name: jnp.concatenate([g1[name], g2[name]], axis=1) for name in ACTIVATIONS - {"dy"}}
    summed = {name: g1[name] + g2[name] for name in ("A", "D", "dt_bias")}
    assert_close(gradients, joined | summed | {"initial_state": g1["initial_state"]}, tolerance.gradient)


@pytest.mark.parametrize("form", FORMS)
def test_no_gradient_passes_a_change_of_segment(form):
    inputs = in_dtype(random_inputs(SHAPES[0], 4), "float32", ACTIVATIONS)
    inputs["dy"] = inputs["dy"].at[:, :20].set(0)
    segment_ids = np.repeat((np.arange(37, dtype=np.int32) >= 20)[None], 2, axis=0).astype(np.int32)
    _, gradients = values_and_gradients(form)(inputs, segment_ids)
    for name in ("x", "dt", "B", "C", "z"):
        assert not np.any(gradients[name][:, :20]), name
    assert not np.any(gradients["initial_state"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("first", [1, CHUNK, 20])
def test_calls_joined_by_the_state_equal_one_call(form, first):
    inputs = in_dtype(random_inputs(SHAPES[0], 5), "float32", ACTIVATIONS)
    arrays = {name: inputs[name] for name in ARRAYS}
    scan = implementation(form)

    def whole(arrays):
        return scan(Inputs(**arrays))

    def in_two_calls(arrays):
        parts = [
            {n: v[:, s] if n in ACTIVATIONS else v for n, v in arrays.items()} for s in (np.s_[:first], np.s_[first:])
        ]
        y1, state = scan(Inputs(**parts[0]))
        y2, state = scan(Inputs(**parts[1] | {"initial_state": state}))
        return jnp.concatenate([y1, y2], axis=1), state

    tolerance = TOLERANCES["selective_scan", "float32"]
    results = []
    for run in (whole, in_two_calls):
        (y, state), pull_back = jax.vjp(jax.jit(run), arrays)
        results.append(({"y": y, "state": state}, pull_back((inputs["dy"], inputs["d_final_state"]))[0]))
    assert_close(results[1][0], results[0][0], tolerance.value)
    assert_close(results[1][1], results[0][1], tolerance.gradient)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_what_each_platform_runs_equals_the_plain_loop(target):
    inputs = in_dtype(random_inputs(SHAPES[0], 6), "float32", ACTIVATIONS)
    arrays = {name: inputs[name] for name in ARRAYS}
    with dispatch.target_platform(target):
        y, state = selective_scan(**arrays, return_final_state=True)
    want_y, want_state = selective_scan(**arrays, return_final_state=True, implementation="reference")
    tolerance = TOLERANCES["selective_scan", "float32"].value
    assert_close({"y": y, "state": state}, {"y": want_y, "state": want_state}, tolerance)


def test_a_single_token_needs_no_loop():
    inputs = in_dtype(random_inputs(SHAPES[-1], 7), "float32", ACTIVATIONS)
    assert "while" not in values_and_gradients("sequential").lower(inputs, None).as_text()


def test_segment_ids_take_no_gradient():
    inputs = in_dtype(random_inputs(SHAPES[0], 8), "float32", ACTIVATIONS)
    arrays = {name: inputs[name] for name in ARRAYS}
    segment_ids = jnp.zeros((2, 37), jnp.int32)
    _, pull_back = jax.vjp(lambda ids: selective_scan(**arrays, segment_ids=ids), segment_ids)
    assert pull_back(inputs["dy"])[0].dtype == jax.dtypes.float0


def full_size(length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """One layer of the 130m model."""
    inputs = {
        "x": (1, length, 1536),
        "dt": (1, length, 1536),
        "A": (1536, 16),
        "B": (1, length, 16),
        "C": (1, length, 16),
        "D": (1536,),
        "z": (1, length, 1536),
        "dt_bias": (1536,),
        "initial_state": (1, 1536, 16),
    }
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in inputs.items()}


def test_forward_and_backward_at_full_size_need_less_than_120_megabytes():
    gradient = jax.grad(lambda arrays: jnp.sum(selective_scan(**arrays)))
    compiled = jax.jit(gradient).lower(full_size(2048)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 120e6


@pytest.mark.parametrize("form", FORMS)
def test_no_array_of_length_times_d_state_survives_the_forward_pass(form):
    scan = partial(xla.selective_scan, associative=form == "associative")
    kept = jax.eval_shape(lambda arrays: jax.vjp(lambda a: scan(Inputs(**a)), arrays)[1], full_size(2048))
    assert max(v.size for v in jax.tree.leaves(kept)) <= 2048 * 1536


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_array_that_does_not_fit_is_named():
    inputs = in_dtype(random_inputs(SHAPES[0], 9), "float32", ACTIVATIONS)
    arrays = {name: inputs[name] for name in ARRAYS}
    with pytest.raises(UserError, match=r"selective_scan: z has shape \(2, 36, 6\), expected \(2, 37, 6\)"):
        selective_scan(**arrays | {"z": arrays["z"][:, 1:]})


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_unknown_implementation_is_refused():
    inputs = in_dtype(random_inputs(SHAPES[0], 9), "float32", ACTIVATIONS)
    with pytest.raises(UserError, match="'cuda' does not exist; choose one of"):
        selective_scan(**{name: inputs[name] for name in ARRAYS}, implementation="cuda")


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(("x", "A"), [((4, 3), (3, 2)), ((1, 4, 3), (3,))])
def test_arrays_without_the_axes_are_refused_by_name(x, A):
    with pytest.raises(UserError, match=r"selective_scan: x must be \[B L E\] and A \[E N\], not \("):
        selective_scan(jnp.zeros(x), jnp.zeros(x), jnp.zeros(A), jnp.zeros((1, 4, 2)), jnp.zeros((1, 4, 2)))
