"""The Triton kernels of `ssd`: numbers by Triton's interpreter, against the plain recurrence in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from biomamba_jax.errors import UserError
from biomamba_jax.ops import ssd
from tests.compilers import needs_triton
from tests.ops import triton_interpreter
from tests.ops.oracles import assert_close, with_one_small
from tests.ops.test_ssd import (
    ARRAYS,
    HEAD_AXES,
    PER_HEAD,
    PER_SMALL_STEP,
    Shape,
    assert_equal_the_recurrence,
    extreme_inputs,
    given_decays,
    in_dtype,
    random_inputs,
    segment_layouts,
    small_steps,
)
from tests.tolerances import TOLERANCES

CHUNK = 64
GROUPS = Shape(rows=2, length=70, heads=4, headdim=6, d_state=5, groups=2, chunk=CHUNK)  # all of it padded
OWN = GROUPS._replace(heads=2)  # heads with their own B and C
PUBLISHED = Shape(rows=1, length=192, heads=2, headdim=64, d_state=128, groups=1, chunk=CHUNK)


def triton(inputs: dict[str, jax.Array], segment_ids: np.ndarray | None) -> tuple[dict, dict]:
    return triton_interpreter.values_and_gradients("ssd", inputs, ARRAYS, segment_ids, chunk_size=None)


def assert_matches_recurrence(inputs: dict[str, np.ndarray], segment_ids: np.ndarray, dtype: str, per=None) -> None:
    arrays = in_dtype(inputs, dtype)
    assert_equal_the_recurrence(triton(arrays, segment_ids), arrays, segment_ids, TOLERANCES["ssd", dtype], per)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@settings(max_examples=2)
@given(data=st.data())
def test_values_and_all_gradients_match_the_recurrence(dtype, data):
    inputs = random_inputs(GROUPS, data.draw(st.integers(0, 2**16)))
    assert_matches_recurrence(inputs, data.draw(segment_layouts(GROUPS)), dtype)


@needs_triton
@pytest.mark.slow
def test_the_published_sizes_match_the_recurrence():
    segment_ids = np.repeat([[7, 3, 7]], [20, 44, 128], axis=1).astype(np.int32)
    assert_matches_recurrence(random_inputs(PUBLISHED, 2), segment_ids, "bfloat16")


@needs_triton
def test_every_head_is_right_on_its_own_scale():
    segment_ids = np.repeat([[1, 2]], [50, 20], axis=1).repeat(2, axis=0).astype(np.int32)
    inputs = with_one_small(random_inputs(GROUPS, 10), HEAD_AXES)
    assert_matches_recurrence(inputs, segment_ids, "float32", PER_HEAD)


@needs_triton
def test_given_decays_of_heads_with_their_own_b_and_c_match_the_recurrence():
    segment_ids = np.repeat([[1, 2]], [50, 20], axis=1).repeat(2, axis=0).astype(np.int32)
    # Some decays are extreme: sums of exponents of a few hundred have few digits of float32 left for the others.
    assert_matches_recurrence(given_decays(OWN, 12), segment_ids, "bfloat16")


@needs_triton
def test_small_steps_have_their_gradient_head_by_head():
    segment_ids = np.repeat([[1, 2]], [50, 20], axis=1).repeat(2, axis=0).astype(np.int32)
    assert_matches_recurrence(small_steps(GROUPS, 11), segment_ids, "float32", PER_SMALL_STEP)


@needs_triton
def test_extreme_steps_and_decays_stay_finite_and_right():
    resets = np.random.default_rng(1).random((GROUPS.rows, GROUPS.length)) < 0.02
    segment_ids = np.cumsum(resets, axis=1).astype(np.int32)
    assert_matches_recurrence(extreme_inputs(GROUPS, 1, 1), segment_ids, "bfloat16")


@needs_triton
def test_what_is_left_out_counts_as_zero_and_as_one_segment():
    inputs = in_dtype(random_inputs(GROUPS, 3), "float32")
    explicit = inputs | {name: jnp.zeros_like(inputs[name]) for name in ("D", "dt_bias", "initial_state")}
    for name in ("D", "dt_bias", "initial_state"):
        del inputs[name]
    got, gradients = triton(inputs, None)
    want, want_gradients = triton(explicit, np.full((2, 70), 7, np.int32))
    assert_close(got, want, TOLERANCES["ssd", "float32"].value)
    assert_close(gradients, {k: want_gradients[k] for k in gradients}, TOLERANCES["ssd", "float32"].gradient)


@needs_triton
def test_nothing_at_all_crosses_a_segment_boundary():
    """Not even a rounding error, in values or gradients, within a chunk or between chunks."""
    segment_ids = np.repeat([[1, 2, 3]], [30, 36, 4], axis=1).repeat(2, axis=0).astype(np.int32)
    inside = segment_ids == 2
    inputs, other = random_inputs(GROUPS, 4), random_inputs(GROUPS, 5)
    changed = dict(inputs)
    for name in ("x", "dt", "B", "C", "dy"):
        where = inside.reshape(*inside.shape, *[1] * (inputs[name].ndim - 2))
        changed[name] = np.where(where, inputs[name], 100 * other[name])
    changed["initial_state"] = other["initial_state"]
    values, gradients = triton(in_dtype(inputs, "float32"), segment_ids)
    changed_values, changed_gradients = triton(in_dtype(changed, "float32"), segment_ids)
    np.testing.assert_array_equal(values["y"][inside], changed_values["y"][inside])
    for name in ("x", "dt", "B", "C"):
        np.testing.assert_array_equal(gradients[name][inside], changed_gradients[name][inside], err_msg=name)


@pytest.mark.usefixtures("unchecked_shapes")
def test_without_a_gpu_the_kernels_refuse_and_say_why():
    inputs = in_dtype(random_inputs(GROUPS, 6), "float32")
    with pytest.raises(UserError, match="'triton' cannot be used: it needs a GPU, and this program is for cpu"):
        ssd(*(inputs[k] for k in ("x", "dt", "A", "B", "C")), implementation="triton")
