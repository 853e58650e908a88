"""RMSNorm and its gated form against the formula in float64, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from biomamba_jax.ops import rms_norm


def formula(x, weight, gate, groups):
    u = x if gate is None else x * gate / (1 + jnp.exp(-gate))
    grouped = u.reshape(*u.shape[:-1], groups, -1)
    scale = 1 / jnp.sqrt((grouped**2).mean(-1, keepdims=True) + 1e-5)
    return (grouped * scale).reshape(u.shape) * weight


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-6)])
def test_values_and_gradients_are_those_of_the_formula(gated, groups, dtype, tolerance):
    random = np.random.default_rng(0)
    x, gate, mix = (random.normal(size=(2, 5, 16)) for _ in range(3))
    weight = random.normal(size=16)
    inputs = [jnp.asarray(a, dtype) for a in (x, gate)]
    rounded = [np.asarray(a, np.float64) for a in inputs]

    def loss(function, x, gate, weight, mix):
        return jnp.sum(function(x, weight, gate if gated else None) * mix)

    ours = jax.jit(jax.grad(lambda *a: loss(lambda x, w, z: rms_norm(x, w, z, groups=groups), *a), (0, 1, 2)))
    with jax.enable_x64(True):
        expected = jax.grad(lambda *a: loss(lambda x, w, z: formula(x, w, z, groups), *a), (0, 1, 2))(
            *map(jnp.asarray, rounded), jnp.asarray(weight), jnp.asarray(mix)
        )
    got = ours(*inputs, jnp.asarray(weight, jnp.float32), jnp.asarray(mix, jnp.float32))
    for a, b in zip(got, map(np.asarray, expected), strict=True):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= tolerance * max(np.linalg.norm(b), 1)


def test_statistics_are_kept_in_float32():
    assert rms_norm(jnp.ones((1, 8), jnp.bfloat16), jnp.ones(8)).dtype == jnp.float32
