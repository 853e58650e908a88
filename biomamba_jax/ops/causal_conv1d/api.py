"""The public causal convolution: checks the arguments and hands them to the implementation that was chosen."""

from collections.abc import Callable, Mapping
from typing import Literal

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.causal_conv1d import pallas_tpu, reference, triton, xla
from biomamba_jax.ops.causal_conv1d.inputs import Inputs

_IMPLEMENTATIONS: Mapping[str, Callable[..., tuple[Array, Array]]] = {
    "xla": xla.causal_conv1d,
    "pallas_tpu": pallas_tpu.causal_conv1d,
    "triton": triton.causal_conv1d,
    "reference": reference.causal_conv1d,
}
_PREFERRED: Mapping[dispatch.Platform, tuple[str, ...]] = {
    "cpu": ("xla",),
    "gpu": ("pallas_gpu", "triton", "xla"),
    "tpu": ("pallas_tpu", "xla"),
}
# A few tokens are a few elementwise steps, which XLA fuses with their neighbours; the kernel would pad them to sixteen.
_PREFERRED_FOR_FEW_TOKENS: Mapping[dispatch.Platform, tuple[str, ...]] = {p: ("xla",) for p in _PREFERRED}
_FEW_TOKENS = 16


def causal_conv1d(
    x: Float[Array, "B L C"],
    weight: Float[Array, "C K"],
    bias: Float[Array, " C"] | None = None,
    *,
    activation: Literal["silu"] | None = "silu",
    segment_ids: Int[Array, "B L"] | None = None,
    initial_state: Float[Array, "B K-1 C"] | None = None,
    return_final_state: bool = False,
    implementation: dispatch.Implementation | None = None,
) -> Float[Array, "B L C"] | tuple[Float[Array, "B L C"], Float[Array, "B K-1 C"]]:
    """A depthwise convolution over time that never looks ahead: y_t = act(bias + sum_k weight[:, k] x_{t-K+1+k}).

    As in the authors' `causal_conv1d` (github.com/Dao-AILab/causal-conv1d). Differentiable in every floating-point
    argument; products are accumulated in float32 (float64 where x is).

    Args:
      x: input [B L C], any float dtype.
      weight: taps of each channel [C K], the oldest first.
      bias: [C], or None.
      activation: "silu", or None for none.
      segment_ids: document of each token [B L]. A tap that would reach across a change of id reads zero.
      initial_state: the K-1 inputs before the first token [B K-1 C], of that token's segment; None is zeros.
      return_final_state: also return the last K-1 inputs, zeros where the last token's segment is younger than that.
      implementation: "xla", "pallas_tpu", "triton", "reference", or None for the best on this platform.

    Returns:
      y [B L C] of x's dtype; with `return_final_state` a pair (y, state [B K-1 C] of x's dtype).

    Raises:
      UserError: shapes do not fit together, the activation is unknown, or the implementation does not exist or cannot
        run here.
    """
    if x.ndim != 3 or weight.ndim != 2:
        raise UserError(f"causal_conv1d: x must be [B L C] and weight [C K], not {x.shape} and {weight.shape}")
    rows, length, channels = x.shape
    width = weight.shape[1]
    expected = {
        "weight": (weight, (channels, width)),
        "bias": (bias, (channels,)),
        "segment_ids": (segment_ids, (rows, length)),
        "initial_state": (initial_state, (rows, width - 1, channels)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise UserError(f"causal_conv1d: {name} has shape {array.shape}, expected {shape} for x {x.shape}")
    if length == 0:
        raise UserError("causal_conv1d: x has no time steps; give at least one token")
    if activation not in ("silu", None):
        raise UserError(f'causal_conv1d: activation {activation!r} is unknown; give "silu" or None')
    preferred = _PREFERRED_FOR_FEW_TOKENS if length < _FEW_TOKENS else _PREFERRED
    unsuited = {"pallas_tpu": pallas_tpu.why_not(x, weight), "triton": triton.why_not(x)}
    conv = dispatch.choose("causal_conv1d", implementation, _IMPLEMENTATIONS, preferred, unsuited)
    y, final_state = conv(Inputs(x, weight, bias, segment_ids, initial_state), activation)
    return (y, final_state) if return_final_state else y
