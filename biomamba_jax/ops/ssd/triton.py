"""SSD on NVIDIA GPUs from Ampere on: sizes of the five Triton kernels, and the custom_vjp that pairs them.

Forward: one kernel scans over the chunks of each head and stores the state before each, one processes every chunk
independently. Separate kernels for the chunks' states and for the scan over them would move three times the bytes.
Backward: one kernel scans in reverse with the cotangent of the state, two process every chunk independently.

Products are of x's dtype with float32 accumulation, on tensor cores: TF32 for float32 inputs, JAX's default on GPU.
Step sizes, their sums and the carried states are float32; stored states have x's dtype.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from biomamba_jax.ops import dispatch, triton_calls
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.kernel_arrays import (
    LN_2,
    LOG2_E,
    cdiv,
    differentiable,
    float32,
    float64_reason,
    largest_divisor,
    next_power_of_2,
    pad,
    round_up,
    struct_like,
    vary_alike,
)
from biomamba_jax.ops.numerics import segment_starts
from biomamba_jax.ops.ssd.inputs import Inputs
from biomamba_jax.ops.ssd.xla import weights_and_exponents
from biomamba_jax.ops.triton_calls import Launch

CHUNK = 64
_KERNELS = f"{__package__}.triton_kernels"
_LOWEST_EXPONENT = -151.0
"""Lower bound of a step's exponent in base 2, which decays to zero; without it, a sum of exponents would lose the small
steps next to a huge one."""
_MIN_SIDE = 16  # of a product on tensor cores


class Blocks(NamedTuple):
    """Sizes of a program."""

    launch: Launch
    """Warps and stages."""
    size: int = 0
    """Upper bound of `Sizes.BLOCK`."""


BLOCKS: Mapping[str, Blocks] = {
    "states": Blocks(Launch(4, 3), 32),
    "outputs": Blocks(Launch(4)),
    "state_gradients": Blocks(Launch(4, 3), 32),
    "token_gradients": Blocks(Launch(4)),
    "shared_gradients": Blocks(Launch(8), 8),
}
"""Chosen by static counts (`python -m benchmarks kernels --target sm_90`) in bfloat16 at the published sizes: few
instructions, and no spills forward. `token_gradients` on four warps spills 70 registers of a thread on sm_80, and still
takes 40 % fewer instructions than on eight."""


class Sizes(NamedTuple):
    """Compile-time constants of a kernel."""

    H: int
    """Heads of a row."""
    G: int
    """Groups of heads that share B and C."""
    P: int
    """Channels of a head, a power of two."""
    N: int
    """States, a power of two."""
    Q: int
    """Tokens of a chunk, a power of two."""
    SEGMENTED: bool
    """True if there are segment ids."""
    BLOCK: int
    """Channels of a head in a program of the scans, a power of two; heads in one of `ssd_shared_gradients`."""


class _Arrays(NamedTuple):
    """Inputs of the kernels: L padded to whole chunks, P and N to powers of two."""

    x: Float[Array, "B L H P"]
    d: Float[Array, "B H L"]  # weights of the inputs: step sizes, or 1 where decays are given; float32
    s: Float[Array, "B H L"]  # sums of exponents in base 2, float32
    B: Float[Array, "B L G N"]
    C: Float[Array, "B L G N"]
    D: Float[Array, " H"]
    initial_state: Float[Array, "B H P N"]


def unsupported_reason(x: Array, chunk_size: int | None) -> str | None:
    """Return why the kernels cannot compute these arrays, or None if they can."""
    if reason := float64_reason(x):
        return reason
    if chunk_size not in (None, CHUNK):
        return f"its chunk_size is {CHUNK}, not {chunk_size}"
    capability = dispatch.compute_capability()
    if x.dtype == jnp.float32 and capability is not None and not 90 <= capability < 120:
        return f"its float32 tiles need the registers and shared memory of sm_90 or sm_100, and this is sm_{capability}"
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if x.dtype == jnp.float32 and precision not in (None, "default", "fastest", "high", "tensorfloat32", "bfloat16"):
        return f"its products are of TF32, and the matmul precision is set to {precision}"
    return None


def ssd(inputs: Inputs, chunk_size: int | None) -> tuple[Array, Array]:
    """Return all outputs and the final state; see `api.ssd`. `chunk_size` is None or `CHUNK`."""
    x, dt, A, B, C, D, dt_bias, segment_ids, initial_state = inputs
    rows, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    f32 = jnp.float32
    d, exponents = weights_and_exponents(x, dt, A.astype(f32) * LOG2_E, dt_bias)
    if initial_state is None:
        initial_state = jnp.zeros((rows, heads, headdim, d_state), f32)

    # A padded step has weight and exponent zero, which leaves the state unchanged.
    padded = round_up(length, CHUNK)
    padded_headdim, padded_d_state = (max(_MIN_SIDE, next_power_of_2(n)) for n in (headdim, d_state))
    segment = None
    if segment_ids is not None:
        starts = jnp.pad(segment_starts(segment_ids), ((0, 0), (0, padded - length))).reshape(rows, -1, CHUNK)
        segment = jnp.cumsum(starts, axis=2, dtype=jnp.int32)
    d, exponents = (pad(v, (rows, padded, heads)).swapaxes(1, 2) for v in (d, exponents))
    arrays = _Arrays(
        x=pad(x, (rows, padded, heads, padded_headdim)),
        d=d,
        s=_sums(exponents, segment),
        B=pad(B.astype(x.dtype), (rows, padded, groups, padded_d_state)),
        C=pad(C.astype(x.dtype), (rows, padded, groups, padded_d_state)),
        D=jnp.zeros(heads, f32) if D is None else D.astype(f32),
        initial_state=pad(initial_state.astype(f32), (rows, heads, padded_headdim, padded_d_state)),
    )
    arrays, segment = vary_alike((arrays, segment))
    y, final_state = _ssd((arrays, None if segment is None else segment.reshape(rows, -1)), None)
    return y[:, :length, :, :headdim], final_state[:, :, :headdim, :d_state]


def _sums(exponents: Float[Array, "B H L"], segment: Int[Array, "B chunks chunk"] | None) -> Float[Array, "B H L"]:
    """Sum the exponents up to each token within its chunk and segment.

    As a product, so that its gradient stays within the segment too. No path contains the exponent of a reset, which is
    excluded.
    """
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


def _run(inputs: tuple[_Arrays, Array | None], _: None, save: bool) -> tuple[tuple[Array, Array], Array]:
    """Return (y, final state) and the states before each chunk, from which y is computed in any case."""
    arrays, segment = inputs
    x, d, s, B, C, D, initial_state = arrays
    rows, length, heads, headdim = x.shape
    kernels = triton_calls.kernels(_KERNELS)
    ids = s if segment is None else segment  # the placeholder is not read
    blocks = BLOCKS["states"]
    before, final_state = triton_calls.call(
        kernels.ssd_states,
        (x, d, s, B, ids, initial_state, length),
        outputs=[_chunk_states(arrays), float32(*initial_state.shape)],
        grid=(cdiv(headdim, blocks.size), heads, rows),
        launch=blocks.launch,
        constants=_constants(arrays, segment, min(blocks.size, headdim)),
    )
    (y,) = triton_calls.call(
        kernels.ssd_outputs,
        (x, d, s, B, C, D, ids, before, length),
        outputs=[struct_like(x)],
        grid=(heads, length // CHUNK, rows),
        launch=BLOCKS["outputs"].launch,
        constants=_constants(arrays, segment),
    )
    return (y, final_state), before


def _backward(inputs: tuple[_Arrays, Array | None], before: Array, cotangents, _: None) -> tuple[_Arrays, None]:
    arrays, segment = inputs
    x, d, s, B, C, D, initial_state = arrays
    dy, d_final_state = cotangents
    rows, length, heads, headdim = x.shape
    groups, d_state = B.shape[2:]
    kernels = triton_calls.kernels(_KERNELS)
    ids = s if segment is None else segment
    blocks = BLOCKS["state_gradients"]
    after, d_initial = triton_calls.call(
        kernels.ssd_state_gradients,
        (dy, s, C, ids, d_final_state, length),
        outputs=[_chunk_states(arrays), float32(*initial_state.shape)],
        grid=(cdiv(headdim, blocks.size), heads, rows),
        launch=blocks.launch,
        constants=_constants(arrays, segment, min(blocks.size, headdim)),
    )
    dx, dd, ds, dD = triton_calls.call(
        kernels.ssd_token_gradients,
        (x, dy, d, s, B, C, D, ids, before, after, length),
        outputs=[struct_like(x), float32(*d.shape), float32(*s.shape), float32(rows, heads, length // CHUNK)],
        grid=(heads, length // CHUNK, rows),
        launch=BLOCKS["token_gradients"].launch,
        constants=_constants(arrays, segment),
    )
    blocks = BLOCKS["shared_gradients"]
    per_program = largest_divisor(heads // groups, blocks.size)
    partial_sums = float32(rows, heads // per_program, length, d_state)
    dB, dC = triton_calls.call(
        kernels.ssd_shared_gradients,
        (x, dy, d, s, B, C, ids, before, after, length),
        outputs=[partial_sums, partial_sums],
        grid=(heads // per_program, length // CHUNK, rows),
        launch=blocks.launch,
        constants=_constants(arrays, segment, per_program),
    )

    def of_groups(v: Array) -> Array:
        """Sum the gradient of B or C over a group's programs."""
        v = jnp.sum(v.reshape(rows, groups, -1, length, d_state), 2)
        return v.swapaxes(1, 2).astype(x.dtype)

    gradients = _Arrays(dx, dd, ds * LN_2, of_groups(dB), of_groups(dC), jnp.sum(dD, (0, 2)), d_initial)
    return gradients, None


_ssd = differentiable(_run, _backward)


def _chunk_states(arrays: _Arrays) -> jax.ShapeDtypeStruct:
    rows, length, heads, headdim = arrays.x.shape
    return jax.ShapeDtypeStruct((rows, length // CHUNK, heads, headdim, arrays.B.shape[3]), arrays.x.dtype)


def _constants(arrays: _Arrays, segment: Array | None, block: int = 0) -> dict[str, Any]:
    heads, headdim = arrays.x.shape[2:]
    groups, d_state = arrays.B.shape[2:]
    return {"sizes": Sizes(heads, groups, headdim, d_state, CHUNK, segment is not None, block)}
