"""The rotary embedding on TPU: one Pallas kernel per direction, elementwise but for sums over heads.

With J(v) = (-v_{i + N/2}, v_i), a quarter turn, the results are v cos + J(v) sin. Heads whose angles fill the 128 lanes
of a tile are a block: their sines and cosines are computed once for B and C, and J(B) and J(C) once for all of them.
The results are stored where SSD's kernels read them, as [B L H*N].
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.kernel_arrays import differentiable, out_struct, pad, round_up, vary_alike
from biomamba_jax.ops.rotary.inputs import Inputs

_D_STATE = 128
_PAIRS = _D_STATE // 2
_CHUNK = 256
_PIECE = 64
"""Tokens whose values are in registers at once."""
_UNROLL = 2
"""Pieces per iteration: on v5e the forward pass takes 184 cycles of a head for 128 tokens with two and 231 with one."""
_SUBLANES = 8


class _Arrays(NamedTuple):
    """The differentiated arrays; of B and C one for each rank."""

    vectors: tuple[Any, ...]  # [B L G*N]
    biases: tuple[Any, ...]  # v and then J(v) of a block's heads, [blocks 2*heads_of_block N]
    angle: Any  # [B L H*S]


class _Sizes(NamedTuple):
    """Static sizes and options of one call."""

    chunk: int
    heads: int
    angles: int
    blocks_of_group: int
    dtype: Any
    interpret: Any

    @property
    def heads_of_block(self) -> int:
        return _D_STATE // self.angles

    @property
    def head_order(self) -> list[int]:
        """Heads of a block; those whose angles are half of the lanes apart need the same arrays, see `_of_head`."""
        return sorted(range(self.heads_of_block), key=lambda head: head * self.angles % _PAIRS)


def rotary_embedding(inputs: Inputs, dtype: DTypeLike, *, interpret: Any = False) -> tuple[Array, Array]:
    """Return B and C of each head; see `api.rotary_embedding`.

    Args:
      inputs: the arrays.
      dtype: of the results.
      interpret: run the kernels without a TPU, slowly; True, or `pltpu.InterpretParams`. For tests.
    """
    rows, length, ranks, groups, _ = inputs.B.shape
    heads, angles = inputs.angle.shape[2:]
    chunk = min(_CHUNK, round_up(length, _PIECE * _UNROLL))
    sizes = _Sizes(chunk, heads, angles, heads // groups * angles // _D_STATE, jnp.dtype(dtype), interpret)

    def merged(v: Array) -> Array:
        v = v.reshape(rows, length, -1).astype(jnp.float32)
        return pad(v, (rows, round_up(length, chunk), v.shape[2]))

    def of_blocks(bias: Array) -> Array:
        v = bias.reshape(-1, sizes.heads_of_block, _D_STATE).astype(jnp.float32)
        left, right = jnp.split(v, 2, axis=-1)
        return jnp.concatenate([v, jnp.concatenate([-right, left], axis=-1)], axis=1)

    arrays = _Arrays(
        vectors=tuple(merged(v[:, :, rank]) for v in (inputs.B, inputs.C) for rank in range(ranks)),
        biases=tuple(map(of_blocks, (*inputs.B_bias, *inputs.C_bias))),
        angle=merged(inputs.angle),
    )
    turned = [v[:, :length].reshape(rows, length, heads, _D_STATE) for v in _rotate(vary_alike(arrays), sizes)]
    return jnp.stack(turned[:ranks], axis=2), jnp.stack(turned[ranks:], axis=2)


def unsupported_reason(inputs: Inputs) -> str | None:
    """Return why the kernels cannot compute these arrays, or None if they can."""
    groups, d_state = inputs.B.shape[3:]
    heads, angles = inputs.angle.shape[2:]
    if inputs.B.dtype == jnp.float64:
        return "it computes in float32, and B is float64"
    if d_state != _D_STATE:
        return f"it is made for a state of {_D_STATE}, not {d_state}"
    if _D_STATE % angles or heads // groups * angles % _D_STATE:
        return f"{heads // groups} heads of a group with {angles} angles each do not fill tiles of {_D_STATE} lanes"
    return None


def _call(sizes: _Sizes, arrays: _Arrays, cotangents: tuple[Array, ...] = ()) -> Any:
    """Return the results [B L H*N] of each rank of B and C, or with their cotangents the gradients of `arrays`.

    The gradients of biases are sums over a chunk's tokens in each sublane, [B chunks blocks 2*heads_of_block*8 N].
    """
    rows, length = arrays.angle.shape[:2]
    count, heads = len(arrays.vectors), sizes.heads_of_block
    grid = rows, length // sizes.chunk, sizes.heads // heads

    def of_tokens(width: int, blocks: int = 1) -> pl.BlockSpec:
        shape = None, sizes.chunk, width
        return pl.BlockSpec(shape, lambda row, chunk, block: (row, chunk, jax.lax.div(block, jnp.int32(blocks))))

    bias = pl.BlockSpec((None, 2 * heads, _D_STATE), lambda row, chunk, block: (block, 0, 0))
    vector, of_heads = of_tokens(_D_STATE, sizes.blocks_of_group), of_tokens(heads * _D_STATE)
    in_specs = _Arrays((vector,) * count, (bias,) * count, of_tokens(_D_STATE))
    like: Any = (jax.ShapeDtypeStruct((rows, length, sizes.heads * _D_STATE), sizes.dtype),) * count
    out_specs: Any = (of_heads,) * count
    if cotangents:
        sums = jax.ShapeDtypeStruct((*grid, 2 * heads * _SUBLANES, _D_STATE), jnp.float32)
        like = arrays._replace(biases=(sums,) * count)
        of_sums = pl.BlockSpec((None, None, None, *sums.shape[3:]), lambda row, chunk, block: (row, chunk, block, 0, 0))
        out_specs = in_specs._replace(biases=(of_sums,) * count)
    return pl.pallas_call(
        partial(_backward_kernel if cotangents else _forward_kernel, sizes),
        grid=grid,
        in_specs=[in_specs, (of_heads,) * len(cotangents)],
        out_specs=[out_specs],
        out_shape=[jax.tree.map(lambda v: out_struct(v.shape, v.dtype, arrays.angle), like)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=sizes.interpret,
        name="rotary_backward" if cotangents else "rotary_forward",
    )(arrays, cotangents)[0]


def _run(arrays: _Arrays, sizes: _Sizes, save: bool) -> tuple[tuple[Array, ...], None]:
    return _call(sizes, arrays), None  # the residuals are the inputs alone


def _backward(arrays: _Arrays, residuals: None, cotangents: tuple[Array, ...], sizes: _Sizes) -> _Arrays:
    gradients = _call(sizes, arrays, cotangents)
    shape = -1, *arrays.biases[0].shape[:2], _SUBLANES, _D_STATE
    return gradients._replace(biases=tuple(jnp.sum(sums.reshape(shape), (0, 3)) for sums in gradients.biases))


_rotate = differentiable(_run, _backward)


def _forward_kernel(sizes: _Sizes, arrays: _Arrays, cotangents: tuple[()], results: tuple[Any, ...]) -> None:
    def piece(step: Array, _: None) -> None:
        tokens = _tokens(step)
        cos, sin = _cos_sin(arrays.angle[tokens, :])
        vectors = [(v[tokens, :], _turn(v[tokens, :])) for v in arrays.vectors]
        for head in sizes.head_order:
            c, s = _of_head(cos, head, sizes.angles, 1.0), _of_head(sin, head, sizes.angles, 0.0)
            for (v, turned), bias, out in zip(vectors, arrays.biases, results, strict=True):
                v, turned = v + _row(bias, head), turned + _row(bias, head + sizes.heads_of_block)
                out[tokens, _lanes(head)] = (v * c + turned * s).astype(out.dtype)

    jax.lax.fori_loop(0, sizes.chunk // _PIECE, piece, None, unroll=_UNROLL)


def _backward_kernel(sizes: _Sizes, arrays: _Arrays, cotangents: tuple[Any, ...], gradients: _Arrays) -> None:
    """With g the cotangent: v + bias has g cos - J(g sin), the angle the sum over its pair of g (J(v) cos - v sin)."""

    @pl.when(jax.lax.rem(pl.program_id(2), sizes.blocks_of_group) == 0)
    def _() -> None:
        for v in gradients.vectors:
            v[...] = jnp.zeros_like(v)

    for sums in gradients.biases:
        sums[...] = jnp.zeros_like(sums)

    def piece(step: Array, _: None) -> None:
        tokens = _tokens(step)
        cos, sin = _cos_sin(arrays.angle[tokens, :])
        vectors = [(v[tokens, :], _turn(v[tokens, :])) for v in arrays.vectors]
        zeros = jnp.zeros((_PIECE, _D_STATE), jnp.float32)
        d_angle, straight, across = zeros, [zeros for _ in vectors], [zeros for _ in vectors]
        for head in sizes.head_order:
            c, s = _of_head(cos, head, sizes.angles, 1.0), _of_head(sin, head, sizes.angles, 0.0)
            d_cos, d_sin, of_turned = zeros, zeros, head + sizes.heads_of_block
            for k, (v, turned) in enumerate(vectors):
                g = cotangents[k][tokens, _lanes(head)].astype(jnp.float32)
                d_cos += g * (v + _row(arrays.biases[k], head))
                d_sin += g * (turned + _row(arrays.biases[k], of_turned))
                for sums, part, row in ((straight, g * c, head), (across, g * s, of_turned)):
                    sums[k] += part
                    rows = slice(_SUBLANES * row, _SUBLANES * (row + 1))
                    gradients.biases[k][rows, :] += jnp.sum(part.reshape(-1, _SUBLANES, _D_STATE), 0)
            d_pairs = d_sin * c - d_cos * s
            d_pairs += pltpu.roll(d_pairs, _PAIRS, 1)
            first = head * sizes.angles
            lane = _lane(d_pairs)
            d_pairs = _roll(d_pairs, first % _PAIRS)  # it repeats after half of the lanes
            d_angle = jnp.where((lane >= first) & (lane < first + sizes.angles), d_pairs, d_angle)
        gradients.angle[tokens, :] = d_angle
        for k, d_v in enumerate(gradients.vectors):
            d_v[tokens, :] += straight[k] - _turn(across[k])

    jax.lax.fori_loop(0, sizes.chunk // _PIECE, piece, None, unroll=_UNROLL)


def _tokens(step: Array) -> Any:
    return pl.ds(pl.multiple_of(step * _PIECE, _PIECE), _PIECE)


def _lanes(head: int) -> slice:
    return slice(head * _D_STATE, (head + 1) * _D_STATE)


def _row(biases: Any, head: int) -> Array:
    return biases[head : head + 1, :]


def _lane(v: Array) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, v.shape, 1)


def _turn(v: Array) -> Array:
    """Return J(v)."""
    swapped = pltpu.roll(v, _PAIRS, 1)
    return jnp.where(_lane(v) < _PAIRS, -swapped, swapped)


def _roll(v: Array, shift: int) -> Array:
    return pltpu.roll(v, shift, 1) if shift else v


def _of_head(v: Array, head: int, angles: int, fixed: float) -> Array:
    """Return a head's values in both dimensions of each pair, and `fixed` in those that do not rotate."""
    lower, upper = (_roll(v, (first - head * angles) % _D_STATE) for first in (0, _PAIRS))
    lane = _lane(v)
    v = jnp.where(lane < _PAIRS, lower, upper)
    return v if angles == _PAIRS else jnp.where((lane & (_PAIRS - 1)) < angles, v, fixed)


def _cos_sin(angle: Array) -> tuple[Array, Array]:
    """Return cosine and sine to 1e-7 for angles up to thousands: one reduction to +-pi/4 and the Cephes polynomials."""
    turns = jnp.floor(angle * 0.6366197723675814 + 0.5)
    r = ((angle - turns * 1.5703125) - turns * 4.837512969970703e-4) - turns * 7.549789954891882e-8
    z = r * r
    sin = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cos = 1 - 0.5 * z + z * z * (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5))
    quarter = turns.astype(jnp.int32)
    odd = (quarter & 1) == 1
    cos, sin = jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)
    return jnp.where(((quarter + 1) & 2) == 2, -cos, cos), jnp.where((quarter & 2) == 2, -sin, sin)
