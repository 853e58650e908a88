"""The public function `rotary_embedding`: argument checks and dispatch to an implementation."""

from collections.abc import Callable, Mapping

from jax.typing import DTypeLike

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.kernel_arrays import check_shapes
from biomamba_jax.ops.rotary import reference, xla
from biomamba_jax.ops.rotary.inputs import Inputs

_FOLDER = __name__.rpartition(".")[0]
_IMPLEMENTATIONS: Mapping[str, Callable[..., tuple[Array, Array]]] = {
    "xla": xla.rotary_embedding,
    "pallas_tpu": dispatch.late(f"{_FOLDER}.pallas_tpu", "rotary_embedding"),
    "reference": reference.rotary_embedding,
}
# A shorter row, as in decoding, would be padded to a chunk of the kernels.
_MIN_KERNEL_TOKENS = 64


def rotary_embedding(
    B: Float[Array, "B L R G N"],
    C: Float[Array, "B L R G N"],
    B_bias: Float[Array, "R H N"],
    C_bias: Float[Array, "R H N"],
    angle: Float[Array, "B L H S"],
    *,
    dtype: DTypeLike,
    implementation: dispatch.Implementation | None = None,
) -> tuple[Float[Array, "B L R H N"], Float[Array, "B L R H N"]]:
    """Compute B and C of each head of Mamba-3: with the head's bias, rotated by its angles.

    For rank r, head h of group g = h // (H / G) and i < S, with v_j = B_rgj + B_bias_rhj and the same of C:

        out_i           = v_i cos(angle_hi) - v_{i + N/2} sin(angle_hi)
        out_{i + N/2}   = v_i sin(angle_hi) + v_{i + N/2} cos(angle_hi)

    and out_j = v_j in the other dimensions.

    Source: Lahoti et al. 2026 (arXiv 2603.15569), data-dependent rotary embeddings.

    Args:
      B: normalized input projections of each rank and group.
      C: normalized output projections, likewise.
      B_bias: added to B of each rank and head.
      C_bias: added to C, likewise.
      angle: in radians, of the first S <= N/2 pairs; sums up to a few thousand keep float32's digits.
      dtype: of the results; everything is computed in the dtype of B.
      implementation: "xla", "pallas_tpu" (TPU), "reference", or None for the platform's fastest.

    Returns:
      (B, C) of each head, differentiable in every array.

    Raises:
      UserError: shapes or sizes do not match, or the implementation does not exist or cannot run here.
    """
    inputs = Inputs(B, C, B_bias, C_bias, angle)
    if B.ndim != 5 or angle.ndim != 4 or angle.shape[2] % B.shape[3] or 2 * angle.shape[3] > B.shape[4]:
        raise UserError(f"rotary_embedding: B [B L R G N] and angle [B L H S] do not match: {B.shape}, {angle.shape}")
    length, biases = B.shape[1], (B.shape[2], angle.shape[2], B.shape[4])
    expected = {"C": B.shape, "B_bias": biases, "C_bias": biases, "angle": (*B.shape[:2], *angle.shape[2:])}
    check_shapes("rotary_embedding", inputs._asdict(), **expected)
    unsupported = {"pallas_tpu": dispatch.late(f"{_FOLDER}.pallas_tpu", "unsupported_reason", inputs)}
    prefer: dispatch.Implementation | None = "xla" if length < _MIN_KERNEL_TOKENS else None
    compute = dispatch.choose("rotary_embedding", implementation, _IMPLEMENTATIONS, unsupported, prefer=prefer)
    return compute(inputs, dtype)
