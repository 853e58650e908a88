"""The public functions: argument checks and the choice of implementation. T is the number of tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.cross_entropy import reference, xla
from biomamba_jax.ops.cross_entropy.sums import LossSums

_IMPLEMENTATIONS: dict[str, Callable[..., LossSums]] = {
    "xla": xla.linear_cross_entropy,
    "reference": reference.linear_cross_entropy,
}
_PREFERRED: dict[dispatch.Platform, tuple[str, ...]] = {"cpu": ("xla",), "gpu": ("xla",), "tpu": ("xla",)}


def linear_cross_entropy(
    hidden: Float[Array, "T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, " T"],
    *,
    weights: Float[Array, " T"] | None = None,
    valid_vocab_size: int | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    axis: str | None = None,
    implementation: dispatch.Implementation | None = None,
) -> LossSums:
    """Cross-entropy of softmax(hidden weight^T), in chunks of tokens: the logits of the whole batch never exist.

    Per token, with logits z over the valid ids: (1 - s) nll + s mean_v(-log p_v) + z_loss logsumexp(z)^2, where s is
    `label_smoothing` (the formula of `torch.nn.functional.cross_entropy`; z-loss: Chowdhery et al. 2022, arXiv
    2204.02311, section 5). Products are taken in hidden's dtype with float32 accumulation; logits, the loss and the sum
    of weight's gradient over tokens are float32 (float64 for float64 hidden states).

    Args:
      hidden: hidden states after the last norm.
      weight: the head, in the layout of the tied embedding.
      targets: ids below `valid_vocab_size`; any valid id where the token's weight is zero.
      weights: what each token counts, a constant without gradient; None is 1.
      valid_vocab_size: ids from here on are padding of the vocabulary and take no part in the softmax; None is V.
      label_smoothing: share of the loss spread evenly over the valid ids, in [0, 1].
      z_loss: weight of the squared log-partition.
      chunk_size: tokens whose logits exist at once; None is the best for the platform. Any T is allowed.
      axis: mesh axis that the vocabulary is spread over: weight holds this device's V rows of all, and the sums are
        the same on every device, as are hidden, targets and weights. The gradient of hidden is this device's part.
      implementation: None (the best for the platform) or a name, see `dispatch`.

    Returns:
      Sums, not means, differentiable in hidden and weight through `loss`.

    Raises:
      ValueError: shapes or settings do not fit together.
      UserError: the implementation does not exist or cannot run here.
    """
    devices = jax.lax.axis_size(axis) if axis else 1
    valid_vocab_size = _check(hidden, weight, targets, valid_vocab_size, chunk_size, devices)
    if weights is None:
        weights = jnp.ones(targets.shape, jnp.float32)
    if weights.shape != targets.shape:
        raise ValueError(f"linear_cross_entropy: weights must have shape {targets.shape}, not {weights.shape}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"linear_cross_entropy: label_smoothing must lie in [0, 1], not {label_smoothing}")
    if axis is not None:
        implementation = implementation or "xla"
        if implementation != "xla":
            raise UserError(f"linear_cross_entropy: {implementation!r} cannot spread the vocabulary over devices")
    compute = dispatch.choose("linear_cross_entropy", implementation, _IMPLEMENTATIONS, _PREFERRED)
    arguments = hidden, weight, targets, weights, valid_vocab_size, label_smoothing, z_loss, chunk_size
    return compute(*arguments) if axis is None else compute(*arguments, axis)


def token_negative_log_likelihoods(
    hidden: Float[Array, "T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, " T"],
    *,
    valid_vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> Float[Array, " T"]:
    """-log p(target) of every token in nats and float32, in chunks of tokens: for sums per document. Not for training.

    Arguments and errors as in `linear_cross_entropy`.
    """
    valid_vocab_size = _check(hidden, weight, targets, valid_vocab_size, chunk_size)
    return xla.token_negative_log_likelihoods(hidden, weight, targets, valid_vocab_size, chunk_size)


def _check(
    hidden: Array,
    weight: Array,
    targets: Array,
    valid_vocab_size: int | None,
    chunk_size: int | None,
    devices: int = 1,
) -> int:
    """The number of valid ids."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or 0 in hidden.shape:
        raise ValueError(
            f"linear_cross_entropy: hidden must be [T D] and weight [V D], not {hidden.shape} and {weight.shape}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"linear_cross_entropy: targets must have shape {hidden.shape[:1]}, not {targets.shape}")
    rows = weight.shape[0] * devices
    valid = rows if valid_vocab_size is None else valid_vocab_size
    if not 0 < valid <= rows:
        raise ValueError(f"linear_cross_entropy: valid_vocab_size must lie in 1..{rows}, not {valid}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"linear_cross_entropy: chunk_size must be at least 1, not {chunk_size}")
    return valid
