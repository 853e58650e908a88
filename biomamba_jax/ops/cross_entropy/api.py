"""The public functions `linear_cross_entropy` and `token_negative_log_likelihoods`: argument checks and dispatch."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.cross_entropy import reference, xla
from biomamba_jax.ops.cross_entropy.loss import LossOptions, LossSums
from biomamba_jax.ops.kernel_arrays import check_shapes

_FOLDER = __name__.rpartition(".")[0]
_IMPLEMENTATIONS: Mapping[str, Callable[..., LossSums]] = {
    "xla": xla.linear_cross_entropy,
    "pallas_tpu": dispatch.late(f"{_FOLDER}.pallas_tpu", "linear_cross_entropy"),
    "reference": reference.linear_cross_entropy,
}


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
    """Compute the cross-entropy of softmax(hidden weight^T) without the logits of the whole batch.

    Per token, with logits z over the valid ids: (1 - s) nll + s mean_v(-log p_v) + z_loss logsumexp(z)^2, where s is
    `label_smoothing`. Products are computed in hidden's dtype with float32 accumulation; logits, the loss and the sum
    over tokens of weight's gradient are float32 (float64 for float64 hidden states).

    Source: label smoothing as in `torch.nn.functional.cross_entropy`; z-loss: Chowdhery et al. 2022 (arXiv 2204.02311,
    section 5).

    Args:
      hidden: hidden states after the last norm [T D], any float dtype.
      weight: output embedding [V D], in the layout of the tied embedding.
      targets: ids below `valid_vocab_size` [T]; any valid id where the token's weight is zero.
      weights: weight of each token in the sums [T], a constant without gradient; None is 1.
      valid_vocab_size: ids from here on are padding of the vocabulary and excluded from the softmax; None is V.
      label_smoothing: share of the target distribution that is uniform over the valid ids, in [0, 1].
      z_loss: weight of the squared log-partition.
      chunk_size: tokens whose logits "xla" has at once; None is the platform's best. Any T is allowed.
      axis: mesh axis that the vocabulary is sharded over: weight holds this device's V rows, hidden, targets and
        weights are replicated, and so are the sums. The gradient of hidden is this device's partial sum.
      implementation: "xla", "pallas_tpu" (TPU), "reference", or None for the platform's fastest.

    Returns:
      Sums, not means, differentiable in hidden and weight through `loss`.

    Raises:
      UserError: shapes or settings do not match, or the implementation does not exist or cannot run here.
    """
    devices = jax.lax.axis_size(axis) if axis else 1
    valid_vocab_size = _check(hidden, weight, targets, valid_vocab_size, chunk_size, devices)
    if weights is None:
        weights = jnp.ones(targets.shape, jnp.float32)
    check_shapes("linear_cross_entropy", {"weights": weights}, weights=targets.shape)
    if not 0 <= label_smoothing <= 1:
        raise UserError(f"linear_cross_entropy: label_smoothing must be in [0, 1], not {label_smoothing}")
    unsupported: dict[str, Callable[[], str | None]] = {
        "pallas_tpu": dispatch.late(f"{_FOLDER}.pallas_tpu", "unsupported_reason", hidden),
        "reference": lambda: "it cannot shard the vocabulary" if axis else None,
    }
    # The TPU kernels save memory, not time: on v5e an estimated 16 ms against 12 to 18 of `xla` (docs/performance.md).
    prefer: dispatch.Implementation | None = "xla" if dispatch.platform() == "tpu" else None
    compute = dispatch.choose("linear_cross_entropy", implementation, _IMPLEMENTATIONS, unsupported, prefer=prefer)
    options = LossOptions(valid_vocab_size, label_smoothing, z_loss, chunk_size, axis)
    return compute(hidden, weight, targets, weights, options)


def token_negative_log_likelihoods(
    hidden: Float[Array, "T D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, " T"],
    *,
    valid_vocab_size: int | None = None,
    chunk_size: int | None = None,
) -> Float[Array, " T"]:
    """Compute -log p(target) of every token in chunks of tokens, for sums per document. Not for training.

    Args:
      hidden: hidden states after the last norm [T D], any float dtype.
      weight: output embedding [V D].
      targets: ids below `valid_vocab_size` [T].
      valid_vocab_size: ids from here on are excluded from the softmax; None is V.
      chunk_size: tokens whose logits exist at once; None is the platform's best.

    Returns:
      Negative log-likelihoods in nats [T], in float32 (float64 for float64 hidden states).

    Raises:
      UserError: shapes or sizes do not match.
    """
    valid_vocab_size = _check(hidden, weight, targets, valid_vocab_size, chunk_size, devices=1)
    return xla.token_negative_log_likelihoods(hidden, weight, targets, valid_vocab_size, chunk_size)


def _check(
    hidden: Array, weight: Array, targets: Array, valid: int | None, chunk_size: int | None, devices: int
) -> int:
    """Return the number of valid ids; raise UserError if the arguments do not match."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1] or 0 in hidden.shape:
        raise UserError(
            f"linear_cross_entropy: hidden must be [T D] and weight [V D], not {hidden.shape} and {weight.shape}"
        )
    check_shapes("linear_cross_entropy", {"targets": targets}, targets=hidden.shape[:1])
    rows = weight.shape[0] * devices
    valid = rows if valid is None else valid
    if not 0 < valid <= rows:
        raise UserError(f"linear_cross_entropy: valid_vocab_size must be in 1..{rows}, not {valid}")
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"linear_cross_entropy: chunk_size must be at least 1, not {chunk_size}")
    return valid
