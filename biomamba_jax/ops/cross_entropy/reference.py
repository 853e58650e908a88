"""The loss from the logits of all tokens at once: the oracle of the chunked form. Gradients are JAX's own."""

import jax
import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.cross_entropy.sums import LossSums
from biomamba_jax.ops.numerics import accumulator_dtype


def linear_cross_entropy(
    hidden: Array,
    weight: Array,
    targets: Array,
    weights: Array,
    valid_vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    chunk_size: int | None,
) -> LossSums:
    """See `biomamba_jax.ops.linear_cross_entropy`; `chunk_size` plays no part."""
    dtype = accumulator_dtype(hidden.dtype)
    weights = jax.lax.stop_gradient(weights.astype(dtype))
    valid = weight[:valid_vocab_size].astype(dtype)
    logits = jnp.dot(hidden.astype(dtype), valid.T, precision="highest")
    log_probabilities = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_probabilities, targets[:, None], axis=1)[:, 0]
    smoothed = (1 - label_smoothing) * nll - label_smoothing * jnp.mean(log_probabilities, axis=1)
    loss = smoothed + z_loss * jax.nn.logsumexp(logits, axis=1) ** 2
    correct = jnp.argmax(logits, axis=1) == targets
    others = jax.lax.stop_gradient((jnp.sum(weights * nll), jnp.sum(weights * correct), jnp.sum(weights)))
    return LossSums(jnp.sum(weights * loss), *others)
