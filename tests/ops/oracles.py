"""What the tests of the ops share: layouts of segments, float64 oracles and the comparison with them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from biomamba_jax.ops.native import library

Arrays = dict[str, np.ndarray]


@st.composite
def segment_layouts(draw, rows: int, length: int) -> np.ndarray:
    """int32 ids [rows, length]: segments of any length, one token included; ids may come back later in a row."""
    change = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    names = draw(st.integers(1, 3))
    return (np.cumsum(np.reshape(change, (rows, length)), axis=1) % (names + 1)).astype(np.int32)


def require_native() -> None:
    """Skip the test where the native library cannot be compiled."""
    if reason := library.unavailable_reason():
        pytest.skip(reason)


def in_dtype(inputs: Arrays, dtype: str, activations: set[str]) -> dict[str, jax.Array]:
    """Activations in `dtype`, parameters and states in at least float32, as in a model."""
    parameters = jnp.promote_types(dtype, jnp.float32)
    return {name: jnp.asarray(v, dtype if name in activations else parameters) for name, v in inputs.items()}


def in_float64(compute: Callable[..., Any], inputs: Mapping[str, jax.Array], *args: Any) -> Any:
    """compute(inputs, *args) with all inputs, as they were rounded, widened to float64; the results as numpy arrays."""
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(v, np.float64)) for name, v in inputs.items()}
        return jax.tree.map(np.asarray, compute(wide, *args))


def with_one_small(inputs: Arrays, axes: Mapping[str, int]) -> Arrays:
    """The inputs with the last slice along the given axis of each named array scaled down a thousand times.

    A whole array's maximum would hide any error in what that channel or head alone contributes to.
    """
    scaled = {name: inputs[name].copy() for name in axes}
    for name, axis in axes.items():
        scaled[name][(slice(None),) * axis + (-1,)] *= 2.0**-10
    return inputs | scaled


def assert_close(
    got: Mapping[str, Any], want: Mapping[str, Any], tolerance: float, per: Mapping[str, int] | None = None
) -> None:
    """max|got - want| <= tolerance * max|want| for every array, or for every slice along the axis of those in `per`."""
    for name, expected in want.items():
        if per is not None and name not in per:
            continue
        expected, actual = np.asarray(expected, np.float64), np.asarray(got[name], np.float64)
        assert actual.shape == expected.shape, name
        if expected.size:
            others = None if per is None else tuple(i for i in range(expected.ndim) if i != per[name])
            error, scale = np.max(np.abs(actual - expected), others), np.max(np.abs(expected), others)
            assert np.all(error <= tolerance * scale), f"{name}: off by {error}, largest value {scale}"
