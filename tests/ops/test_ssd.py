"""`ssd` against the plain recurrence in float64, and what packing, decoding and memory rely on."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba_jax.errors import UserError
from biomamba_jax.ops import ssd
from biomamba_jax.ops.ssd import reference
from biomamba_jax.ops.ssd.inputs import Inputs
from tests.ops import oracles
from tests.ops.oracles import assert_close, require_native, with_one_small
from tests.tolerances import TOLERANCES

ARRAYS = ("x", "dt", "A", "B", "C", "D", "dt_bias", "initial_state")
HEAD_AXES = {"x": 2, "dy": 2, "initial_state": 1, "d_final_state": 1}
PER_HEAD = {"y": 2, "final_state": 1, "x": 2, "dt": 2, "B": 2, "C": 2, "initial_state": 1}
PER_SMALL_STEP = {"y": 2, "x": 2, "dt": 2, "dt_bias": 0}


class Shape(NamedTuple):
    """Few of them, since each is compiled anew."""

    rows: int
    length: int
    heads: int
    headdim: int
    d_state: int
    groups: int
    chunk: int


SHAPES = (
    Shape(rows=2, length=37, heads=4, headdim=3, d_state=5, groups=2, chunk=8),
    Shape(rows=1, length=16, heads=3, headdim=4, d_state=4, groups=1, chunk=16),
    Shape(rows=1, length=9, heads=2, headdim=1, d_state=2, groups=2, chunk=64),
    Shape(rows=3, length=1, heads=4, headdim=3, d_state=5, groups=2, chunk=8),
)


def random_inputs(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """float64 arrays by name, with steps and decays in the range of trained models and beyond."""
    draw = np.random.default_rng(seed).standard_normal
    rows, length, heads, headdim, d_state, groups, _ = shape
    return {
        "x": draw((rows, length, heads, headdim)),
        "dt": 2 * draw((rows, length, heads)),
        "A": -np.exp(draw(heads)),
        "B": draw((rows, length, groups, d_state)),
        "C": draw((rows, length, groups, d_state)),
        "D": draw(heads),
        "dt_bias": draw(heads) - 1,
        "initial_state": draw((rows, heads, headdim, d_state)),
        "dy": draw((rows, length, heads, headdim)),
        "d_final_state": draw((rows, heads, headdim, d_state)),
    }


def in_dtype(inputs: dict[str, np.ndarray], dtype: str) -> dict[str, jax.Array]:
    return oracles.in_dtype(inputs, dtype, {"x", "dt", "B", "C", "dy"})


@pytest.fixture(scope="module", params=["xla", "native"])
def implementation(request) -> str:
    """The implementations for CPUs."""
    if request.param == "native":
        require_native()
    return request.param


@cache
def values_and_gradients(implementation: str, chunk: int | None):
    def compute(inputs, segment_ids):
        arrays = {name: inputs[name] for name in ARRAYS if name in inputs}

        def run(arrays):
            return ssd(
                **{"dt": None} | arrays,
                segment_ids=segment_ids,
                return_final_state=True,
                chunk_size=chunk,
                implementation=implementation,
            )

        (y, final_state), pull_back = jax.vjp(run, arrays)
        (gradients,) = pull_back((inputs["dy"], inputs["d_final_state"]))
        return {"y": y, "final_state": final_state}, gradients

    return jax.jit(compute)


def of_kernels(compute: Callable[..., Any], inputs: dict[str, jax.Array], segment_ids: Any) -> tuple[dict, dict]:
    """Values and gradients by name of compute(Inputs, None); arrays missing in inputs are left out."""

    def run(arrays):
        return compute(Inputs(**{"dt": None} | arrays, segment_ids=segment_ids), None)

    (y, final_state), pull_back = jax.vjp(run, {name: inputs[name] for name in ARRAYS if name in inputs})
    (gradients,) = pull_back((inputs["dy"].astype(y.dtype), inputs["d_final_state"]))
    return {"y": y, "final_state": final_state}, gradients


_recurrence = jax.jit(partial(of_kernels, reference.ssd))


def assert_equal_the_recurrence(results, inputs: dict[str, jax.Array], segment_ids, tolerance, per=None) -> None:
    """Values and gradients equal those of the plain loop in float64, in the dtypes of `ssd`."""
    got, gradients = results
    assert got["y"].dtype == inputs["x"].dtype and got["final_state"].dtype == inputs["A"].dtype
    for name, gradient in gradients.items():
        assert gradient.dtype == inputs[name].dtype, name
    want, want_gradients = oracles.in_float64(_recurrence, inputs, segment_ids)
    assert_close(got, want, tolerance.value, per)
    assert_close(gradients, want_gradients, tolerance.gradient, per)


def assert_matches_recurrence(
    implementation: str, inputs: dict[str, np.ndarray], segment_ids, dtype: str, chunk: int, per=None
) -> None:
    with jax.enable_x64(True):
        arrays = in_dtype(inputs, dtype)
        results = values_and_gradients(implementation, chunk)(arrays, segment_ids)
        assert_equal_the_recurrence(results, arrays, segment_ids, TOLERANCES["ssd", dtype], per)


@st.composite
def segment_layouts(draw, shape: Shape) -> np.ndarray:
    """Rows of documents, their lengths around the chunk's among them; neighbours differ, ids come again."""
    near = [n for n in (1, 2, shape.chunk - 1, shape.chunk, shape.chunk + 1) if n > 0]
    rows = []
    for _ in range(shape.rows):
        row: list[int] = []
        while len(row) < shape.length:
            previous = row[-1] if row else -1
            label = draw(st.sampled_from([i for i in (0, 1, 2**31 - 1) if i != previous]))
            row += [label] * draw(st.sampled_from(near) | st.integers(1, shape.length))
        rows.append(row[: shape.length])
    return np.array(rows, np.int32)


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("xla", "float64"), ("xla", "float32"), ("xla", "bfloat16"), ("native", "float32"), ("native", "bfloat16")],
    indirect=["implementation"],
)
@settings(max_examples=20)
@given(data=st.data())
def test_values_and_all_gradients_match_the_recurrence(implementation, dtype, data):
    shape = data.draw(st.sampled_from(SHAPES))
    inputs = random_inputs(shape, data.draw(st.integers(0, 2**16)))
    assert_matches_recurrence(implementation, inputs, data.draw(segment_layouts(shape)), dtype, shape.chunk)


