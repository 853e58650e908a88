"""SSD on NVIDIA GPUs from Ampere on: five Triton kernels, their sizes, and the pairing of forward with backward pass.

Forward: one kernel walks the chunks of each head and leaves the state before each, one takes every chunk by itself.
Apart kernels for the states of chunks and for passing them on would move three times the bytes. Backward: one kernel
walks back with the gradient of the state, two take every chunk by itself.

Products are of x's dtype with float32 accumulation, on tensor cores: of TF32 for float32 inputs, JAX's default on GPU.
Steps, their sums and the states of a walk are float32; what a walk leaves has x's dtype.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from biomamba_jax.ops import dispatch, triton_calls
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.kernel_arrays import next_power_of_2, pad, vary_alike
from biomamba_jax.ops.numerics import segment_starts
from biomamba_jax.ops.ssd.inputs import Inputs
from biomamba_jax.ops.triton_calls import Launch

CHUNK = 64
_KERNELS = f"{__package__}.triton_kernels"
_LOG2_E = 1.4426950408889634
_LN_2 = 0.6931471805599453
_LOWEST_EXPONENT = -151.0
"""2 to this is zero: a step that decays to less counts as this one, or else a sum of exponents with it would lose the
small steps beside it."""
_SMALLEST_SIDE = 16  # of a product on tensor cores


class Blocks(NamedTuple):
    """`size`: channels of a head in a program of the walks, most heads in one of `shared_gradients`."""

    launch: Launch
    size: int = 0


BLOCKS: Mapping[str, Mapping[int, Blocks]] = {
    "states": {80: Blocks(Launch(4, 3), 32)},
    "outputs": {80: Blocks(Launch(4))},
    "state_gradients": {80: Blocks(Launch(4, 3), 32)},
    "token_gradients": {80: Blocks(Launch(4))},
    "shared_gradients": {80: Blocks(Launch(8), 8)},
}
"""For each kernel and compute capability from the given one on, by static counts (`benchmark kernels --target sm_90`)
in bfloat16 at the published sizes: few instructions, and no spills forward. `token_gradients` on four warps keeps 70
registers of a thread in memory on sm_80, and still takes 40 % fewer instructions than on eight."""


class _Arrays(NamedTuple):
    """What the kernels work on: L padded to whole chunks, P and N to powers of two."""

    x: Float[Array, "B L H P"]
    d: Float[Array, "B H L"]  # steps, float32
    s: Float[Array, "B H L"]  # sums of exponents in base 2, float32
    B: Float[Array, "B L G N"]
    C: Float[Array, "B L G N"]
    D: Float[Array, " H"]
    initial_state: Float[Array, "B H P N"]


def why_not(x: Array, chunk_size: int | None) -> str | None:
    """Why the kernels can't compute these arrays, if so."""
    if x.dtype == jnp.float64:
        return "it computes in float32, and x is float64"
    if chunk_size not in (None, CHUNK):
        return f"its chunk_size is {CHUNK}, not {chunk_size}"
    capability = dispatch.compute_capability()
    if x.dtype == jnp.float32 and capability is not None and not 90 <= capability < 120:
        return f"its float32 tiles need the registers and shared memory of sm_90 or sm_100, and this is sm_{capability}"
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if x.dtype == jnp.float32 and precision not in (None, "default", "fastest", "high", "tensorfloat32", "bfloat16"):
        return f"its products are of TF32 and {precision} precision is asked for"
    return None


def ssd(inputs: Inputs, chunk_size: int | None) -> tuple[Array, Array]:
    """See `biomamba_jax.ops.ssd`; `chunk_size` is None or `CHUNK`."""
    x, dt, A, B, C, D, dt_bias, segment_ids, initial_state = inputs
    rows, length, heads, headdim = x.shape
    d_state = B.shape[3]
    f32 = jnp.float32
    dt, A = dt.astype(f32), A.astype(f32)
    d = jax.nn.softplus(dt if dt_bias is None else dt + dt_bias.astype(f32))
    D = jnp.zeros(heads, f32) if D is None else D.astype(f32)
    if initial_state is None:
        initial_state = jnp.zeros((rows, heads, headdim, d_state), f32)

    # A padded step has d = 0: it leaves the state as it is.
    padding = -length % CHUNK
    wide, narrow = (max(_SMALLEST_SIDE, next_power_of_2(n)) for n in (headdim, d_state))
    segment = None
    if segment_ids is not None:
        starts = jnp.pad(segment_starts(segment_ids), ((0, 0), (0, padding))).reshape(rows, -1, CHUNK)
        segment = jnp.cumsum(starts, axis=2, dtype=jnp.int32)
    d = pad(d, (rows, length + padding, heads)).swapaxes(1, 2)
    arrays = _Arrays(
        x=pad(x, (rows, length + padding, heads, wide)),
        d=d,
        s=_sums(d * (A * _LOG2_E)[:, None], segment),
        B=pad(B.astype(x.dtype), (rows, length + padding, B.shape[2], narrow)),
        C=pad(C.astype(x.dtype), (rows, length + padding, B.shape[2], narrow)),
        D=D,
        initial_state=pad(initial_state.astype(f32), (rows, heads, wide, narrow)),
    )
    arrays, segment = vary_alike((arrays, segment))
    y, final_state = _ssd(arrays, None if segment is None else segment.reshape(rows, -1))
    return y[:, :length, :, :headdim], final_state[:, :, :headdim, :d_state]


