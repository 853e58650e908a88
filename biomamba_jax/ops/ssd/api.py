"""The public function `ssd`: argument checks and the choice of implementation."""

from collections.abc import Callable
from typing import Any

from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.ssd import pallas_gpu, pallas_tpu, reference, triton, xla
from biomamba_jax.ops.ssd.inputs import Inputs

_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "xla": xla.ssd,
    "pallas_gpu": pallas_gpu.ssd,
    "pallas_tpu": pallas_tpu.ssd,
    "triton": triton.ssd,
    "reference": reference.ssd,
}


def ssd(
    x: Float[Array, "B L H P"],
    dt: Float[Array, "B L H"],
    A: Float[Array, " H"],
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
    """The selective state-space recurrence of Mamba-2, differentiable in every array, the states included.

    With d = softplus(dt + dt_bias), for each row and head h in group g = h // (H / G):

        S_t = exp(d_t A) S_{t-1} + d_t x_t B_t^T        [P N]
        y_t = S_t C_t + D x_t                           [P]

    S_{t-1} is zero at every t > 0 where segment_ids changes, so no value or gradient crosses the boundary. Products are
    taken in x's dtype with float32 accumulation; d, decays and states are float32 (float64 for float64 inputs).

    Source: Dao and Gu 2024 (arXiv 2405.21060), listing 1; `mamba_chunk_scan_combined` of the authors' code.

    Args:
      x: inputs per head.
      dt: raw time steps, before bias and softplus.
      A: the negative decay rate of each head.
      B: input projections, shared by the H / G heads of a group.
      C: output projections, shared likewise.
      D: weight of the direct path from x to y; None is zero.
      dt_bias: added to dt before the softplus.
      segment_ids: any integers; the state resets where they change along L.
      initial_state: state before the first token, which belongs to the first token's segment; None is zero.
      return_final_state: also return the state after the last token, in float32.
      chunk_size: tokens handled at once by the chunked implementations; None is the best for the platform. Any L is
        allowed. It changes speed and memory, not the result.
      implementation: None (the best for the platform) or a name, see `dispatch`.

    Returns:
      y in x's dtype, or (y, final_state).

    Raises:
      ValueError: shapes or sizes do not fit together.
      UserError: the implementation does not exist or cannot run here.
    """
    inputs = Inputs(x, dt, A, B, C, D, dt_bias, segment_ids, initial_state)
    _check(inputs, chunk_size)
    on_tpu = "xla" if pallas_tpu.why_einsum(x, B, chunk_size) else "pallas_tpu"
    # Few tokens would be padded to a chunk, and one is a step without products.
    on_gpu = ("xla",) if x.shape[1] < triton.CHUNK else ("pallas_gpu", "triton", "xla")
    preferred: dict[dispatch.Platform, tuple[str, ...]] = {"cpu": ("xla",), "gpu": on_gpu, "tpu": (on_tpu,)}
    unsuited = {"pallas_gpu": pallas_gpu.why_not(x, B, chunk_size), "triton": triton.why_not(x, chunk_size)}
    compute = dispatch.choose("ssd", implementation, _IMPLEMENTATIONS, preferred, unsuited)
    y, final_state = compute(inputs, chunk_size)
    return (y, final_state) if return_final_state else y


def _check(inputs: Inputs, chunk_size: int | None) -> None:
    x, dt, A, B, C, D, dt_bias, segment_ids, initial_state = inputs
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"ssd: x must be [B L H P] with no empty axis, not {x.shape}")
    batch, length, heads, headdim = x.shape
    if B.ndim != 4 or B.shape[:2] != (batch, length) or 0 in B.shape or heads % B.shape[2]:
        raise ValueError(f"ssd: B must be [{batch} {length} G N] with G dividing the {heads} heads, not {B.shape}")
    expected = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "C": (C, B.shape),
        "D": (D, (heads,)),
        "dt_bias": (dt_bias, (heads,)),
        "segment_ids": (segment_ids, (batch, length)),
        "initial_state": (initial_state, (batch, heads, headdim, B.shape[3])),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"ssd: {name} must have shape {shape}, not {array.shape}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"ssd: chunk_size must be at least 1, not {chunk_size}")