def given_decays(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """Inputs with the log-decay of each step in place of dt, some of them zero and some beyond the smallest float."""
    inputs, random = random_inputs(shape, seed), np.random.default_rng(seed)
    del inputs["dt"], inputs["dt_bias"]
    scale = random.choice([0.0, 1.0, 1e4], (shape.rows, shape.length, shape.heads), p=[0.3, 0.6, 0.1])
    return inputs | {"A": -scale * np.exp(random.standard_normal(scale.shape))}


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3]._replace(groups=4)], ids=["chunks", "a token"])
def test_given_decays_match_the_recurrence(implementation, shape):
    segment_ids = np.repeat([[0, 1]], [11, 26], axis=1).repeat(shape.rows, axis=0)[:, : shape.length].astype(np.int32)
    assert_matches_recurrence(implementation, given_decays(shape, 12), segment_ids, "float32", 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_head_is_right_on_its_own_scale(implementation, dtype):
    segment_ids = np.repeat([[0, 1]], [11, 26], axis=1).repeat(2, axis=0).astype(np.int32)
    inputs = with_one_small(random_inputs(SHAPES[0], 10), HEAD_AXES)
    assert_matches_recurrence(implementation, inputs, segment_ids, dtype, 8, PER_HEAD)


def small_steps(shape: Shape, seed: int) -> dict[str, np.ndarray]:
    """Inputs whose raw steps are about -6 in the first head and -20 in the last: softplus of 2e-3 to 2e-9."""
    inputs = random_inputs(shape, seed)
    steps = {"dt": 0.15 * inputs["dt"], "dt_bias": np.linspace(-6, -20, shape.heads)}
    return (
        inputs
        | steps
        | {"dy": 1 + 0.5 * inputs["dy"], "x": 1 + 0.5 * inputs["x"], "B": 1 + inputs["B"], "C": 1 + inputs["C"]}
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_small_steps_have_their_gradient_head_by_head(implementation, dtype):
    segment_ids = np.repeat([[0, 1]], [11, 26], axis=1).repeat(2, axis=0).astype(np.int32)
    assert_matches_recurrence(implementation, small_steps(SHAPES[0], 11), segment_ids, dtype, 8, PER_SMALL_STEP)


@settings(max_examples=10)
@given(data=st.data())
def test_extreme_steps_and_decays_stay_finite_and_right(implementation, data):
    """Steps from softplus(-200) to 1000 and rates to -1e4: decays from 1 to far below the smallest float.

    Everything else has one sign: with few steps that count, float32 sums of both signs may keep no digit to compare.
    """
    shape = SHAPES[0]
    inputs = extreme_inputs(shape, data.draw(st.integers(0, 2**16)), data.draw(st.integers(0, 2**16)))
    inputs |= {name: np.abs(inputs[name]) for name in ("x", "B", "C", "D", "initial_state", "dy", "d_final_state")}
    assert_matches_recurrence(implementation, inputs, data.draw(segment_layouts(shape)), "float32", shape.chunk)


def extreme_inputs(shape: Shape, seed: int, extremes: int) -> dict[str, np.ndarray]:
    inputs, random = random_inputs(shape, seed), np.random.default_rng(extremes)
    inputs["dt"] = random.choice([-200.0, -20.0, -3.0, 0.0, 1000.0], inputs["dt"].shape, p=[0.3, 0.3, 0.3, 0.05, 0.05])
    inputs["dt_bias"] *= 0
    inputs["A"] = -random.choice([1e-4, 1.0, 16.0, 1e4], inputs["A"].shape)
    return inputs


def test_paths_beside_a_step_leave_no_rounding_in_its_gradient(implementation):
    """Large paths that do not cross a step must not be added to its gradient and taken off again."""
    segment_ids = np.zeros((2, 37), np.int32)
    segment_ids[0, 7:14] = segment_ids[0, 21:30] = 1
    assert_matches_recurrence(implementation, extreme_inputs(SHAPES[0], 0, 1), segment_ids, "float32", SHAPES[0].chunk)


def test_the_largest_decay_loses_no_small_steps_beside_it(implementation):
    """A sum of exponents that kept -1e30 would lose every other exponent of its chunk."""
    shape = SHAPES[1]
    inputs = random_inputs(shape, 0)
    inputs["dt"][:, 5] = 1e30
    inputs["x"][:, 5] = inputs["D"][:] = 0
    segment_ids = np.zeros((shape.rows, shape.length), np.int32)
    with jax.enable_x64(True):
        exact = in_dtype(inputs, "float64")
        want, _ = values_and_gradients("reference", None)(exact, segment_ids)
    got, gradients = values_and_gradients(implementation, shape.chunk)(in_dtype(inputs, "float32"), segment_ids)
    assert_close(got, want, TOLERANCES["ssd", "float32"].value)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients.values())


@pytest.mark.parametrize("chunk", [1, 7, 8, 9, 10, 21, 1000])
def test_the_chunk_size_changes_nothing(implementation, chunk):
    shape = Shape(rows=1, length=21, heads=2, headdim=2, d_state=3, groups=1, chunk=chunk)
    segment_ids = np.repeat([3, 4, 3, 5], [1, 8, 2, 10])[None]
    dtype = "float64" if implementation == "xla" else "float32"
    assert_matches_recurrence(implementation, random_inputs(shape, chunk), segment_ids, dtype, chunk)


def test_heads_that_one_thread_takes_add_up(implementation):
    shape = Shape(rows=4, length=9, heads=8, headdim=2, d_state=3, groups=2, chunk=8)
    segment_ids = np.repeat([[0, 1]], [4, 5], axis=1).repeat(4, axis=0)
    assert_matches_recurrence(implementation, random_inputs(shape, 13), segment_ids, "float32", 8)


def test_what_is_left_out_counts_as_zero_and_as_one_segment():
    inputs = in_dtype(random_inputs(SHAPES[0], 1), "float32")
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    y = jax.jit(partial(ssd, chunk_size=8))(x, dt, A, B, C)
    explicit, _ = jax.jit(partial(ssd, return_final_state=True, chunk_size=8))(
        x,
        dt,
        A,
        B,
        C,
        jnp.zeros_like(inputs["D"]),
        dt_bias=jnp.zeros_like(inputs["dt_bias"]),
        segment_ids=jnp.full(x.shape[:2], 7),
        initial_state=jnp.zeros_like(inputs["initial_state"]),
    )
    np.testing.assert_array_equal(y, explicit)


def test_nothing_at_all_crosses_a_segment_boundary(implementation):
    """Not even a rounding error, in values or gradients, within a chunk or between chunks."""
    shape = SHAPES[0]
    segment_ids = np.repeat([[1, 2, 3]], [5, 14, 18], axis=1).repeat(2, axis=0)
    inside = segment_ids == 2
    inputs, other = random_inputs(shape, 2), random_inputs(shape, 3)
    changed = dict(inputs)
    for name in ("x", "dt", "B", "C", "dy"):
        where = inside.reshape(*inside.shape, *[1] * (inputs[name].ndim - 2))
        changed[name] = np.where(where, inputs[name], 100 * other[name])
    changed["initial_state"] = other["initial_state"]
    run = values_and_gradients(implementation, shape.chunk)
    values, gradients = run(in_dtype(inputs, "float32"), segment_ids)
    changed_values, changed_gradients = run(in_dtype(changed, "float32"), segment_ids)
    np.testing.assert_array_equal(values["y"][inside], changed_values["y"][inside])
    for name in ("x", "dt", "B", "C"):
        np.testing.assert_array_equal(gradients[name][inside], changed_gradients[name][inside], err_msg=name)

    only = in_dtype(inputs, "float32")
    only["dy"] = jnp.where(inside[..., None, None], only["dy"], 0)
    only["d_final_state"] *= 0
    _, gradients = run(only, segment_ids)
    for name in ("x", "dt", "B", "C"):
        assert np.all(np.asarray(gradients[name])[~inside] == 0), name
    assert np.all(np.asarray(gradients["initial_state"]) == 0)


def test_a_packed_row_equals_its_documents_run_one_by_one(implementation):
    shape = Shape(rows=1, length=40, heads=2, headdim=4, d_state=4, groups=1, chunk=8)
    lengths = [1, 7, 8, 9, 1, 14]
    inputs = in_dtype(random_inputs(shape, 4), "float32")
    inputs["initial_state"] *= 0
    inputs["d_final_state"] *= 0
    packed, packed_gradients = values_and_gradients(implementation, 8)(inputs, np.repeat(np.arange(6), lengths)[None])
    along = ("x", "dt", "B", "C", "dy")
    results = []
    for start, length in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
        document = {k: v[:, start : start + length] if k in along else v for k, v in inputs.items()}
        results.append(values_and_gradients(implementation, 8)(document, np.zeros((1, length), np.int32)))
    alone = {"y": np.concatenate([values["y"] for values, _ in results], axis=1)}
    gradients = {
        k: np.concatenate([g[k] for _, g in results], axis=1) if k in along else sum(g[k] for _, g in results)
        for k in ("x", "dt", "B", "C", "A", "D", "dt_bias")
    }
    assert_close(packed, alone, TOLERANCES["ssd", "float32"].value)
    assert_close(packed_gradients, gradients, TOLERANCES["ssd", "float32"].gradient)


@pytest.mark.parametrize("cuts", [[10], [1, 2, 30], [8, 16], [36]])
def test_calls_that_hand_on_the_state_equal_one_call(cuts):
    inputs = in_dtype(random_inputs(SHAPES[0], 5), "float32")
    segment_ids, call = (
        np.array([[1] * 20 + [2] * 17] * 2),
        jax.jit(partial(ssd, return_final_state=True, chunk_size=8)),
    )
    fixed = {name: inputs[name] for name in ("A", "D", "dt_bias")}

    def run(start, stop, state):
        parts = {name: np.array(inputs[name])[:, start:stop] for name in ("x", "dt", "B", "C")}
        ids = segment_ids[:, start:stop]
        if start and segment_ids[0, start] != segment_ids[0, start - 1]:
            state = np.zeros_like(state)
        return call(**parts, **fixed, segment_ids=ids, initial_state=state)

    whole, final_state = run(0, 37, inputs["initial_state"])
    state, pieces = inputs["initial_state"], []
    for start, stop in zip([0, *cuts], [*cuts, 37], strict=True):
        y, state = run(start, stop, state)
        pieces.append(y)
    got = {"y": np.concatenate(pieces, axis=1), "final_state": state}
    assert_close(got, {"y": whole, "final_state": final_state}, TOLERANCES["ssd", "float32"].value)


def test_one_token_compiles_to_no_loop():
    inputs = in_dtype(random_inputs(SHAPES[3], 6), "float32")
    arrays = [inputs[name] for name in ("x", "dt", "A", "B", "C", "D")]
    assert "while" not in jax.jit(ssd).lower(*arrays).as_text()


def test_states_are_float32_and_outputs_in_the_inputs_type():
    inputs = in_dtype(random_inputs(SHAPES[0], 7), "bfloat16")
    arrays = [inputs[name] for name in ("x", "dt", "A", "B", "C")]
    for length in (37, 1):
        cut = [v[:, :length] if v.ndim > 1 else v for v in arrays]
        y, state = jax.eval_shape(partial(ssd, return_final_state=True), *cut)
        assert (y.dtype, state.dtype) == (jnp.bfloat16, jnp.float32)


def test_forward_and_backward_keep_no_quadratic_array_of_the_whole_length(implementation):
    """2,048 tokens at the 130m shape: 33 MB, natively 76, against 217 MB where autodiff keeps every chunk's decays."""
    f32 = jnp.float32
    x = jax.ShapeDtypeStruct((1, 2048, 24, 64), f32)
    dt = jax.ShapeDtypeStruct((1, 2048, 24), f32)
    heads = jax.ShapeDtypeStruct((24,), f32)
    bc = jax.ShapeDtypeStruct((1, 2048, 1, 128), f32)
    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    @jax.jit
    def gradients(dy, ids, *arrays):
        return jax.vjp(lambda *arrays: ssd(*arrays, segment_ids=ids, implementation=implementation), *arrays)[1](dy)

    memory = gradients.lower(x, ids, x, dt, heads, bc, bc, heads).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 80e6


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("dt", (2, 37, 3), "dt has shape"),
        ("B", (2, 37, 3, 5), "G dividing the 4 heads"),
        ("C", (2, 37, 1, 5), "C has shape"),
        ("D", (3,), "D has shape"),
        ("initial_state", (2, 4, 5, 3), "initial_state has shape"),
        ("x", (2, 0, 4, 3), "no empty axis"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_name(name, shape, message):
    inputs = in_dtype(random_inputs(SHAPES[0], 8), "float32")
    arrays = {k: inputs[k] for k in ARRAYS} | {name: jnp.zeros(shape)}
    with pytest.raises(UserError, match=message):
        ssd(**arrays)


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_implementation_that_does_not_exist_is_refused():
    inputs = in_dtype(random_inputs(SHAPES[0], 9), "float32")
    with pytest.raises(UserError, match="implementation 'cuda' does not exist"):
        ssd(*(inputs[k] for k in ("x", "dt", "A", "B", "C")), implementation="cuda")
