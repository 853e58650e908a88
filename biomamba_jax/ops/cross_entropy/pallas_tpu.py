"""Linear cross-entropy on TPU whose logits never leave VMEM.

Two kernels, each with two products for a block of logits [tokens, ids]; `xla` has three, but its float32 logits go
through device memory several times. Under differentiation the forward kernel is attention with the weight's rows as
keys and values: next to a running largest logit and sum of exponentials it accumulates sum_v p_v W_v, from which the
gradient of hidden follows token by token. The backward kernel recomputes the logits, now with the log-partition known,
and keeps the gradient of a block of the weight in VMEM over all tokens. Neither adds to an array in device memory.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.cross_entropy.loss import (
    LossOptions,
    LossSums,
    Statistics,
    mean_valid_row,
    token_sums,
    vocabulary_ids,
)
from biomamba_jax.ops.kernel_arrays import LOG2_E, cdiv, float64_reason, out_struct, pad, round_up, vary_alike

_LANES = 128
_LEAST_ROWS = 16  # sublanes of a bfloat16 block
BLOCK_TOKENS = 512
BLOCK_IDS = 1024
_SLICE = 256  # rows of a block between one product and the next, so that vector units and matrix units overlap
_MASKED = -1e30  # added to the logits of the vocabulary's padding; finite, since a device may have no other ids


class _Arrays(NamedTuple):
    """Arguments padded to whole blocks."""

    hidden: Array  # [T D]
    head: Array  # [V D] in hidden's dtype; zero for ids that are padding
    bias: Array  # [V] float32, 0 or _MASKED
    targets: Array  # [T] rows of `head`; -1 for other devices' ids


class _Residuals(NamedTuple):
    arrays: _Arrays
    weights: Array  # [T]
    log_partition: Array  # [T]
    d_hidden: Array  # [T D]


class _Sizes(NamedTuple):
    """Sizes of the arguments and of their blocks."""

    tokens: int
    rows: int  # of the weight
    width: int
    block_tokens: int
    block_ids: int

    @property
    def token_blocks(self) -> int:
        return cdiv(self.tokens, self.block_tokens)

    @property
    def id_blocks(self) -> int:
        return cdiv(self.rows, self.block_ids)


def linear_cross_entropy(
    hidden: Array, weight: Array, targets: Array, weights: Array, options: LossOptions, *, interpret: Any = False
) -> LossSums:
    """Return the sums; see `biomamba_jax.ops.linear_cross_entropy`. `options.chunk_size` is ignored.

    Args:
      hidden: hidden states [T D].
      weight: output embedding [V D].
      targets: ids [T].
      weights: weight of each token [T].
      options: of the loss.
      interpret: run the kernels without a TPU, slowly; True, or `pltpu.InterpretParams`. For tests.
    """
    weights = jax.lax.stop_gradient(weights.astype(jnp.float32))
    return _loss_sums(*vary_alike((hidden, weight, targets, weights)), options, interpret)


def unsupported_reason(hidden: Array) -> str | None:
    """Return why the kernels cannot compute with these hidden states, or None if they can."""
    return float64_reason(hidden, "hidden")


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _loss_sums(
    hidden: Array, weight: Array, targets: Array, weights: Array, options: LossOptions, interpret: Any
) -> LossSums:
    return _run(hidden, weight, targets, weights, options, interpret, gradients=False)[0]


def _forward(hidden: Array, weight: Array, targets: Array, weights: Array, options: LossOptions, interpret: Any):
    sums, residuals = _run(hidden, weight, targets, weights, options, interpret, gradients=True)
    return sums, (residuals, weight)


def _sizes(hidden: Array, weight: Array) -> _Sizes:
    (tokens, width), rows = hidden.shape, weight.shape[0]
    return _Sizes(
        tokens=tokens,
        rows=rows,
        width=round_up(width, _LANES),
        block_tokens=min(BLOCK_TOKENS, round_up(tokens, min(_SLICE, round_up(tokens, _LEAST_ROWS)))),
        block_ids=min(BLOCK_IDS, round_up(rows, _SLICE)),
    )


def _padded(sizes: _Sizes, hidden: Array, weight: Array, targets: Array, options: LossOptions) -> _Arrays:
    tokens, rows = sizes.token_blocks * sizes.block_tokens, sizes.id_blocks * sizes.block_ids
    ids = vocabulary_ids(sizes.rows, options.axis)
    valid = ids < options.valid_vocab_size
    local = targets - ids[0]
    return _Arrays(
        hidden=pad(hidden, (tokens, sizes.width)),
        head=pad(jnp.where(valid[:, None], weight, 0).astype(hidden.dtype), (rows, sizes.width)),
        bias=pad(jnp.where(valid, 0.0, _MASKED), (rows,), _MASKED),
        targets=pad(jnp.where((local >= 0) & (local < sizes.rows), local, -1), (tokens,), -1),
    )


def _run(
    hidden: Array,
    weight: Array,
    targets: Array,
    weights: Array,
    options: LossOptions,
    interpret: Any,
    *,
    gradients: bool,
) -> tuple[LossSums, _Residuals | None]:
    sizes, axis = _sizes(hidden, weight), options.axis
    arrays = _padded(sizes, hidden, weight, targets, options)
    statistics, *mixed = _call_forward(sizes, arrays, gradients, interpret)
    here = Statistics(*(statistics[:, i] for i in range(3)))
    everywhere = here if axis is None else _all_reduce(here, axis)
    row = mean_row = mean_valid_row(arrays.head[: sizes.rows, : hidden.shape[1]], options, jnp.float32)
    if row is not None and axis is not None:
        mean_row = jax.lax.psum(row, axis)
    sums = token_sums(hidden, weights, everywhere, mean_row, options)
    if not gradients:
        return sums, None
    scale, hit = _token_weights(weights, everywhere.log_partition, options)
    share = jnp.exp(here.log_partition - everywhere.log_partition)  # of this device's ids
    local = arrays.targets[: sizes.tokens]
    rows = arrays.head[jnp.maximum(local, 0)].astype(jnp.float32)
    d_hidden = (scale * share)[:, None] * mixed[0] - jnp.where(local < 0, 0, hit)[:, None] * rows
    if row is not None:
        d_hidden -= (options.label_smoothing * weights)[:, None] * pad(row, (sizes.width,))
    d_hidden = d_hidden[:, : hidden.shape[1]].astype(hidden.dtype)
    return sums, _Residuals(arrays, weights, everywhere.log_partition, d_hidden)


def _all_reduce(here: Statistics, axis: str) -> Statistics:
    """Return the statistics over the ids of all devices."""
    largest, base = (jax.lax.pmax(v, axis) for v in (here.largest, here.log_partition))
    total, target = jax.lax.psum((jnp.exp(here.log_partition - base), here.target), axis)
    return Statistics(base + jnp.log(total), target, largest)


def _token_weights(weights: Array, log_partition: Array, options: LossOptions) -> tuple[Array, Array]:
    """Return the factors of softmax and target in the gradient of the logits."""
    return weights * (1 + 2 * options.z_loss * log_partition), weights * (1 - options.label_smoothing)


def _backward(options: LossOptions, interpret: Any, saved: tuple[_Residuals, Array], cotangent: LossSums):
    (arrays, weights, log_partition, d_hidden), weight = saved
    sizes = _sizes(d_hidden, weight)
    weights = cotangent.loss * weights
    tokens = (log_partition * LOG2_E, *_token_weights(weights, log_partition, options))
    uniform = -options.label_smoothing / options.valid_vocab_size
    start = uniform * jnp.dot(weights, arrays.hidden[: sizes.tokens].astype(jnp.float32), precision="highest")
    d_weight = _call_backward(sizes, arrays, [pad(v, arrays.targets.shape) for v in tokens], start, interpret)
    d_hidden = (cotangent.loss * d_hidden).astype(d_hidden.dtype)
    return d_hidden, d_weight[:, : weight.shape[1]].astype(weight.dtype), None, None


_loss_sums.defvjp(_forward, _backward)


def _call_forward(sizes: _Sizes, arrays: _Arrays, gradients: bool, interpret: Any) -> list[Array]:
    """Return log-partition, target's and largest logit in the first lanes of [T 128], and with `gradients` [T D]."""
    tokens, ids, width = sizes.block_tokens, sizes.block_ids, sizes.width
    outputs, out_specs = [(sizes.tokens, _LANES)], [pl.BlockSpec((tokens, _LANES), lambda t, v: (t, 0))]
    if gradients:
        outputs.append((sizes.tokens, width))
        out_specs.append(pl.BlockSpec((tokens, width), lambda t, v: (t, 0)))
    call = pl.pallas_call(
        _forward_kernel,
        grid=(sizes.token_blocks, sizes.id_blocks),
        in_specs=[
            pl.BlockSpec((tokens, width), lambda t, v: (t, 0)),
            pl.BlockSpec((ids, width), lambda t, v: (v, 0)),
            pl.BlockSpec((1, ids), lambda t, v: (0, v)),
            pl.BlockSpec((tokens, 1), lambda t, v: (t, 0)),
        ],
        out_specs=out_specs,
        out_shape=[out_struct(shape, jnp.float32, arrays.hidden) for shape in outputs],
        scratch_shapes=[pltpu.VMEM((tokens, 1), jnp.float32)] * 3,
        interpret=interpret,
        name="linear_cross_entropy_forward",
        **_parameters(sizes, arrays, 2 if gradients else 1),
    )
    return list(call(arrays.hidden, arrays.head, arrays.bias[None], arrays.targets[:, None]))


