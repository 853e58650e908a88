"""Linear cross-entropy in chunks of tokens, for any XLA backend.

Where a gradient is wanted, the forward pass computes it in the same loop, while a chunk's logits are at hand: three
products with the vocabulary instead of four with logits computed again. It costs no memory: the gradient of the weight,
all that is large, is needed from then on anyway. The backward pass only multiplies by the loss's cotangent.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.cross_entropy.sums import LossSums
from biomamba_jax.ops.numerics import accumulator_dtype, sum_leading

# Each chunk reads and writes the gradient of the weight once, so it should be long; its logits take 4 V bytes a token.
_CHUNK_SIZE: dict[dispatch.Platform, int] = {"cpu": 512, "gpu": 2048, "tpu": 2048}


class _Options(NamedTuple):
    valid: int
    smoothing: float
    z_loss: float
    chunk: int
    axis: str | None  # mesh axis that the vocabulary is spread over


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
    def log_partition(self) -> Array:
        return self.largest + jnp.log(self.total)

    @property
    def nll(self) -> Array:
        return self.log_partition - self.target


def linear_cross_entropy(
    hidden: Array,
    weight: Array,
    targets: Array,
    weights: Array,
    valid_vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    chunk_size: int | None,
    axis: str | None = None,
) -> LossSums:
    """See `biomamba_jax.ops.linear_cross_entropy`."""
    chunk = _chunk_size(chunk_size, targets.size)
    weights = jax.lax.stop_gradient(weights.astype(accumulator_dtype(hidden.dtype)))
    options = _Options(valid_vocab_size, label_smoothing, z_loss, chunk, axis)
    return _loss_sums(hidden, weight, targets, weights, options)


def token_negative_log_likelihoods(
    hidden: Array, weight: Array, targets: Array, valid_vocab_size: int, chunk_size: int | None
) -> Array:
    """See `biomamba_jax.ops.cross_entropy`."""
    chunk = _chunk_size(chunk_size, targets.size)
    head = weight.astype(hidden.dtype)
    chunks = _chunks(_Tokens(hidden, targets, jnp.ones(targets.shape)), chunk)
    nll = jax.lax.map(lambda part: _softmax(part, head, valid_vocab_size).nll, chunks)
    return _unchunk(nll, targets.size)


def _chunk_size(chunk_size: int | None, tokens: int) -> int:
    """At most `chunk_size`, and such that hardly any tokens have to be added to fill the last chunk."""
    chunks = -(-tokens // (chunk_size or _CHUNK_SIZE[dispatch.platform()]))
    return -(-tokens // chunks)


def _chunks(tokens: _Tokens, chunk: int) -> _Tokens:
    """Stacked chunks [n t ...]; the tokens added at the end have weight 0.

    Chunk i takes the tokens i, i + n, i + 2n ... so that tokens sharded over devices stay so in each chunk.
    """

    def split(v: Array) -> Array:
        v = jnp.pad(v, [(0, -v.shape[0] % chunk)] + [(0, 0)] * (v.ndim - 1))
        return v.reshape(chunk, -1, *v.shape[1:]).swapaxes(0, 1)

    return _Tokens(*map(split, tokens))


def _unchunk(v: Array, tokens: int) -> Array:
    """[n t ...] back to [T ...]."""
    return v.swapaxes(0, 1).reshape(-1, *v.shape[2:])[:tokens]


def _ids(rows: int, axis: str | None) -> Array:
    """The ids that the head's rows on this device stand for."""
    ids = jnp.arange(rows)
    return ids if axis is None else ids + jax.lax.axis_index(axis) * rows


def _softmax(part: _Tokens, head: Array, valid: int, axis: str | None = None) -> _Softmax:
    dtype = accumulator_dtype(part.hidden.dtype)
    logits = jnp.einsum("td,vd->tv", part.hidden, head, preferred_element_type=dtype)
    ids = _ids(logits.shape[1], axis)
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


