"""How the next token is chosen from its logits: greedily, or drawn after the usual filters.

The order is that of transformers: repetition penalty, temperature, top-k, top-p, min-p. Each filter keeps the tokens
whose logit reaches a threshold. It is found by bisection, not by sorting: a sort of 50,000 logits takes half as long as
the model's own step at the 130m shape on CPU, and more at larger batches.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from biomamba_jax.errors import UserError
from biomamba_jax.ops.array_typing import Array, Float, Int

_SMALLEST = 1e-30
"""Logits divided by less are no float32."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, and when to stop."""

    max_new_tokens: int = 128
    """Most tokens to generate for each prompt."""
    temperature: float = 0.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that have this probability together; 1: from all."""
    min_p: float = 0.0
    """Draw from tokens at least this probable relative to the likeliest; 0: from all."""
    repetition_penalty: float = 1.0
    """Logits of tokens that the prompt or the text has already: divided by this if positive, else multiplied."""
    seed: int = 0
    """Seed of the draws. A prompt's text does not depend on the prompts beside it; the same prompt again differs."""
    stop: list[str] = dataclasses.field(default_factory=list)
    """Strings that end the text; it is cut before the one that is complete first."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "must be at least 1"),
            "temperature": (
                self.temperature == 0 or _SMALLEST <= self.temperature < math.inf,
                f"must be 0, or finite and at least {_SMALLEST:g}",
            ),
            "top_k": (0 <= self.top_k < 2**31, "must be 0 or more, and less than 2^31"),
            "top_p": (0 < self.top_p <= 1, "must be in (0, 1]"),
            "min_p": (0 <= self.min_p <= 1, "must be in [0, 1]"),
            "repetition_penalty": (
                _SMALLEST <= self.repetition_penalty <= 1 / _SMALLEST,
                f"must be in [{_SMALLEST:g}, {1 / _SMALLEST:g}]",
            ),
            "seed": (0 <= self.seed < 2**32, "must be in 0..2^32 - 1"),
            "stop": (
                not isinstance(self.stop, str) and all(self.stop),
                "must be a list of strings, none of them empty",
            ),
        }
        for key, (good, remedy) in checks.items():
            if not good:
                raise UserError(f"{key} = {getattr(self, key)!r}: {remedy}")


class Steps(NamedTuple):
    """What has to be computed to choose a token; static, so that what is off costs nothing."""

    draw: bool
    top_k: bool
    top_p: bool

    @classmethod
    def of(cls, sampling: Sampling) -> "Steps":
        """The steps that `sampling` needs."""
        draw = sampling.temperature > 0
        return cls(draw, draw and sampling.top_k > 0, draw and sampling.top_p < 1)


@struct.dataclass
class Values:
    """The numbers of a `Sampling` as arrays, so that changing one compiles nothing."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    repetition_penalty: Float[Array, ""]

    @classmethod
    def of(cls, sampling: Sampling) -> "Values":
        """The numbers of `sampling`."""
        return cls(
            temperature=jnp.float32(sampling.temperature),
            top_k=jnp.int32(sampling.top_k),
            top_p=jnp.float32(sampling.top_p),
            min_p=jnp.float32(sampling.min_p),
            repetition_penalty=jnp.float32(sampling.repetition_penalty),
        )


def next_tokens(
    logits: Float[Array, "B V"], seen: Array | None, keys: Array, values: Values, steps: Steps
) -> Int[Array, " B"]:
    """One token for each row; -1 where the logits hold a NaN, of which there is no likeliest.

    Args:
      logits: minus infinity where a token must not be chosen.
      seen: [B V] bool, tokens that the penalty falls on; None where there is none.
      keys: [B] random keys, used once.
    """
    if seen is not None:
        logits = penalized(logits, seen, values.repetition_penalty)
    broken = jnp.isnan(jnp.max(logits, axis=1))  # asked before the filters, which rule a NaN out
    if steps.draw:
        logits = filtered(logits / values.temperature, values, steps)
        logits += jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.where(broken, -1, _argmax(logits))


def _argmax(logits: Float[Array, "B V"]) -> Int[Array, " B"]:
    """The first of the likeliest tokens of each row; 0 in a row with a NaN.

    In two reductions of whole vectors: XLA's CPU backend compares pairs of value and index one by one, which took 3 %
    of the time of the 130m model's step.
    """
    vocabulary = logits.shape[1]
    best = logits == jnp.max(logits, axis=1, keepdims=True)
    return jnp.min(jnp.where(best, jnp.arange(vocabulary, dtype=jnp.int32), vocabulary), axis=1) % vocabulary


def penalized(logits: Float[Array, "B V"], seen: Array, penalty: Float[Array, ""]) -> Float[Array, "B V"]:
    """The repetition penalty of CTRL (Keskar et al. 2019, arXiv 1909.05858), with the sign's care of transformers."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: Float[Array, "B V"], values: Values, steps: Steps) -> Float[Array, "B V"]:
    """Minus infinity for every token that top-k, top-p (Holtzman et al. 2020) or min-p (Nguyen et al. 2024) leaves out.

    Tokens whose logits equal the last one kept are kept as well.
    """
    # min-p compares with the likeliest token: the normalisation cancels.
    likely = logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(values.min_p)
    if steps.top_k:
        logits = jnp.where(_among_the_first(logits, jnp.ones_like(logits), values.top_k), logits, -jnp.inf)
    if steps.top_p:
        p = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(_among_the_first(logits, p, values.top_p), logits, -jnp.inf)
    return jnp.where(likely, logits, -jnp.inf)


def _among_the_first(x: Float[Array, "B V"], weights: Float[Array, "B V"], limit: Array) -> Array:
    """Which elements of a row have less than `limit` of weight on the elements greater than them, exactly.

    Bisects the threshold over the 2^32 float32 values in their order, which is that of integers once the negative ones
    are turned around.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    low = jnp.full((x.shape[0], 1), jnp.iinfo(jnp.int32).min)  # too low
    high = jnp.max(order, axis=-1, keepdims=True)  # high enough: nothing is greater

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        enough = jnp.sum(jnp.where(order > middle, weights, 0), axis=-1, keepdims=True) < limit
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    _, threshold = jax.lax.fori_loop(0, 32, halve, (low, high))
    return order >= threshold