def _sums(exponents: Float[Array, "B H L"], segment: Int[Array, "B chunks Q"] | None) -> Float[Array, "B H L"]:
    """The sum of the exponents up to each token, of its chunk and segment; a product, so that its gradient stays within
    the segment too. The exponent of a reset is in no path: it is left out."""
    rows, heads, _ = exponents.shape
    parts = jnp.maximum(exponents, _LOWEST_EXPONENT).reshape(rows, heads, -1, CHUNK)
    until = jnp.triu(jnp.ones((CHUNK, CHUNK), jnp.float32))  # [k, t], k <= t
    product = partial(jnp.einsum, precision="highest")
    if segment is None:
        return product("bhck,kt->bhct", parts, until).reshape(exponents.shape)
    first = jnp.diff(segment, axis=2, prepend=0) > 0
    same = until * (segment[:, :, :, None] == segment[:, :, None, :])
    parts = jnp.where(first[:, None], 0.0, parts)
    return product("bhck,bckt->bhct", parts, same).reshape(exponents.shape)


@jax.custom_vjp
def _ssd(arrays: _Arrays, segment: Int[Array, "B L"] | None) -> tuple[Array, Array]:
    return _run(arrays, segment)[0]


def _forward(arrays: _Arrays, segment: Array | None):
    outputs, before = _run(arrays, segment)
    return outputs, (arrays, segment, before)


def _run(arrays: _Arrays, segment: Array | None) -> tuple[tuple[Array, Array], Array]:
    x, d, s, B, C, D, initial_state = arrays
    rows, length, heads, headdim = x.shape
    kernels = triton_calls.kernels(_KERNELS)
    stand_in = s if segment is None else segment  # not read
    walk, each = (triton_calls.for_device(BLOCKS[k]) for k in ("states", "outputs"))
    before, final_state = triton_calls.call(
        kernels.ssd_states,
        x,
        d,
        s,
        B,
        stand_in,
        initial_state,
        length,
        outputs=[_chunk_states(arrays), jax.ShapeDtypeStruct(initial_state.shape, jnp.float32)],
        grid=(-(-headdim // walk.size), heads, rows),
        launch=walk.launch,
        constants=_constants(arrays, segment) | {"PB": min(walk.size, headdim)},
    )
    (y,) = triton_calls.call(
        kernels.ssd_outputs,
        x,
        d,
        s,
        B,
        C,
        D,
        stand_in,
        before,
        length,
        outputs=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
        grid=(heads, length // CHUNK, rows),
        launch=each.launch,
        constants=_constants(arrays, segment),
    )
    return (y, final_state), before


def _backward(residuals, cotangents):
    arrays, segment, before = residuals
    x, d, s, B, C, D, initial_state = arrays
    dy, d_final_state = cotangents
    rows, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    f32 = jnp.float32
    kernels = triton_calls.kernels(_KERNELS)
    stand_in = s if segment is None else segment
    constants = _constants(arrays, segment)
    names = ("state_gradients", "token_gradients", "shared_gradients")
    walk, each, shared = (triton_calls.for_device(BLOCKS[name]) for name in names)
    after, d_initial = triton_calls.call(
        kernels.ssd_state_gradients,
        dy,
        s,
        C,
        stand_in,
        d_final_state,
        length,
        outputs=[_chunk_states(arrays), jax.ShapeDtypeStruct(initial_state.shape, f32)],
        grid=(-(-headdim // walk.size), heads, rows),
        launch=walk.launch,
        constants=constants | {"PB": min(walk.size, headdim)},
    )
    dx, dd, ds, dD = triton_calls.call(
        kernels.ssd_token_gradients,
        x,
        dy,
        d,
        s,
        B,
        C,
        D,
        stand_in,
        before,
        after,
        length,
        outputs=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(d.shape, f32),
            jax.ShapeDtypeStruct(s.shape, f32),
            jax.ShapeDtypeStruct((rows, heads, length // CHUNK), f32),
        ],
        grid=(heads, length // CHUNK, rows),
        launch=each.launch,
        constants=constants,
    )
    per_program = _largest_divisor(heads // groups, shared.size)
    partial_sums = jax.ShapeDtypeStruct((rows, heads // per_program, length, d_state), f32)
    dB, dC = triton_calls.call(
        kernels.ssd_shared_gradients,
        x,
        dy,
        d,
        s,
        B,
        C,
        stand_in,
        before,
        after,
        length,
        outputs=[partial_sums, partial_sums],
        grid=(heads // per_program, length // CHUNK, rows),
        launch=shared.launch,
        constants=constants | {"HB": per_program},
    )

    def of_groups(v: Array) -> Array:
        v = jnp.sum(v.reshape(rows, groups, -1, length, d_state), 2)
        return v.swapaxes(1, 2).astype(x.dtype)

    gradients = _Arrays(dx, dd, ds * _LN_2, of_groups(dB), of_groups(dC), jnp.sum(dD, (0, 2)), d_initial)
    return gradients, None


_ssd.defvjp(_forward, _backward)


def _chunk_states(arrays: _Arrays) -> jax.ShapeDtypeStruct:
    rows, length, heads, headdim = arrays.x.shape
    return jax.ShapeDtypeStruct((rows, length // CHUNK, heads, headdim, arrays.B.shape[3]), arrays.x.dtype)


def _constants(arrays: _Arrays, segment: Array | None) -> dict[str, Any]:
    heads, headdim = arrays.x.shape[2:]
    groups, d_state = arrays.B.shape[2:]
    return {
        "H": heads,
        "G": groups,
        "P": headdim,
        "N": d_state,
        "Q": CHUNK,
        "SEGMENTED": segment is not None,
    }


def _largest_divisor(n: int, most: int) -> int:
    return max(k for k in range(1, most + 1) if n % k == 0)
