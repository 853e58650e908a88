"""The options of the loss, the sums that it returns, and what its implementations share."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.numerics import sum_leading


class LossOptions(NamedTuple):
    """Static arguments of `api.linear_cross_entropy`."""

    valid_vocab_size: int
    """Vocabulary ids below it take part in the softmax."""
    label_smoothing: float = 0.0
    """Share of the target distribution that is uniform over the valid ids."""
    z_loss: float = 0.0
    """Weight of the squared log-partition."""
    chunk_size: int | None = None
    """Tokens whose logits exist at once; None is the platform's best."""
    axis: str | None = None
    """Mesh axis that the vocabulary is sharded over."""


class LossSums(NamedTuple):
    """Weighted sums over tokens: sums of parts of a batch, or of many hosts, can be added; means cannot."""

    loss: Float[Array, ""]
    """The training objective: label-smoothed cross-entropy plus z-loss. The only sum with a gradient."""
    nll: Float[Array, ""]
    """Negative log-likelihood of the targets, in nats."""
    correct: Float[Array, ""]
    """Tokens whose target has the largest logit."""
    weight: Float[Array, ""]
    """The weights themselves: divide by it for a mean."""

    @classmethod
    def zeros(cls, dtype: DTypeLike = jnp.float32) -> "LossSums":
        """Return the sums over no token."""
        return cls(*(jnp.zeros((), dtype) for _ in cls._fields))


def perplexity(nats: float) -> float:
    """Return exp of a mean cross-entropy in nats per token: infinity where it overflows, NaN for NaN."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


class Statistics(NamedTuple):
    """Statistics of each token's logits over the valid ids of the whole vocabulary."""

    log_partition: Array
    """Log of the sum of exp(logits) [T]."""
    target: Array
    """Logit of the target [T]."""
    largest: Array
    """Largest logit [T]."""


def token_sums(
    hidden: Array, weights: Array, statistics: Statistics, mean_row: Array | None, options: LossOptions
) -> LossSums:
    """Return the sums; `mean_row` [D], `mean_valid_row` of the whole vocabulary, yields the mean logit."""
    log_partition, target, largest = statistics
    nll = log_partition - target
    loss = nll + options.z_loss * log_partition**2
    if mean_row is not None:
        mean_logit = jnp.dot(hidden.astype(nll.dtype), mean_row, precision="highest")
        loss += options.label_smoothing * (target - mean_logit)
    sums = (jnp.sum(weights * v) for v in (loss, nll, target >= largest, jnp.ones_like(nll)))
    return LossSums(*sums)


def vocabulary_ids(rows: int, axis: str | None) -> Array:
    """Return the vocabulary ids of this device's rows of the weight."""
    ids = jnp.arange(rows)
    return ids if axis is None else ids + jax.lax.axis_index(axis) * rows


def mean_valid_row(head: Array, options: LossOptions, dtype: DTypeLike) -> Array | None:
    """Return the sum of this device's valid rows over the number of valid ids [D]; None without label smoothing."""
    valid, axis = options.valid_vocab_size, options.axis
    if not options.label_smoothing:
        return None
    rows = head[:valid].astype(dtype)
    if axis is not None:
        rows = jnp.where((vocabulary_ids(head.shape[0], axis) < valid)[:, None], head.astype(dtype), 0)
    return sum_leading(rows) / valid
