"""SSD on TPU: padding and layouts of the two Pallas kernels, and the custom_vjp that pairs them.

Products are of bfloat16 values with float32 accumulation, also for float32 inputs: TPU's default for float32 products.
Everything else, the skip D x and the gradients through it included, is float32.

The only residual besides the inputs is the state before each chunk (bfloat16, as it enters the products), not another
array of the length of x.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import LOG2_E, differentiable, largest_divisor, pad, round_up, vary_alike
from biomamba_jax.ops.numerics import segment_starts
from biomamba_jax.ops.ssd import pallas_common
from biomamba_jax.ops.ssd import pallas_tpu_tiles as tiles
from biomamba_jax.ops.ssd.inputs import Inputs
from biomamba_jax.ops.ssd.pallas_common import NO_STEP
from biomamba_jax.ops.ssd.pallas_tpu_backward import backward
from biomamba_jax.ops.ssd.pallas_tpu_forward import forward

_MIN_PAIRS = 4


class _Arrays(NamedTuple):
    """Inputs padded to whole chunks; dt, parameters and states in float32."""

    x: Array
    dt: Array  # raw, or the log-decays where A is None
    A: Array | None
    B: Array
    C: Array
    D: Array
    dt_bias: Array | None
    starts: Array | None  # [B L], where a segment begins
    initial_state: Array | None


def ssd(inputs: Inputs, chunk_size: int | None, *, interpret: Any = False) -> tuple[Array, Array]:
    """Return all outputs and the final state; see `api.ssd`.

    Args:
      inputs: the arrays.
      chunk_size: None or the kernels' chunk.
      interpret: run the kernels without a TPU, slowly; True, or `pltpu.InterpretParams`. For tests.
    """
    x, dt, A, B, C, D, dt_bias, segment_ids, initial_state = inputs
    batch, length, heads, _ = x.shape
    padded = round_up(length, tiles.CHUNK)
    zeros = jnp.zeros(heads, jnp.float32)
    starts = None
    if dt is None:  # the padding's x is zero, and so is its log-decay: it leaves the state unchanged
        steps, rate, bias = pad(A.astype(jnp.float32), (batch, padded, heads)), None, None
    else:
        steps, rate = pad(dt.astype(jnp.float32), (batch, padded, heads), NO_STEP), A.astype(jnp.float32)
        bias = zeros if dt_bias is None else dt_bias.astype(jnp.float32)
    if segment_ids is not None:
        starts = jnp.pad(segment_starts(segment_ids), ((0, 0), (0, padded - length)))
    arrays = _Arrays(
        x=pad(x, (batch, padded, *x.shape[2:])),
        dt=steps,
        A=rate,
        B=pad(B, (batch, padded, *B.shape[2:])),
        C=pad(C, (batch, padded, *C.shape[2:])),
        D=zeros if D is None else D.astype(jnp.float32),
        dt_bias=bias,
        starts=starts,
        initial_state=None if initial_state is None else initial_state.astype(jnp.float32),
    )
    y, final_state = _ssd(vary_alike(arrays), interpret)
    return y[:, :length], final_state


def unsupported_reason(x: Array, dt: Array | None, B: Array, chunk_size: int | None) -> str | None:
    """Return why the kernels cannot compute these arrays, or None if they can."""
    heads_of_group = x.shape[2] // B.shape[2]
    if reason := pallas_common.unsupported_reason(x, chunk_size, tiles.CHUNK):
        return reason
    if dt is None and (heads_of_group > 1 or x.shape[2] % 2):
        return f"without dt it needs an even number of heads with B and C of each, not {B.shape[2]} of {x.shape[2]}"
    if dt is not None and heads_of_group % 2:
        return f"a group has {heads_of_group} heads, not an even number"
    return None


def xla_is_faster(x: Array, dt: Array | None, B: Array) -> bool:
    """Return True if the chunked einsum of `xla` is the better choice on TPU for arrays that the kernels support.

    A short row would be padded to a chunk, and few heads at a time do not amortize what they share.
    """
    length, heads = x.shape[1:3]
    return length < tiles.CHUNK or (dt is not None and _pairs_in_block(heads // B.shape[2]) < _MIN_PAIRS)


def _pairs_in_block(heads_of_group: int) -> int:
    """Return the largest number of head pairs per block that divides a group's pairs."""
    return largest_divisor(heads_of_group // 2, tiles.MAX_HEADS_IN_BLOCK // 2)


def _sizes(arrays: _Arrays) -> tiles.Sizes:
    batch, length, heads, _ = arrays.x.shape
    groups, d_state = arrays.B.shape[2:]
    own = arrays.A is None
    pairs = largest_divisor(heads // 2, tiles.MAX_OWN_HEADS_IN_BLOCK // 2) if own else _pairs_in_block(heads // groups)
    return tiles.Sizes(
        batch=batch,
        chunks=length // tiles.CHUNK,
        blocks=heads // (2 * pairs),
        groups=groups,
        pairs=pairs,
        d_state=round_up(d_state, tiles.LANES),
        own=own,
    )


def _to_rows(v: Array, sizes: tiles.Sizes, padding: float = 0.0) -> Array:
    """Reorder [... H] -> [... blocks R], first the left heads of all pairs, then the right ones."""
    v = v.reshape(*v.shape[:-1], sizes.blocks, sizes.pairs, 2).swapaxes(-1, -2)
    v = pad(v, (*v.shape[:-1], sizes.half_rows), padding)
    return v.reshape(*v.shape[:-2], sizes.rows)


def _from_rows(v: Array, sizes: tiles.Sizes) -> Array:
    """Undo `_to_rows`."""
    v = v.reshape(*v.shape[:-1], 2, sizes.half_rows)[..., : sizes.pairs].swapaxes(-1, -2)
    return v.reshape(*v.shape[:-3], -1)


def _shared_inputs(arrays: _Arrays, sizes: tiles.Sizes) -> tiles.SharedInputs:
    _, dt, A, B, C, _, dt_bias, starts, _ = arrays
    batch, length = dt.shape[:2]
    resets = None
    if starts is not None:
        resets = starts.astype(jnp.float32).reshape(batch, sizes.chunks, 1, tiles.CHUNK)
        resets = jnp.cumsum(resets, axis=-1)
    B, C = (pad(v, (*v.shape[:3], sizes.d_state)).reshape(batch, length, -1).astype(jnp.bfloat16) for v in (B, C))
    rows = _to_rows(dt * LOG2_E, sizes) if A is None else _to_rows(dt, sizes, NO_STEP)
    A_and_bias = None
    if A is not None and dt_bias is not None:
        A_and_bias = jnp.stack([_to_rows(A * LOG2_E, sizes), _to_rows(dt_bias, sizes)], -1)
    return tiles.SharedInputs(dt=rows.transpose(0, 2, 3, 1), B=B, C=C, resets=resets, A_and_bias=A_and_bias)


def _skip(D: Array, sizes: tiles.Sizes) -> Array:
    """Reorder D: [H] -> [blocks 1 128]."""
    return pad(_to_rows(D, sizes), (sizes.blocks, tiles.LANES))[:, None]


def _merge_heads(x: Array) -> Array:
    return x.reshape(*x.shape[:2], -1)


def _state_in(state: Array, sizes: tiles.Sizes) -> Array:
    """Transpose [B H P N] -> [B N H*P], with N padded."""
    state = pad(state, (*state.shape[:3], sizes.d_state))
    return state.reshape(state.shape[0], -1, sizes.d_state).swapaxes(1, 2)


def _state_out(state: Array, heads: int, d_state: int) -> Array:
    """Transpose [B N H*P] -> [B H P N], with N cropped."""
    return state[:, :d_state].swapaxes(1, 2).reshape(state.shape[0], heads, pallas_common.HEADDIM, d_state)


def _run(arrays: _Arrays, interpret: Any, save: bool):
    x, initial_state = arrays.x, arrays.initial_state
    sizes = _sizes(arrays)
    out = forward(
        sizes,
        _merge_heads(x),
        _shared_inputs(arrays, sizes),
        _skip(arrays.D, sizes),
        None if initial_state is None else _state_in(initial_state, sizes),
        save_states=save,
        interpret=interpret,
    )
    return (out.y.reshape(x.shape), _state_out(out.final_state, x.shape[2], arrays.B.shape[3])), out.states


def _backward(arrays: _Arrays, states: Array, cotangents, interpret: Any) -> _Arrays:
    dy, d_final_state = cotangents
    x, B = arrays.x, arrays.B
    sizes = _sizes(arrays)
    batch, length, heads, _ = x.shape
    out = backward(
        sizes,
        _merge_heads(x),
        _merge_heads(dy),
        states,
        _state_in(d_final_state, sizes),
        _shared_inputs(arrays, sizes),
        _skip(arrays.D, sizes),
        interpret=interpret,
    )

    def of_group(v: Array) -> Array:
        """Sum the gradient of B or C over a group's blocks of heads; each block has its own heads', if they have."""
        v = v.reshape(batch, length, sizes.groups, -1, sizes.d_state)
        v = v[:, :, :, 0] if v.shape[3] == 1 else jnp.sum(v, 3)
        return v[..., : B.shape[3]].astype(B.dtype)

    d_dt = _from_rows(out.dt.transpose(0, 3, 1, 2), sizes)
    return _Arrays(
        x=out.x.reshape(x.shape),
        dt=d_dt,
        A=None if out.A is None else _from_rows(jnp.sum(out.A, (0, 3)), sizes),
        B=of_group(out.B),
        C=of_group(out.C),
        D=jnp.sum(out.D.reshape(batch, heads, -1), (0, 2)),
        dt_bias=None if out.A is None else jnp.sum(d_dt, (0, 1)),
        starts=None,
        initial_state=None if arrays.initial_state is None else _state_out(out.initial_state, heads, B.shape[3]),
    )


_ssd = differentiable(_run, _backward)
