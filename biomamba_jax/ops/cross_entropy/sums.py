"""What a loss over tokens adds up to."""

import math
from typing import NamedTuple

from biomamba_jax.ops.array_typing import Array, Float


class LossSums(NamedTuple):
    """Sums over tokens, each times its weight: sums of parts of a batch, or of many hosts, add up; means don't."""

    loss: Float[Array, ""]
    """What is minimised: label-smoothed cross-entropy plus z-loss. The only one with a gradient."""
    nll: Float[Array, ""]
    """Negative log-likelihood of the targets, in nats."""
    correct: Float[Array, ""]
    """Tokens whose target has the largest logit."""
    weight: Float[Array, ""]
    """The weights themselves: divide by it for a mean."""


def perplexity(nats: float) -> float:
    """Return exp of a mean cross-entropy in nats per token: infinity where it overflows, NaN for NaN."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
