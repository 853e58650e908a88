"""What the tests of the ops share: layouts of segments, float64 oracles and the comparison with them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

Arrays = dict[str, np.ndarray]


@st.composite
def segment_layouts(draw, rows: int, length: int) -> np.ndarray:
    """int32 ids [rows, length]: segments of any length, one token included; ids may come back later in a row."""
    change = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    names = draw(st.integers(1, 3))
    return (np.cumsum(np.reshape(change, (rows, length)), axis=1) % (names + 1)).astype(np.int32)


def in_dtype(inputs: Arrays, dtype: str, activations: set[str]) -> dict[str, jax.Array]:
    """Activations in `dtype`, parameters and states in at least float32, as in a model."""
    parameters = jnp.promote_types(dtype, jnp.float32)
    return {name: jnp.asarray(v, dtype if name in activations else parameters) for name, v in inputs.items()}


def in_float64(compute: Callable[..., Any], inputs: Mapping[str, jax.Array], *args: Any) -> Any:
    """compute(inputs, *args) with all inputs, as they were rounded, widened to float64; the results as numpy arrays."""
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(v, np.float64)) for name, v in inputs.items()}
        return jax.tree.map(np.asarray, compute(wide, *args))


def assert_close(got: Mapping[str, Any], want: Mapping[str, Any], tolerance: float) -> None:
    """max|got - want| <= tolerance * max|want| for every named array."""
    for name, expected in want.items():
        expected, actual = np.asarray(expected, np.float64), np.asarray(got[name], np.float64)
        assert actual.shape == expected.shape, name
        if expected.size:
            error, scale = np.max(np.abs(actual - expected)), np.max(np.abs(expected))
            assert error <= tolerance * scale, f"{name}: off by {error:.2e}, largest value {scale:.2e}"
