"""SSD for TPU: the layouts of the kernels, and the pairing of the forward with the backward pass.

Products are of bfloat16 values with float32 accumulation, also for float32 inputs: TPU's default for float32 products.
Everything else, the direct path D x and the gradients through it included, is float32.

Only the state before each chunk is kept for the backward pass (bfloat16, as it enters the products), not one array as
long as the text besides the inputs.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import vary_alike
from biomamba_jax.ops.numerics import segment_starts
from biomamba_jax.ops.ssd import pallas_tpu_tiles as tiles
from biomamba_jax.ops.ssd.inputs import Inputs
from biomamba_jax.ops.ssd.pallas_tpu_backward import backward
from biomamba_jax.ops.ssd.pallas_tpu_forward import forward

# softplus of it, with any bias added, is zero: such a step changes nothing.
_NO_STEP = -1e30

_FEWEST_PAIRS = 4


class _Arrays(NamedTuple):
    """Padded in length to whole chunks; dt, parameters and states in float32."""

    x: Array
    dt: Array
    A: Array
    B: Array
    C: Array
    D: Array
    dt_bias: Array
    starts: Array | None  # [B L], where a segment begins
    initial_state: Array | None


def ssd(inputs: Inputs, chunk_size: int | None, *, interpret: Any = False) -> tuple[Array, Array]:
    """See `biomamba_jax.ops.ssd`. `interpret` (True, or Pallas's parameters) runs the kernels on any platform."""
    x, dt, A, B, C, D, dt_bias, segment_ids, initial_state = inputs
    reason = why_not(x, B, chunk_size)
    if reason is None and not interpret and dispatch.platform() != "tpu":
        reason = f"it runs on TPU, not on {dispatch.platform()}"
    if reason:
        raise UserError(f"ssd: implementation 'pallas_tpu' cannot be used: {reason}; leave the choice to None or 'xla'")
    heads, length = x.shape[2], x.shape[1]
    dt, A = dt.astype(jnp.float32), A.astype(jnp.float32)
    zeros = jnp.zeros(heads, jnp.float32)
    D = zeros if D is None else D.astype(jnp.float32)
    dt_bias = zeros if dt_bias is None else dt_bias.astype(jnp.float32)
    if initial_state is not None:
        initial_state = initial_state.astype(jnp.float32)
    padding = -length % tiles.CHUNK
    starts = None
    if segment_ids is not None:
        starts = jnp.pad(segment_starts(segment_ids), ((0, 0), (0, padding)))
    x, B, C = (_pad(v, 1, padding) for v in (x, B, C))
    dt = _pad(dt, 1, padding, _NO_STEP)
    arrays = vary_alike(_Arrays(x, dt, A, B, C, D, dt_bias, starts, initial_state))
    y, final_state = _ssd(arrays, interpret)
    return y[:, :length], final_state


def why_not(x: Array, B: Array, chunk_size: int | None) -> str | None:
    """Why the kernels can't compute these arrays, if so."""
    heads, headdim = x.shape[2:]
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"x is {x.dtype}, not bfloat16 or float32"
    if headdim != tiles.HEADDIM:
        return f"headdim is {headdim}, not {tiles.HEADDIM}"
    if (heads // B.shape[2]) % 2:
        return f"a group has {heads // B.shape[2]} heads, not an even number"
    if chunk_size not in (None, tiles.CHUNK):
        return f"chunk_size is {chunk_size}, not {tiles.CHUNK}"
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if x.dtype == jnp.float32 and precision not in (None, "default", "fastest", "bfloat16"):
        return f"its products are of bfloat16 and {precision} precision is asked for"
    return None


def why_einsum(x: Array, B: Array, chunk_size: int | None) -> str | None:
    """Why the chunked einsum of `xla` is the choice for these arrays on TPU, if so: the kernels can't, or don't pay."""
    length, heads = x.shape[1:3]
    if reason := why_not(x, B, chunk_size):
        return reason
    if length < tiles.CHUNK:
        return f"{length} tokens would be padded to {tiles.CHUNK}, and one token is a step without products"
    pairs = _pairs_in_block(heads // B.shape[2])
    if pairs < _FEWEST_PAIRS:
        return f"{2 * pairs} heads at a time do not pay for what they share"
    return None


def _pairs_in_block(heads_of_group: int) -> int:
    """The most pairs of heads that divide a group's and are handled at once."""
    pairs = heads_of_group // 2
    return max(n for n in range(1, tiles.MAX_HEADS_IN_BLOCK // 2 + 1) if pairs % n == 0)


def _pad(v: Array, axis: int, amount: int, value: float = 0) -> Array:
    if not amount:
        return v
    return jnp.pad(v, [(0, amount if i == axis else 0) for i in range(v.ndim)], constant_values=value)


def _sizes(x: Array, B: Array) -> tiles.Sizes:
    batch, length, heads, _ = x.shape
    groups, d_state = B.shape[2:]
    pairs = _pairs_in_block(heads // groups)
    return tiles.Sizes(
        batch=batch,
        chunks=length // tiles.CHUNK,
        blocks=heads // (2 * pairs),
        groups=groups,
        pairs=pairs,
        d_state=d_state + -d_state % tiles.LANES,
    )


def _to_rows(v: Array, sizes: tiles.Sizes, padding: float = 0) -> Array:
    """[... H] -> [... blocks R], first the left heads of all pairs, then the right ones."""
    v = v.reshape(*v.shape[:-1], sizes.blocks, sizes.pairs, 2).swapaxes(-1, -2)
    v = _pad(v, v.ndim - 1, sizes.half_rows - sizes.pairs, padding)
    return v.reshape(*v.shape[:-2], sizes.rows)


def _from_rows(v: Array, sizes: tiles.Sizes) -> Array:
    """The inverse of `_to_rows`."""
    v = v.reshape(*v.shape[:-1], 2, sizes.half_rows)[..., : sizes.pairs].swapaxes(-1, -2)
    return v.reshape(*v.shape[:-3], -1)


def _shared_inputs(arrays: _Arrays, sizes: tiles.Sizes) -> tiles.SharedInputs:
    _, dt, A, B, C, _, dt_bias, starts, _ = arrays
    batch, length = dt.shape[:2]
    resets = None
    if starts is not None:
        resets = starts.astype(jnp.float32).reshape(batch, sizes.chunks, 1, tiles.CHUNK)
        resets = jnp.cumsum(resets, axis=-1)
    padding = sizes.d_state - B.shape[3]
    B, C = (_pad(v, 3, padding).reshape(batch, length, -1).astype(jnp.bfloat16) for v in (B, C))
    return tiles.SharedInputs(
        dt=_to_rows(dt, sizes, _NO_STEP).transpose(0, 2, 3, 1),
        B=B,
        C=C,
        resets=resets,
        A_and_bias=jnp.stack([_to_rows(A * tiles.LOG2_E, sizes), _to_rows(dt_bias, sizes)], -1),
    )


def _skip(D: Array, sizes: tiles.Sizes) -> Array:
    """[H] -> [blocks 1 128]."""
    return _pad(_to_rows(D, sizes), 1, tiles.LANES - sizes.rows)[:, None]


def _merge_heads(x: Array) -> Array:
    return x.reshape(*x.shape[:2], -1)


def _state_in(state: Array, sizes: tiles.Sizes) -> Array:
    """[B H P N] -> [B N H*P]."""
    state = _pad(state, 3, sizes.d_state - state.shape[3])
    return state.reshape(state.shape[0], -1, sizes.d_state).swapaxes(1, 2)


def _state_out(state: Array, heads: int, d_state: int) -> Array:
    """[B N H*P] -> [B H P N]."""
    return state[:, :d_state].swapaxes(1, 2).reshape(state.shape[0], heads, tiles.HEADDIM, d_state)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _ssd(arrays: _Arrays, interpret: Any) -> tuple[Array, Array]:
    return _run(arrays, interpret, save_states=False)[0]


def _run(arrays: _Arrays, interpret: Any, *, save_states: bool):
    x, initial_state = arrays.x, arrays.initial_state
    sizes = _sizes(x, arrays.B)
    out = forward(
        sizes,
        _merge_heads(x),
        _shared_inputs(arrays, sizes),
        _skip(arrays.D, sizes),
        None if initial_state is None else _state_in(initial_state, sizes),
        save_states=save_states,
        interpret=interpret,
    )
    return (out.y.reshape(x.shape), _state_out(out.final_state, x.shape[2], arrays.B.shape[3])), out.states


def _forward(arrays: _Arrays, interpret: Any):
    outputs, states = _run(arrays, interpret, save_states=True)
    has_initial_state = () if arrays.initial_state is not None else None
    return outputs, (arrays._replace(initial_state=None), states, has_initial_state)


def _backward(interpret: Any, residuals, cotangents):
    arrays, states, has_initial_state = residuals
    dy, d_final_state = cotangents
    x, B = arrays.x, arrays.B
    sizes = _sizes(x, B)
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
        """Gradients of B and C: the sum over a group's blocks of heads."""
        v = v.reshape(batch, length, sizes.groups, -1, sizes.d_state)
        v = v[:, :, :, 0] if v.shape[3] == 1 else jnp.sum(v, 3)
        return v[..., : B.shape[3]].astype(B.dtype)

    d_dt = _from_rows(out.dt.transpose(0, 3, 1, 2), sizes)
    return (
        _Arrays(
            x=out.x.reshape(x.shape),
            dt=d_dt,
            A=_from_rows(jnp.sum(out.A, (0, 3)), sizes),
            B=of_group(out.B),
            C=of_group(out.C),
            D=jnp.sum(out.D.reshape(batch, heads, -1), (0, 2)),
            dt_bias=jnp.sum(d_dt, (0, 1)),
            starts=None,
            initial_state=None if has_initial_state is None else _state_out(out.initial_state, heads, B.shape[3]),
        ),
    )


_ssd.defvjp(_forward, _backward)
