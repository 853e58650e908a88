"""Initializers (key, shape, dtype) -> array with the distributions of state-spaces/mamba at e9594ce."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

DT_MIN, DT_MAX = 1e-3, 1e-1
"""Bounds of the initial time steps."""


def linear(fan_in: int, scale: float = 1.0) -> Callable:
    """Return an initializer U[-s, s] with s = scale / sqrt(fan_in): PyTorch's kaiming_uniform(a = sqrt 5)."""
    limit = scale * fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -limit, limit)


def dt_bias(key, shape, dtype=jnp.float32):
    """Return the inverse softplus of time steps drawn log-uniformly from [DT_MIN, DT_MAX]."""
    dt = jnp.exp(jax.random.uniform(key, shape, dtype, jnp.log(DT_MIN), jnp.log(DT_MAX)))
    return dt + jnp.log(-jnp.expm1(-dt))


def a_log_range(key, shape, dtype=jnp.float32):
    """Return A_log[e, n] = log(n + 1), for Mamba-1 (S4D-real)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


def a_log_uniform(key, shape, dtype=jnp.float32):
    """Return A_log = log(a) with a from U[1, 16], for Mamba-2."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))
