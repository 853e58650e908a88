"""The public function `causal_conv1d`: argument checks and dispatch to an implementation."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.causal_conv1d import native, reference, triton, xla
from biomamba_jax.ops.causal_conv1d.inputs import Inputs
from biomamba_jax.ops.kernel_arrays import check_shapes, float64_reason

_FOLDER = __name__.rpartition(".")[0]
_IMPLEMENTATIONS: Mapping[str, Callable[..., tuple[Array, Array]]] = {
    "xla": xla.causal_conv1d,
    "native": native.causal_conv1d,
    "pallas_tpu": dispatch.late(f"{_FOLDER}.pallas_tpu", "causal_conv1d"),
    "triton": triton.causal_conv1d,
    "reference": reference.causal_conv1d,
}
# A shorter row is a few elementwise steps, which XLA fuses with their neighbours; the kernels would pad it to this.
_MIN_KERNEL_TOKENS = 16


def causal_conv1d(
    x: Float[Array, "B L C"],
    weight: Float[Array, "C K"],
    bias: Float[Array, " C"] | None = None,
    *,
    activation: Literal["silu"] | None = "silu",
    segment_ids: Int[Array, "B L"] | None = None,
    initial_state: Float[Array, "B past C"] | None = None,
    return_final_state: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B L C"] | tuple[Float[Array, "B L C"], Float[Array, "B past C"]]:
    """Convolve every channel causally over time: y_t = act(bias + sum_k weight[:, k] x_{t-K+1+k}).

    Differentiable in every floating-point argument; products are accumulated in float32 (float64 for float64 x).

    Source: `causal_conv1d_fn` of the authors' code (github.com/Dao-AILab/causal-conv1d).

    Args:
      x: input [B L C], any float dtype.
      weight: taps of each channel [C K], the oldest first.
      bias: [C], or None.
      activation: "silu", or None for none.
      segment_ids: document of each token [B L]. A tap that would reach across a change of id reads zero.
      initial_state: the K-1 inputs before the first token [B K-1 C], of that token's segment; None is zeros.
      return_final_state: also return the last K-1 inputs, zeros where they precede the last token's segment.
      implementation: "xla", "native" (CPU), "pallas_tpu", "triton", "reference", or None for the platform's fastest.

    Returns:
      y [B L C] of x's dtype; with `return_final_state` a pair (y, state [B K-1 C] of x's dtype).

    Raises:
      UserError: shapes do not match, the activation is unknown, or the implementation does not exist or cannot run
        here.
    """
    if x.ndim != 3 or weight.ndim != 2:
        raise UserError(f"causal_conv1d: x must be [B L C] and weight [C K], not {x.shape} and {weight.shape}")
    rows, length, channels = x.shape
    width = weight.shape[1]
    inputs = Inputs(x, weight, bias, segment_ids, initial_state)
    check_shapes(
        "causal_conv1d",
        inputs._asdict(),
        weight=(channels, width),
        bias=(channels,),
        segment_ids=(rows, length),
        initial_state=(rows, width - 1, channels),
    )
    if length == 0:
        raise UserError("causal_conv1d: x has no time steps; give at least one token")
    if activation not in ("silu", None):
        raise UserError(f'causal_conv1d: activation {activation!r} is unknown; give "silu" or None')
    unsupported: dict[str, Callable[[], str | None]] = {
        "native": partial(float64_reason, x),
        "pallas_tpu": dispatch.late(f"{_FOLDER}.pallas_tpu", "unsupported_reason", x, weight),
        "triton": partial(float64_reason, x),
    }
    prefer: dispatch.Implementation | None = "xla" if length < _MIN_KERNEL_TOKENS else None
    conv = dispatch.choose("causal_conv1d", implementation, _IMPLEMENTATIONS, unsupported, prefer=prefer)
    y, final_state = conv(inputs, activation)
    return (y, final_state) if return_final_state else y