def _call_backward(sizes: _Sizes, arrays: _Arrays, token_rows: list[Array], start: Array, interpret: Any) -> Array:
    """Return the gradient of the weight [V D], float32."""
    tokens, ids, width = sizes.block_tokens, sizes.block_ids, sizes.width
    of_tokens = pl.BlockSpec((1, tokens), lambda v, t: (0, t))
    return pl.pallas_call(
        _backward_kernel,
        grid=(sizes.id_blocks, sizes.token_blocks),
        in_specs=[
            pl.BlockSpec((tokens, width), lambda v, t: (t, 0)),
            pl.BlockSpec((ids, width), lambda v, t: (v, 0)),
            pl.BlockSpec((ids, 1), lambda v, t: (v, 0)),
            *[of_tokens] * 4,
            pl.BlockSpec((1, width), lambda v, t: (0, 0)),
        ],
        out_specs=pl.BlockSpec((ids, width), lambda v, t: (v, 0)),
        out_shape=out_struct((sizes.rows, width), jnp.float32, arrays.hidden),
        interpret=interpret,
        name="linear_cross_entropy_backward",
        **_parameters(sizes, arrays, 2),
    )(arrays.hidden, arrays.head, arrays.bias[:, None], *(v[None] for v in (arrays.targets, *token_rows)), start[None])


