"""The selective scan on Mosaic GPU, for Hopper: padding and layouts of the two kernels, and their custom_vjp.

The only residual besides the inputs is the state before every chunk of 32 tokens, at d_state = 16 as many bytes as one
bfloat16 array like x: the backward kernel recomputes the rest.
"""

from typing import Any

import jax.numpy as jnp

from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.kernel_arrays import differentiable, pad, round_up, vary_alike
from biomamba_jax.ops.selective_scan import pallas_gpu_backward, pallas_gpu_forward
from biomamba_jax.ops.selective_scan import pallas_gpu_blocks as common
from biomamba_jax.ops.selective_scan.inputs import FilledInputs, Inputs
from biomamba_jax.ops.selective_scan.pallas_arrays import Parameters, Tokens, padded
from biomamba_jax.ops.selective_scan.pallas_gpu_blocks import Blocks

_WIDTH = 64  # channels of a block
_MAX_STATES_AT_WIDTH = 32  # with more, a block has half the channels, to fit into shared memory


def selective_scan(
    inputs: Inputs,
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """Return all outputs and the final state; see `api.selective_scan`.

    Args:
      inputs: the arrays.
      interpret: parameters of Pallas's interpreter for GPU, which is slow and needs no GPU. For tests.
    """
    return _scan(vary_alike(inputs.with_zeros()), interpret)


def unsupported_reason(x: Array, A: Array) -> str | None:
    """Return why the kernels cannot compute these arrays, or None if they can."""
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"x is {x.dtype}, and it computes in float32"
    if A.shape[1] > common.MAX_STATES:
        return f"d_state is {A.shape[1]}, more than {common.MAX_STATES}"
    return None


def _run(inputs: FilledInputs, interpret: Any, save: bool):
    blocks = _blocks(inputs)
    _, length, channels = inputs.x.shape
    tokens, parameters = _arrays(inputs, blocks)
    arguments = pallas_gpu_forward.Inputs(tokens, parameters, _split_state(inputs.initial_state, blocks))
    out = pallas_gpu_forward.forward(arguments, blocks, save, interpret)
    final = _merge_quarters(out.final)[:, : inputs.A.shape[0], : inputs.A.shape[1]]
    return (out.y[:, :length, :channels], final), out.boundary


def _backward(inputs: FilledInputs, boundary: Array, cotangents, interpret: Any) -> FilledInputs:
    blocks = _blocks(inputs)
    tokens, parameters = _arrays(inputs, blocks)
    dy = pad(cotangents[0].astype(inputs.x.dtype), tokens.x.shape)
    arguments = pallas_gpu_backward.Inputs(tokens, parameters, dy, _split_state(cotangents[1], blocks), boundary)
    g = pallas_gpu_backward.backward(arguments, blocks, interpret)
    dB, dC = (_merge_quarters(jnp.sum(v, axis=1)) for v in (g.B, g.C))
    return inputs.crop(g._replace(A=_merge_quarters(g.A), B=dB, C=dC, initial=_merge_quarters(g.initial)))


_scan = differentiable(_run, _backward)


def _blocks(inputs: FilledInputs) -> Blocks:
    rows, length, channels = inputs.x.shape
    widest = _WIDTH if inputs.A.shape[1] <= _MAX_STATES_AT_WIDTH else _WIDTH // 2
    width = min(widest, round_up(channels, common.GROUP))
    return Blocks(
        rows=rows,
        length=round_up(length, common.CHUNK),
        channels=round_up(channels, width),
        quarters=round_up(inputs.A.shape[1], common.STATES) // common.VECTOR,
        width=width,
        gated=inputs.z is not None,
        segmented=inputs.segment_ids is not None,
    )


def _arrays(inputs: FilledInputs, blocks: Blocks) -> tuple[Tokens, Parameters]:
    """Pad the inputs; A becomes [E Q 4]."""
    tokens, parameters = padded(inputs, blocks.length, blocks.channels, blocks.d_state)
    A_log2e = parameters.A_log2e.reshape(blocks.channels, blocks.quarters, common.VECTOR)
    return tokens, parameters._replace(A_log2e=A_log2e)


def _split_state(state: Float[Array, "B E N"], blocks: Blocks) -> Float[Array, "B padded_E Q 4"]:
    state = pad(state.astype(jnp.float32), (blocks.rows, blocks.channels, blocks.d_state))
    return state.reshape(blocks.rows, blocks.channels, blocks.quarters, common.VECTOR)


def _merge_quarters(v: Float[Array, "B rows Q 4"]) -> Float[Array, "B rows padded_N"]:
    return v.reshape(*v.shape[:2], -1)
