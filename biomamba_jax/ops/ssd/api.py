"""The public function `ssd`: argument checks and dispatch to an implementation."""

from collections.abc import Callable, Mapping
from functools import partial

import jax.numpy as jnp

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.kernel_arrays import check_shapes, float64_reason
from biomamba_jax.ops.ssd import native, reference, triton, xla
from biomamba_jax.ops.ssd.inputs import Inputs

_FOLDER = __name__.rpartition(".")[0]
_IMPLEMENTATIONS: Mapping[str, Callable[..., tuple[Array, Array]]] = {
    "xla": xla.ssd,
    "native": native.ssd,
    "pallas_gpu": dispatch.late(f"{_FOLDER}.pallas_gpu", "ssd"),
    "pallas_tpu": dispatch.late(f"{_FOLDER}.pallas_tpu", "ssd"),
    "triton": triton.ssd,
    "reference": reference.ssd,
}

# Rows times heads up to which Triton is chosen on Hopper too: a block of Mosaic GPU's forward kernel has all chunks
# of a head, one of Triton's a single chunk. For a row of 24 heads and 8,192 tokens an H100 takes 0.151 ms forward and
# 0.561 in both directions with Triton, 0.262 and 0.535 with Mosaic GPU, which is faster in both with 8 rows.
_FEW_STREAMS = 24


def ssd(
    x: Float[Array, "B L H P"],
    dt: Float[Array, "B L H"] | None,
    A: Float[Array, " H"] | Float[Array, "B L H"],
    B: Float[Array, "B L G N"],
    C: Float[Array, "B L G N"],
    D: Float[Array, " H"] | None = None,
    *,
    dt_bias: Float[Array, " H"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    initial_state: Float[Array, "B H P N"] | None = None,
    return_final_state: bool = False,
    chunk_size: int | None = None,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B L H P"] | tuple[Float[Array, "B L H P"], Float[Array, "B H P N"]]:
    """Compute Mamba-2's selective state space recurrence (state space duality).

    With d = softplus(dt + dt_bias), for each row and head h in group g = h // (H / G):

        S_t = exp(d_t A) S_{t-1} + d_t x_t B_t^T        [P N]
        y_t = S_t C_t + D x_t                           [P]

    Without dt, S_t = exp(A_t) S_{t-1} + x_t B_t^T: the decays depend on the data, and inputs have no weight (Mamba-3).

    S_{t-1} is zero at every t > 0 where segment_ids changes, so no value or gradient crosses the boundary. Products are
    computed in x's dtype with float32 accumulation; d, decays and states are float32 (float64 for float64 inputs).
    Differentiable in every floating-point argument, the states included.

    Source: Dao and Gu 2024 (arXiv 2405.21060), listing 1; `mamba_chunk_scan_combined` of the authors' code
    (github.com/state-spaces/mamba).

    Args:
      x: inputs per head [B L H P], any float dtype.
      dt: raw step sizes [B L H]; `dt_bias` and the softplus are applied here. None: inputs are weighted already.
      A: decay rate of each head [H], negative, in 1 / step; without dt the log of each step's decay [B L H].
      B: input projections [B L G N], shared by the H / G heads of a group.
      C: output projections [B L G N], shared likewise.
      D: skip weight of each head [H], or None for no skip.
      dt_bias: added to `dt` before the softplus [H].
      segment_ids: document of each token [B L], any integers; the state is reset where they change along L.
      initial_state: state before the first token [B H P N], which continues that token's segment; None is zero.
      return_final_state: also return the state after the last token.
      chunk_size: tokens per chunk of the chunked implementations; None is the platform's best. Any L is allowed. It
        affects speed and memory, not the result.
      implementation: "xla", "native" (CPU), "pallas_tpu", "pallas_gpu", "triton", "reference", or None for the
        platform's fastest.

    Returns:
      y [B L H P] of x's dtype; with `return_final_state` a pair (y, state [B H P N] in float32).

    Raises:
      UserError: shapes or sizes do not match, or the implementation does not exist or cannot run here.
    """
    inputs = Inputs(x, dt, A, B, C, D, dt_bias, segment_ids, initial_state)
    if x.ndim != 4 or 0 in x.shape:
        raise UserError(f"ssd: x must be [B L H P] with no empty axis, not {x.shape}")
    batch, length, heads, headdim = x.shape
    if B.ndim != 4 or B.shape[:2] != (batch, length) or 0 in B.shape or heads % B.shape[2]:
        raise UserError(f"ssd: B must be [{batch} {length} G N] with G dividing the {heads} heads, not {B.shape}")
    check_shapes(
        "ssd",
        inputs._asdict(),
        dt=(batch, length, heads),
        A=(heads,) if dt is not None else (batch, length, heads),
        C=B.shape,
        D=(heads,),
        dt_bias=(heads,),
        segment_ids=(batch, length),
        initial_state=(batch, heads, headdim, B.shape[3]),
    )
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"ssd: chunk_size must be at least 1, not {chunk_size}")
    unsupported: dict[str, Callable[[], str | None]] = {
        "native": partial(float64_reason, x),
        "pallas_gpu": dispatch.late(f"{_FOLDER}.pallas_gpu", "unsupported_reason", x, B, chunk_size),
        "pallas_tpu": dispatch.late(f"{_FOLDER}.pallas_tpu", "unsupported_reason", x, dt, B, chunk_size),
        "triton": partial(triton.unsupported_reason, x, chunk_size),
    }
    # Few tokens would be padded to a chunk, and one is a step without products.
    if dispatch.platform() == "tpu":
        xla_is_faster = dispatch.late(f"{_FOLDER}.pallas_tpu", "xla_is_faster")(x, dt, B)
    else:
        xla_is_faster = length < (2 if dispatch.platform() == "cpu" else triton.CHUNK)
    prefer: dispatch.Implementation | None = "xla" if xla_is_faster else None
    measured = dispatch.platform() == "gpu" and x.dtype == jnp.bfloat16 and dt is not None
    if prefer is None and measured and batch * heads <= _FEW_STREAMS:
        prefer = "triton"
    compute = dispatch.choose("ssd", implementation, _IMPLEMENTATIONS, unsupported, prefer=prefer)
    y, final_state = compute(inputs, chunk_size)
    return (y, final_state) if return_final_state else y
