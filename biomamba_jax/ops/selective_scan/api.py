"""The public function `selective_scan`: argument checks and dispatch to an implementation."""

from collections.abc import Callable, Mapping
from functools import partial

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.kernel_arrays import check_shapes, float64_reason
from biomamba_jax.ops.selective_scan import native, reference, triton, xla
from biomamba_jax.ops.selective_scan.inputs import Inputs

_FOLDER = __name__.rpartition(".")[0]
_IMPLEMENTATIONS: Mapping[str, Callable[..., tuple[Array, Array]]] = {
    "xla": xla.selective_scan,
    "native": native.selective_scan,
    "pallas_gpu": dispatch.late(f"{_FOLDER}.pallas_gpu", "selective_scan"),
    "pallas_tpu": dispatch.late(f"{_FOLDER}.pallas_tpu", "selective_scan"),
    "triton": triton.selective_scan,
    "reference": reference.selective_scan,
}


def selective_scan(
    x: Float[Array, "B L E"],
    dt: Float[Array, "B L E"],
    A: Float[Array, "E N"],
    B: Float[Array, "B L N"],
    C: Float[Array, "B L N"],
    D: Float[Array, " E"] | None = None,
    z: Float[Array, "B L E"] | None = None,
    *,
    dt_bias: Float[Array, " E"] | None = None,
    segment_ids: Int[Array, "B L"] | None = None,
    initial_state: Float[Array, "B E N"] | None = None,
    return_final_state: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B L E"] | tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """Compute Mamba-1's selective state space model, a gated linear recurrence over time.

        delta_t = softplus(dt_t + dt_bias)
        h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t
        y_t = (C_t h_t + D x_t) silu(z_t)

    Differentiable in every floating-point argument. Everything is computed in float32 (float64 for float64 x).

    Source: Gu and Dao 2023 (arXiv 2312.00752, equation 2 and algorithm 2); `selective_scan_fn` of the authors' code
    (github.com/state-spaces/mamba).

    Args:
      x: input [B L E], any float dtype.
      dt: raw step sizes [B L E]; `dt_bias` and the softplus are applied here.
      A: decay rates [E N], negative, in 1 / step.
      B: input projections [B L N].
      C: output projections [B L N].
      D: skip weight of each channel [E], or None for no skip.
      z: gate [B L E], or None for no gate.
      dt_bias: added to `dt` before the softplus [E].
      segment_ids: document of each token [B L]. The state is reset to zero wherever the id differs from that of the
        token before, so packed documents do not affect each other.
      initial_state: state before the first token [B E N], which continues that token's segment; None is zero.
      return_final_state: also return the state after the last token.
      implementation: "xla", "native" (CPU), "pallas_tpu", "pallas_gpu", "triton", "reference", or None for the
        platform's fastest.

    Returns:
      y [B L E] of x's dtype; with `return_final_state` a pair (y, state [B E N] in float32).

    Raises:
      UserError: shapes do not match, or the implementation does not exist or cannot run here.
    """
    if x.ndim != 3 or A.ndim != 2:
        raise UserError(f"selective_scan: x must be [B L E] and A [E N], not {x.shape} and {A.shape}")
    rows, length, channels = x.shape
    states = A.shape[1]
    inputs = Inputs(x, dt, A, B, C, D, z, dt_bias, segment_ids, initial_state)
    check_shapes(
        "selective_scan",
        inputs._asdict(),
        dt=x.shape,
        A=(channels, states),
        B=(rows, length, states),
        C=(rows, length, states),
        D=(channels,),
        z=x.shape,
        dt_bias=(channels,),
        segment_ids=(rows, length),
        initial_state=(rows, channels, states),
    )
    if length == 0:
        raise UserError("selective_scan: x has no time steps; give at least one token")
    unsupported: dict[str, Callable[[], str | None]] = {
        "native": partial(float64_reason, x),
        "pallas_gpu": dispatch.late(f"{_FOLDER}.pallas_gpu", "unsupported_reason", x, A),
        "pallas_tpu": dispatch.late(f"{_FOLDER}.pallas_tpu", "unsupported_reason", x, A),
        "triton": partial(float64_reason, x),
    }
    # A single token is an elementwise step, which XLA fuses with its neighbours; kernels would pad it to eight.
    prefer: dispatch.Implementation | None = "xla" if length == 1 else None
    scan = dispatch.choose("selective_scan", implementation, _IMPLEMENTATIONS, unsupported, prefer=prefer)
    y, final_state = scan(inputs)
    return (y, final_state) if return_final_state else y
