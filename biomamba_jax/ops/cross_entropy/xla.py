"""Linear cross-entropy in chunks of tokens, for any XLA backend.

Under differentiation the forward pass computes the gradients in the same loop, while a chunk's logits are available:
three products with the vocabulary instead of four with recomputed logits. It costs no memory: the gradient of the
weight, the only large residual, is needed from then on anyway. The backward pass only scales by the loss's cotangent.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.cross_entropy.loss import (
    LossOptions,
    LossSums,
    Statistics,
    mean_valid_row,
    token_sums,
    vocabulary_ids,
)
from biomamba_jax.ops.kernel_arrays import cdiv
from biomamba_jax.ops.numerics import accumulator_dtype

# Each chunk reads and writes the gradient of the weight once, so it should be long; its logits take 4 V bytes a token.
_CHUNK_SIZE: dict[dispatch.Platform, int] = {"cpu": 512, "gpu": 2048, "tpu": 2048}


class _Tokens(NamedTuple):
    """A chunk of tokens, or all chunks stacked."""

    hidden: Array  # [t D]
    targets: Array  # [t]
    weights: Array  # [t]


class _Softmax(NamedTuple):
    """The softmax over the valid ids of a chunk's tokens."""

    logits: Array  # [t V]; -inf for the padding of the vocabulary
    shifted: Array  # [t V], exp(logits - largest)
    total: Array  # [t], sum of `shifted`
    largest: Array  # [t]
    target: Array  # [t], logit of the target

    @property
    def statistics(self) -> Statistics:
        return Statistics(self.largest + jnp.log(self.total), self.target, self.largest)


def linear_cross_entropy(
    hidden: Array, weight: Array, targets: Array, weights: Array, options: LossOptions
) -> LossSums:
    """Return the sums; see `biomamba_jax.ops.linear_cross_entropy`."""
    weights = jax.lax.stop_gradient(weights.astype(accumulator_dtype(hidden.dtype)))
    return _loss_sums(hidden, weight, targets, weights, options)


def token_negative_log_likelihoods(
    hidden: Array, weight: Array, targets: Array, valid_vocab_size: int, chunk_size: int | None
) -> Array:
    """Return -log p of each target [T]; see `biomamba_jax.ops.cross_entropy`."""
    head = weight.astype(hidden.dtype)
    options = LossOptions(valid_vocab_size, chunk_size=chunk_size)
    chunks = _chunks(_Tokens(hidden, targets, jnp.ones(targets.shape)), options)
    statistics = jax.lax.map(lambda part: _softmax(part, head, options).statistics, chunks)
    return _unchunk(statistics.log_partition - statistics.target, targets.size)


def _chunks(tokens: _Tokens, options: LossOptions) -> _Tokens:
    """Stack the tokens into chunks [n t ...], all of one length with as little padding as possible, of weight 0.

    Chunk i takes the tokens i, i + n, i + 2n ... so that tokens sharded over devices stay sharded in each chunk.
    """
    count = tokens.targets.size
    chunk = cdiv(count, cdiv(count, options.chunk_size or _CHUNK_SIZE[dispatch.platform()]))

    def split(v: Array) -> Array:
        v = jnp.pad(v, [(0, -v.shape[0] % chunk)] + [(0, 0)] * (v.ndim - 1))
        return v.reshape(chunk, -1, *v.shape[1:]).swapaxes(0, 1)

    return _Tokens(*map(split, tokens))


def _unchunk(v: Array, tokens: int) -> Array:
    """Undo `_chunks`: [n t ...] -> [T ...]."""
    return v.swapaxes(0, 1).reshape(-1, *v.shape[2:])[:tokens]