def _parameters(sizes: _Sizes, arrays: _Arrays, products: int) -> dict[str, Any]:
    """Return the parameters of a call that follow from the sizes."""
    tokens, ids, width, itemsize = sizes.block_tokens, sizes.block_ids, sizes.width, arrays.hidden.dtype.itemsize
    logits = arrays.hidden.shape[0] * arrays.head.shape[0]
    # Two buffers of each block, two float32 blocks of results and one of a product, and a slice's logits.
    blocks = 2 * (tokens + ids) * width * itemsize + 3 * 4 * max(tokens, ids) * width + 12 * _SLICE * max(tokens, ids)
    return {
        "compiler_params": pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=max(16 << 20, blocks + (4 << 20))
        ),
        "cost_estimate": pl.CostEstimate(
            flops=2 * products * logits * width,
            transcendentals=logits,
            bytes_accessed=sizes.token_blocks * arrays.head.size * itemsize + arrays.hidden.size * (itemsize + 4),
        ),
    }


def _for_each_slice(rows: int) -> Callable[[Callable[[Any, Any], None]], None]:
    """Return a decorator that runs a function of (slice, its first row) in a loop over a block's rows."""
    size = min(_SLICE, rows)

    def run(body: Callable[[Any, Any], None]) -> None:
        def step(i: Any, _: None) -> None:
            first = pl.multiple_of(i * size, size)
            body(pl.ds(first, size), first)

        jax.lax.fori_loop(0, rows // size, step, None)

    return run


def _dot(a: Array, b: Array, contracted: tuple[int, int] = (1, 0)) -> Array:
    left, right = contracted
    return jax.lax.dot_general(a, b, (((left,), (right,)), ((), ())), preferred_element_type=jnp.float32)


def _forward_kernel(hidden, head, bias, targets, statistics, *rest) -> None:
    """Visit all ids of a block of tokens; `rest` is the sum of p_v W_v, if wanted, and three columns of scratch."""
    *mixed, largest, total, target = rest
    block, ids = pl.program_id(1), head.shape[0]

    @pl.when(block == 0)
    def start() -> None:
        largest[...] = jnp.full_like(largest, _MASKED)
        for ref in (total, target, *mixed):
            ref[...] = jnp.zeros_like(ref)

    @_for_each_slice(hidden.shape[0])
    def _(part: Any, _: Any) -> None:
        logits = _dot(hidden[part], head[...], (1, 1)) + bias[...]
        most = jnp.maximum(largest[part], jnp.max(logits, axis=1, keepdims=True))
        p, rescale = jnp.exp(logits - most), jnp.exp(largest[part] - most)
        largest[part] = most
        total[part] = rescale * total[part] + jnp.sum(p, axis=1, keepdims=True)
        id_in_block = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        hits = jnp.where(id_in_block == targets[part] - block * ids, logits, 0.0)
        target[part] += jnp.sum(hits, axis=1, keepdims=True)
        for ref in mixed:
            ref[part] = rescale * ref[part] + _dot(p.astype(head.dtype), head[...])

    @pl.when(block == pl.num_programs(1) - 1)
    def finish() -> None:
        lane = jax.lax.broadcasted_iota(jnp.int32, statistics.shape, 1)
        log_partition = largest[...] + jnp.log(total[...])
        statistics[...] = jnp.where(lane == 0, log_partition, jnp.where(lane == 1, target[...], largest[...]))
        for ref in mixed:
            ref[...] = ref[...] / total[...]


def _backward_kernel(hidden, head, bias, targets, log2_partition, scale, hit, start, d_head) -> None:
    """Visit all tokens for a block of ids. The logits are transposed: no factor of a product is."""
    block, step = pl.program_id(0), pl.program_id(1)

    @pl.when(step == 0)
    def initialize() -> None:
        d_head[...] = jnp.where(bias[...] == 0, start[...], 0.0)

    @_for_each_slice(head.shape[0])
    def _(part: Any, first: Any) -> None:
        logits = _dot(head[part], hidden[...], (1, 1))
        p = jnp.exp2(LOG2_E * logits - log2_partition[...] + bias[part])
        row = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
        hits = row == targets[...] - (block * head.shape[0] + first)
        d_logits = scale[...] * p - jnp.where(hits, hit[...], 0.0)
        d_head[part] += _dot(d_logits.astype(head.dtype), hidden[...])
