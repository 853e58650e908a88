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
    biases: tuple[Any, ...]  # [blocks heads_of_block N]; as gradients sums [B chunks blocks heads_of_block*16 N]
    angle: Any  # [B L H*S]


class _Inputs(NamedTuple):
    """Inputs of the kernels."""

    arrays: _Arrays
    turned_biases: tuple[Any, ...]  # J(biases)
    cotangents: tuple[Any, ...]  # [B L H*N] of each result; none in the forward pass


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

    biases = *inputs.B_bias, *inputs.C_bias
    arrays = _Arrays(
        vectors=tuple(merged(v[:, :, rank]) for v in (inputs.B, inputs.C) for rank in range(ranks)),
        biases=tuple(v.reshape(-1, sizes.heads_of_block, _D_STATE).astype(jnp.float32) for v in biases),
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


def _specs(sizes: _Sizes, ranks: int, *, gradients: bool = False) -> tuple[_Arrays, tuple[pl.BlockSpec, ...]]:
    """Return the block specs of `_Arrays`, or of its gradients, and of the results."""

    def of_tokens(width: int, blocks: int = 1) -> pl.BlockSpec:
        shape = None, sizes.chunk, width
        return pl.BlockSpec(shape, lambda row, chunk, block: (row, chunk, jax.lax.div(block, jnp.int32(blocks))))

    heads = sizes.heads_of_block
    if gradients:
        shape = None, None, None, 2 * _SUBLANES * heads, _D_STATE
        bias = pl.BlockSpec(shape, lambda row, chunk, block: (row, chunk, block, 0, 0))
    else:
        bias = pl.BlockSpec((None, heads, _D_STATE), lambda row, chunk, block: (block, 0, 0))
    vector = of_tokens(_D_STATE, sizes.blocks_of_group)
    return _Arrays((vector,) * ranks, (bias,) * ranks, of_tokens(_D_STATE)), (of_tokens(heads * _D_STATE),) * ranks


def _call(kernel: Any, sizes: _Sizes, arrays: _Arrays, cotangents: tuple[Array, ...], specs: Any, shapes: Any) -> Any:
    """Run a kernel on a chunk of a row and a block of heads at a time; return its outputs, of `specs` and `shapes`."""
    of_arrays, of_results = _specs(sizes, len(arrays.vectors))
    rows, length = arrays.angle.shape[:2]
    return pl.pallas_call(
        partial(kernel, sizes),
        grid=(rows, length // sizes.chunk, sizes.heads // sizes.heads_of_block),
        in_specs=[_Inputs(of_arrays, of_arrays.biases, of_results[: len(cotangents)])],
        out_specs=[specs],
        out_shape=[shapes],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=sizes.interpret,
        name="rotary_backward" if cotangents else "rotary_forward",
    )(_Inputs(arrays, tuple(map(_quarter_turn, arrays.biases)), cotangents))[0]


def _run(arrays: _Arrays, sizes: _Sizes, save: bool) -> tuple[tuple[Array, ...], None]:
    """Return the results [B L H*N] of each rank of B and C; the residuals are the inputs alone."""
    ranks = len(arrays.vectors)
    shape = out_struct((*arrays.angle.shape[:2], sizes.heads * _D_STATE), sizes.dtype, arrays.angle)
    return _call(_forward_kernel, sizes, arrays, (), _specs(sizes, ranks)[1], (shape,) * ranks), None


def _backward(arrays: _Arrays, residuals: None, cotangents: tuple[Array, ...], sizes: _Sizes) -> _Arrays:
    ranks, like = len(arrays.vectors), arrays.angle
    rows, length, lanes = like.shape
    shape = rows, length // sizes.chunk, lanes // _D_STATE, 2 * _SUBLANES * sizes.heads_of_block, _D_STATE
    shapes = arrays._replace(biases=(jax.ShapeDtypeStruct(shape, jnp.float32),) * ranks)
    shapes = jax.tree.map(lambda v: out_struct(v.shape, jnp.float32, like), shapes)
    specs = _specs(sizes, ranks, gradients=True)[0]
    gradients = _call(_backward_kernel, sizes, arrays, cotangents, specs, shapes)

    def bias(sums: Array) -> Array:
        sums = jnp.sum(sums.reshape(-1, *arrays.biases[0].shape[:2], 2, _SUBLANES, _D_STATE), (0, 4))
        return sums[:, :, 0] - _quarter_turn(sums[:, :, 1])

    return gradients._replace(biases=tuple(map(bias, gradients.biases)))


_rotate = differentiable(_run, _backward)


def _quarter_turn(v: Array) -> Array:
    """Return J(v)."""
    left, right = jnp.split(v, 2, axis=-1)
    return jnp.concatenate([-right, left], axis=-1)


def _forward_kernel(sizes: _Sizes, inputs: _Inputs, outputs: tuple[Any, ...]) -> None:
    arrays = inputs.arrays

    def piece(step: Array, _: None) -> None:
        tokens = _tokens(step)
        cos, sin = _cos_sin(arrays.angle[tokens, :])
        vectors = [(v[tokens, :], _turn(v[tokens, :])) for v in arrays.vectors]
        for head in sizes.head_order:
            c, s = _of_head(cos, head, sizes.angles, 1.0), _of_head(sin, head, sizes.angles, 0.0)
            for k, (v, turned) in enumerate(vectors):
                v, turned = v + _row(arrays.biases[k], head), turned + _row(inputs.turned_biases[k], head)
                outputs[k][tokens, _lanes(head)] = (v * c + turned * s).astype(outputs[k].dtype)

    jax.lax.fori_loop(0, sizes.chunk // _PIECE, piece, None, unroll=_UNROLL)


def _backward_kernel(sizes: _Sizes, inputs: _Inputs, gradients: _Arrays) -> None:
    """With g the cotangent: v + bias has g cos - J(g sin), the angle the sum over its pair of g (J(v) cos - v sin)."""
    arrays = inputs.arrays

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
            d_cos, d_sin = zeros, zeros
            for k, (v, turned) in enumerate(vectors):
                g = inputs.cotangents[k][tokens, _lanes(head)].astype(jnp.float32)
                d_cos += g * (v + _row(arrays.biases[k], head))
                d_sin += g * (turned + _row(inputs.turned_biases[k], head))
                for sums, part, of_bias in ((straight, g * c, 2 * head), (across, g * s, 2 * head + 1)):
                    sums[k] += part
                    rows = slice(_SUBLANES * of_bias, _SUBLANES * (of_bias + 1))
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
    """Return J(v) within a kernel."""
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
