"""The loss from the logits of all tokens at once: the oracle of the chunked form, differentiated automatically."""

import jax
import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.cross_entropy.loss import LossOptions, LossSums
from biomamba_jax.ops.numerics import accumulator_dtype


def linear_cross_entropy(
    hidden: Array, weight: Array, targets: Array, weights: Array, options: LossOptions
) -> LossSums:
    """Return the sums; see `biomamba_jax.ops.linear_cross_entropy`. `options.chunk_size` is ignored."""
    dtype = accumulator_dtype(hidden.dtype)
    weights = jax.lax.stop_gradient(weights.astype(dtype))
    valid = weight[: options.valid_vocab_size].astype(dtype)
    logits = jnp.dot(hidden.astype(dtype), valid.T, precision="highest")
    log_probabilities = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_probabilities, targets[:, None], axis=1)[:, 0]
    smoothing = options.label_smoothing
    smoothed = (1 - smoothing) * nll - smoothing * jnp.mean(log_probabilities, axis=1)
    loss = smoothed + options.z_loss * jax.nn.logsumexp(logits, axis=1) ** 2
    correct = jnp.argmax(logits, axis=1) == targets
    others = jax.lax.stop_gradient((jnp.sum(weights * nll), jnp.sum(weights * correct), jnp.sum(weights)))
    return LossSums(jnp.sum(weights * loss), *others)
