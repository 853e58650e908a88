"""The public selective scan: checks the arguments and hands them to the implementation that was chosen."""

from collections.abc import Callable, Mapping

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.selective_scan import pallas_gpu, pallas_tpu, reference, triton, xla
from biomamba_jax.ops.selective_scan.inputs import Inputs

_IMPLEMENTATIONS: Mapping[str, Callable[..., tuple[Array, Array]]] = {
    "xla": xla.selective_scan,
    "pallas_gpu": pallas_gpu.selective_scan,
    "pallas_tpu": pallas_tpu.selective_scan,
    "triton": triton.selective_scan,
    "reference": reference.selective_scan,
}
_PREFERRED: Mapping[dispatch.Platform, tuple[str, ...]] = {
    "cpu": ("xla",),
    "gpu": ("pallas_gpu", "triton", "xla"),
    "tpu": ("pallas_tpu", "xla"),
}
# One token is one elementwise step, which XLA fuses with its neighbours; a kernel would pad it to eight.
_PREFERRED_FOR_ONE_TOKEN: Mapping[dispatch.Platform, tuple[str, ...]] = {p: ("xla",) for p in _PREFERRED}


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
    """The selective state space model of Mamba-1 (arXiv 2312.00752, equation 2 and algorithm 2).

        delta_t = softplus(dt_t + dt_bias)
        h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t
        y_t = (C_t h_t + D x_t) silu(z_t)

    It is differentiable in every floating-point argument. Inside, all is computed in float32 (float64 where x is).

    Args:
      x: input [B L E], any float dtype.
      dt: raw step sizes [B L E]; `dt_bias` and the softplus are applied here.
      A: decay rates [E N], negative, in 1 / step.
      B: input projections [B L N].
      C: output projections [B L N].
      D: skip weight of each channel [E], or None for no skip.
      z: gate [B L E], or None for no gate.
      dt_bias: added to `dt` before the softplus [E].
      segment_ids: document of each token [B L]. The state is zeroed wherever the id differs from that of the token
        before, so packed documents do not see each other.
      initial_state: state before the first token [B E N], belonging to the segment of that token; None is zero.
      return_final_state: also return the state after the last token.
      implementation: "xla", "pallas_tpu", "pallas_gpu", "triton", "reference", or None for the best on this platform.

    Returns:
      y [B L E] of x's dtype; with `return_final_state` a pair (y, state [B E N] in float32).

    Raises:
      UserError: shapes do not fit together, or the implementation does not exist or cannot run here.
    """
    if x.ndim != 3 or A.ndim != 2:
        raise UserError(f"selective_scan: x must be [B L E] and A [E N], not {x.shape} and {A.shape}")
    rows, length, channels = x.shape
    states = A.shape[1]
    expected = {
        "dt": (dt, (rows, length, channels)),
        "A": (A, (channels, states)),
        "B": (B, (rows, length, states)),
        "C": (C, (rows, length, states)),
        "D": (D, (channels,)),
        "z": (z, (rows, length, channels)),
        "dt_bias": (dt_bias, (channels,)),
        "segment_ids": (segment_ids, (rows, length)),
        "initial_state": (initial_state, (rows, channels, states)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise UserError(
                f"selective_scan: {name} has shape {array.shape}, expected {shape} for x {x.shape} and A {A.shape}"
            )
    if length == 0:
        raise UserError("selective_scan: x has no time steps; give at least one token")
    preferred = _PREFERRED_FOR_ONE_TOKEN if length == 1 else _PREFERRED
    unsuited = {
        "pallas_gpu": pallas_gpu.why_not(x, A),
        "pallas_tpu": pallas_tpu.why_not(x, A),
        "triton": triton.why_not(x),
    }
    scan = dispatch.choose("selective_scan", implementation, _IMPLEMENTATIONS, preferred, unsuited)
    y, final_state = scan(Inputs(x, dt, A, B, C, D, z, dt_bias, segment_ids, initial_state))
    return (y, final_state) if return_final_state else y
