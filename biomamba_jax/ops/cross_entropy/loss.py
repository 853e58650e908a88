"""The options of the loss and the sums that it returns."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from biomamba_jax.ops.array_typing import Array, Float


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