def _add_up(part: _Tokens, softmax: _Softmax, mean_row: Array, options: _Options) -> LossSums:
    """The sums of one chunk. `mean_row` [D], the mean of the head's valid rows, gives the mean logit as one dot."""
    nll, log_partition = softmax.nll, softmax.log_partition
    loss = nll + options.z_loss * log_partition**2
    if options.smoothing:
        mean_logit = jnp.dot(part.hidden.astype(nll.dtype), mean_row, precision="highest")
        loss += options.smoothing * (softmax.target - mean_logit)
    correct = softmax.target >= softmax.largest
    w = part.weights
    return LossSums(jnp.sum(w * loss), jnp.sum(w * nll), jnp.sum(w * correct), jnp.sum(w))


def _d_logits(part: _Tokens, softmax: _Softmax, options: _Options) -> Array:
    """Gradient of the chunk's loss in its logits [t V], in hidden's dtype."""
    scale = part.weights * (1 + 2 * options.z_loss * softmax.log_partition)
    ids = _ids(softmax.shifted.shape[1], options.axis)
    spread = part.weights * (options.smoothing / options.valid)
    hit = part.weights * (1 - options.smoothing)
    gradient = softmax.shifted * (scale / softmax.total)[:, None]
    gradient -= jnp.where(ids == part.targets[:, None], hit[:, None], 0)
    if options.smoothing:
        gradient -= jnp.where(ids < options.valid, spread[:, None], 0)
    return gradient.astype(part.hidden.dtype)


def _zeros(dtype: jnp.dtype) -> LossSums:
    return LossSums(*(jnp.zeros((), dtype) for _ in LossSums._fields))


def _mean_row(weight: Array, options: _Options, dtype: jnp.dtype) -> Array:
    if not options.smoothing:
        return jnp.zeros(weight.shape[1], dtype)  # nobody asks for it
    if options.axis is None:
        return sum_leading(weight[: options.valid].astype(dtype)) / options.valid
    valid = _ids(weight.shape[0], options.axis) < options.valid
    rows = jnp.where(valid[:, None], weight.astype(dtype), 0)
    return jax.lax.psum(sum_leading(rows), options.axis) / options.valid


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss_sums(hidden: Array, weight: Array, targets: Array, weights: Array, options: _Options) -> LossSums:
    head = weight.astype(hidden.dtype)
    mean_row = _mean_row(head, options, weights.dtype)

    def body(sums: LossSums, part: _Tokens) -> tuple[LossSums, None]:
        more = _add_up(part, _softmax(part, head, options.valid, options.axis), mean_row, options)
        return jax.tree.map(jnp.add, sums, more), None

    chunks = _chunks(_Tokens(hidden, targets, weights), options.chunk)
    return jax.lax.scan(body, _zeros(weights.dtype), chunks)[0]


def _forward(hidden: Array, weight: Array, targets: Array, weights: Array, options: _Options):
    head = weight.astype(hidden.dtype)
    dtype = weights.dtype
    mean_row = _mean_row(head, options, dtype)

    def body(carry: tuple[LossSums, Array], part: _Tokens) -> tuple[tuple[LossSums, Array], Array]:
        sums, d_weight = carry
        softmax = _softmax(part, head, options.valid, options.axis)
        d_logits = _d_logits(part, softmax, options)
        sums = jax.tree.map(jnp.add, sums, _add_up(part, softmax, mean_row, options))
        d_weight += jnp.einsum("tv,td->vd", d_logits, part.hidden, preferred_element_type=dtype)
        d_hidden = jnp.einsum("tv,vd->td", d_logits, head, preferred_element_type=dtype)
        return (sums, d_weight), d_hidden.astype(hidden.dtype)

    chunks = _chunks(_Tokens(hidden, targets, weights), options.chunk)
    first = _zeros(dtype), jnp.zeros(weight.shape, dtype)
    (sums, d_weight), d_hidden = jax.lax.scan(body, first, chunks)
    return sums, (_unchunk(d_hidden, hidden.shape[0]), d_weight.astype(weight.dtype))


def _backward(options: _Options, residuals: tuple[Array, Array], cotangent: LossSums):
    d_hidden, d_weight = ((cotangent.loss * d).astype(d.dtype) for d in residuals)
    return d_hidden, d_weight, None, None


_loss_sums.defvjp(_forward, _backward)
