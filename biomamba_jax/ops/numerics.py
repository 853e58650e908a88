"""Numerical idioms that several ops and the model share."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Bool, Float, Int

_CUMSUM_CHUNK = 64
"""Tokens that `segment_cumsum` sums by one product with a triangular matrix."""


def accumulator_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Return the dtype of statistics, states and sums of `dtype` values: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def softplus(v: Array) -> Array:
    """Return log(1 + exp(v)) without `jax.nn.softplus`'s handling of infinities and NaN."""
    return jnp.maximum(v, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(v)))


def sum_leading(x: Float[Array, "*batch C"]) -> Float[Array, " C"]:
    """Sum over all axes but the last, accumulated in at least float32: the gradient of a per-channel parameter.

    XLA's CPU backend reduces a major axis slowly (92 ms against 8 ms in one Mamba-1 layer) but multiplies matrices
    fast; other backends reduce columns well.
    """
    rows = x.reshape(-1, x.shape[-1])
    dtype = accumulator_dtype(x.dtype)
    if dispatch.platform() != "cpu":
        return jnp.sum(rows, axis=0, dtype=dtype)
    return jnp.dot(jnp.ones((1, rows.shape[0]), dtype), rows.astype(dtype))[0]


def segment_starts(segment_ids: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """Return where a segment begins inside the row; the first token continues the segment of the initial state."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))


def segment_ends(segment_ids: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """Return where a segment ends, the last one of a row at its last token."""
    return jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)


def segment_firsts(segment_ids: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Return the index of the first token of each token's segment in the row."""
    index = jnp.arange(segment_ids.shape[1])
    return jax.lax.cummax(jnp.where(segment_starts(segment_ids), index, 0), axis=1)


def next_in_segment(
    v: Float[Array, "B L C"], segment_ids: Int[Array, "B L"] | None, after_last: Float[Array, "B C"] | None = None
) -> Float[Array, "B L C"]:
    """Return v of each token's successor, zero where that begins another segment; `after_last` or zero at the end."""
    last = jnp.zeros_like(v[:, 0]) if after_last is None else after_last
    following = jnp.concatenate([v[:, 1:], last[:, None]], axis=1)
    if segment_ids is None:
        return following
    # No segment starts at a row's first token, so nothing is masked at its last one.
    return jnp.where(jnp.roll(segment_starts(segment_ids), -1, axis=1)[..., None], 0, following)


def segment_cumsum(
    v: Float[Array, "B L C"],
    segment_ids: Int[Array, "B L"] | None = None,
    initial: Float[Array, "B C"] | None = None,
    *,
    period: float,
) -> Float[Array, "B L C"]:
    """Sum v along L within each segment, up to multiples of `period`, which keep the sum small and so exact.

    Args:
      v: terms.
      segment_ids: document of each token; the sum restarts where it changes.
      initial: sum before the first token, whose segment it belongs to.
      period: subtracted from the carried sum as often as it fits.
    """
    batch, length, channels = v.shape
    starts = jnp.zeros((batch, length), bool) if segment_ids is None else segment_starts(segment_ids)
    initial = jnp.zeros((batch, channels), v.dtype) if initial is None else initial.astype(v.dtype)
    chunk = min(_CUMSUM_CHUNK, length)
    padding = ((0, 0), (0, -length % chunk))
    parts = jnp.pad(v, (*padding, (0, 0))).reshape(batch, -1, chunk, channels)
    segment = jnp.cumsum(jnp.pad(starts, padding).reshape(batch, -1, chunk), axis=2)
    same = jnp.tril(jnp.ones((chunk, chunk), bool)) & (segment[..., :, None] == segment[..., None, :])
    sums = jnp.einsum("bnts,bnsc->bntc", same.astype(v.dtype), parts, precision="highest")

    def step(before: Array, part: tuple[Array, Array]) -> tuple[Array, Array]:
        last, unbroken = part
        after = last + jnp.where(unbroken[:, None], before, 0)
        return after - period * jnp.floor(after / period), before

    of_chunks = (sums[:, :, -1].swapaxes(0, 1), (segment[:, :, -1] == 0).swapaxes(0, 1))
    before = jax.lax.scan(step, initial, of_chunks)[1].swapaxes(0, 1)
    sums += jnp.where(segment[..., None] == 0, before[:, :, None], 0)
    return sums.reshape(batch, -1, channels)[:, :length]


def broadcast_merged(v: Float[Array, "*batch h p"], heads: int, channels: int) -> Float[Array, "*batch HP"]:
    """Broadcast v to `heads` and `channels` of each, one of which is its own axis of 1, and merge the two axes.

    On TPU as a product with a 0/1 matrix: there arrays [... H P] and [... H*P] are tiled differently, so that
    the reshape would move all data once more.
    """
    batch, axes = v.shape[:-2], v.shape[-2:]
    if dispatch.platform() != "tpu":
        return jnp.broadcast_to(v, (*batch, heads, channels)).reshape(*batch, -1)
    n = axes[0] * axes[1]
    select = jnp.broadcast_to(jnp.eye(n, dtype=v.dtype).reshape(n, *axes), (n, heads, channels)).reshape(n, -1)
    return _select(v.reshape(*batch, n), select)


@jax.custom_vjp
def _select(v: Float[Array, "*batch n"], select: Float[Array, "n C"]) -> Float[Array, "*batch C"]:
    """Return v @ select for a 0/1 matrix, exactly, by one product in bfloat16: v is the sum of three such values."""
    high = jax.lax.reduce_precision(v, 8, 7)
    middle = jax.lax.reduce_precision(v - high, 8, 7)
    pieces = jnp.concatenate([high, middle, v - high - middle], axis=-1).astype(jnp.bfloat16)
    return jnp.dot(pieces, jnp.tile(select, (3, 1)).astype(jnp.bfloat16), preferred_element_type=v.dtype)


_select.defvjp(
    lambda v, select: (_select(v, select), select), lambda select, g: (jnp.dot(g, select.T, precision="high"), None)
)


@jax.custom_vjp
def project(x: Float[Array, "*batch C"], kernel: Float[Array, "C F"]) -> Float[Array, "*batch F"]:
    """Return x @ kernel, with the kernel's gradient computed in the kernel's own layout.

    The automatic one is a product [F C], transposed. XLA's CPU backend then computes the cotangent element by element
    in transposed order: a tenth of a Mamba-1 training step (330 of 3,340 ms in a trace).
    """
    return jnp.dot(x, kernel)


def _project_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.dot(x, kernel), (x, kernel)


def _project_backward(residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    rows = x.reshape(-1, x.shape[-1])
    return jnp.einsum("...f,cf->...c", dy, kernel), jnp.einsum("rc,rf->cf", rows, dy.reshape(-1, dy.shape[-1]))


project.defvjp(_project_forward, _project_backward)
