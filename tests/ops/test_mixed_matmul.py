"""Products with weights of any dtype against the plain loop in float64, and the error of int8 weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomamba_jax.errors import UserError
from biomamba_jax.ops import mixed_matmul
from biomamba_jax.ops.mixed_matmul import quantize
from biomamba_jax.ops.native import library
from tests.ops.oracles import require_native

# Whole vectors and tiles, remainders of both, less than one of either, and work for several threads.
SIZES = [(64, 64), (37, 13), (5, 1), (301, 1003)]


def weights_of(dtype, inputs, outputs, seed=0):
    """Random weights, and their scales."""
    weight = np.random.default_rng(seed).normal(size=(outputs, inputs)).astype(np.float32)
    return quantize(jnp.asarray(weight)) if dtype == "int8" else (jnp.asarray(weight, dtype), None)


def assert_rounded(got, x, weight, scale):
    """Each result is off by 1e-6 of the sum of its terms' magnitudes at most: float32's rounding of a few terms."""
    x, dense = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    dense = dense if scale is None else dense * np.asarray(scale, np.float64)[:, None]
    assert got.dtype == jnp.float32
    assert np.all(np.abs(np.asarray(got, np.float64) - x @ dense.T) <= 1e-6 * (np.abs(x) @ np.abs(dense).T))


@pytest.mark.parametrize("implementation", ["native", "xla", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_output_is_the_product_in_float64_up_to_float32_s_rounding(implementation, dtype):
    if implementation == "native":
        require_native()
    for inputs, outputs in SIZES if implementation != "reference" else SIZES[1:3]:
        weight, scale = weights_of(dtype, inputs, outputs)
        for rows in (1, 2, 3, 8, 33):
            x = jnp.asarray(np.random.default_rng(rows).normal(size=(rows, 1, inputs)), jnp.float32)
            assert_rounded(mixed_matmul(x, weight, scale, implementation=implementation), x, weight, scale)


@pytest.mark.parametrize("implementation", ["native", "xla"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_bfloat16_activations_lose_nothing_more(implementation, dtype):
    if implementation == "native":
        require_native()
    weight, scale = weights_of(dtype, 37, 13)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 37)), jnp.bfloat16)
    assert_rounded(mixed_matmul(x, weight, scale, implementation=implementation), x, weight, scale)


def test_an_int8_weight_is_off_by_half_a_step_of_its_output_at_most():
    weight = np.random.default_rng(0).normal(size=(50, 33)) * np.exp(np.arange(50) - 25)[:, None]
    weight[7] = 0
    values, scales = quantize(jnp.asarray(weight, jnp.float32))
    error = np.abs(np.asarray(values, np.float64) * np.asarray(scales, np.float64)[:, None] - weight)
    largest = np.abs(weight).max(1)
    assert values.dtype == jnp.int8 and np.all(error.max(1) <= largest / 127 / 2 * (1 + 1e-5))
    assert np.array_equal(np.abs(np.asarray(values, np.int32)).max(1), np.where(largest > 0, 127, 0))


@pytest.mark.parametrize("implementation", ["native", "xla"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_that_are_not_finite_spoil_their_own_output_only(implementation, dtype):
    if implementation == "native":
        require_native()
    weight = np.ones((9, 21), np.float32)
    weight[4, 20], weight[6, 0] = np.nan, np.inf
    stored = quantize(jnp.asarray(weight)) if dtype == "int8" else (jnp.asarray(weight, dtype), None)
    y = mixed_matmul(jnp.ones((2, 21)), *stored, implementation=implementation)
    assert np.array_equal(np.isfinite(y[0]), ~np.isin(np.arange(9), [4, 6]))


def test_few_rows_on_a_cpu_run_native_and_many_as_xla_s_product():
    for rows, native in (16, library.unavailable_reason() is None), (17, False):
        text = jax.jit(mixed_matmul).lower(jnp.ones((rows, 8)), jnp.ones((4, 8), jnp.int8), jnp.ones(4)).as_text()
        assert ("custom_call @mixed_matmul" in text) == native


@pytest.mark.usefixtures("unchecked_shapes")
def test_shapes_that_do_not_match_and_other_dtypes_are_refused():
    x = jnp.ones((2, 8))
    with pytest.raises(UserError, match=r"weight \[F C\], not \(2, 8\) and \(8, 4\)"):
        mixed_matmul(x, jnp.ones((8, 4)))
    with pytest.raises(UserError, match="scale has shape"):
        mixed_matmul(x, jnp.ones((4, 8), jnp.int8), jnp.ones(8))
    require_native()
    with pytest.raises(UserError, match="float32, bfloat16 or int8, not float16"):
        mixed_matmul(x, jnp.ones((4, 8), jnp.float16), implementation="native")
