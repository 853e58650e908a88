"""The authors' initial values (state-spaces/mamba at e9594ce), as initializers of the form (key, shape, dtype) ->
array."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4


def uniform(limit: float) -> Callable:
    """U[-limit, limit]."""

    def init(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -limit, limit)

    return init


def linear(fan_in: int, scale: float = 1.0) -> Callable:
    """U[-s, s] with s = scale / sqrt(fan_in): PyTorch's kaiming_uniform(a = sqrt 5)."""
    return uniform(scale * fan_in**-0.5)


def dt_bias(key, shape, dtype=jnp.float32):
    """The inverse softplus of a time step drawn log-uniformly from [DT_MIN, DT_MAX]."""
    log_dt = jax.random.uniform(key, shape, dtype, jnp.log(DT_MIN), jnp.log(DT_MAX))
    dt = jnp.maximum(jnp.exp(log_dt), DT_FLOOR)
    return dt + jnp.log(-jnp.expm1(-dt))


def a_log_range(key, shape, dtype=jnp.float32):
    """Mamba-1 (S4D-real): A_log[e, n] = log(n + 1)."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=dtype)), shape)


def a_log_uniform(key, shape, dtype=jnp.float32):
    """Mamba-2: A_log = log A with A from U[1, 16]."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, 16.0))