def _softmax(part: _Tokens, head: Array, options: LossOptions) -> _Softmax:
    valid, axis = options.valid_vocab_size, options.axis
    dtype = accumulator_dtype(part.hidden.dtype)
    logits = jnp.einsum("td,vd->tv", part.hidden, head, preferred_element_type=dtype)
    ids = vocabulary_ids(logits.shape[1], axis)
    if axis is not None or valid < logits.shape[1]:
        logits = jnp.where(ids < valid, logits, -jnp.inf)
    largest = jnp.max(logits, axis=1)
    if axis is None:
        shifted = jnp.exp(logits - largest[:, None])
        target = jnp.take_along_axis(logits, part.targets[:, None], axis=1)[:, 0]
        return _Softmax(logits, shifted, jnp.sum(shifted, axis=1), largest, target)
    largest = jax.lax.pmax(largest, axis)
    shifted = jnp.exp(logits - largest[:, None])
    target = jnp.sum(jnp.where(ids == part.targets[:, None], logits, 0), axis=1)
    total, target = jax.lax.psum((jnp.sum(shifted, axis=1), target), axis)
    return _Softmax(logits, shifted, total, largest, target)


def _d_logits(part: _Tokens, softmax: _Softmax, options: LossOptions) -> Array:
    """Return the gradient of the chunk's loss with respect to its logits [t V], in hidden's dtype."""
    scale = part.weights * (1 + 2 * options.z_loss * softmax.statistics.log_partition)
    ids = vocabulary_ids(softmax.shifted.shape[1], options.axis)
    uniform = part.weights * (options.label_smoothing / options.valid_vocab_size)
    hit = part.weights * (1 - options.label_smoothing)
    gradient = softmax.shifted * (scale / softmax.total)[:, None]
    gradient -= jnp.where(ids == part.targets[:, None], hit[:, None], 0)
    if options.label_smoothing:
        gradient -= jnp.where(ids < options.valid_vocab_size, uniform[:, None], 0)
    return gradient.astype(part.hidden.dtype)


def _run(hidden: Array, weight: Array, targets: Array, weights: Array, options: LossOptions, *, gradients: bool):
    """Return the sums and, with `gradients`, those of loss with respect to hidden and weight, else None and None."""
    head = weight.astype(hidden.dtype)
    dtype = weights.dtype
    mean_row = mean_valid_row(head, options, dtype)
    if mean_row is not None and options.axis is not None:
        mean_row = jax.lax.psum(mean_row, options.axis)

    def body(carry: tuple[LossSums, Array | None], part: _Tokens) -> tuple[tuple[LossSums, Array | None], Array | None]:
        sums, d_weight = carry
        softmax = _softmax(part, head, options)
        sums = jax.tree.map(jnp.add, sums, token_sums(part.hidden, part.weights, softmax.statistics, mean_row, options))
        if d_weight is None:
            return (sums, None), None
        d_logits = _d_logits(part, softmax, options)
        d_weight += jnp.einsum("tv,td->vd", d_logits, part.hidden, preferred_element_type=dtype)
        d_hidden = jnp.einsum("tv,vd->td", d_logits, head, preferred_element_type=dtype)
        return (sums, d_weight), d_hidden.astype(hidden.dtype)

    zero_sums = LossSums.zeros(dtype)
    first = zero_sums, jnp.zeros(weight.shape, dtype) if gradients else None
    (sums, d_weight), d_hidden = jax.lax.scan(body, first, _chunks(_Tokens(hidden, targets, weights), options))
    return sums, d_hidden, d_weight


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss_sums(hidden: Array, weight: Array, targets: Array, weights: Array, options: LossOptions) -> LossSums:
    return _run(hidden, weight, targets, weights, options, gradients=False)[0]


def _forward(hidden: Array, weight: Array, targets: Array, weights: Array, options: LossOptions):
    sums, d_hidden, d_weight = _run(hidden, weight, targets, weights, options, gradients=True)
    return sums, (_unchunk(d_hidden, hidden.shape[0]), d_weight.astype(weight.dtype))


def _backward(options: LossOptions, residuals: tuple[Array, Array], cotangent: LossSums):
    d_hidden, d_weight = ((cotangent.loss * d).astype(d.dtype) for d in residuals)
    return d_hidden, d_weight, None, None


_loss_sums.defvjp(_forward, _backward)
