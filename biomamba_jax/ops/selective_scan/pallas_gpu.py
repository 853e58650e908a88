"""The selective scan on Mosaic GPU, for Hopper and newer: two kernels, their padding, and the rule that joins them.

For the backward pass the forward kernel keeps the state before every 32 tokens, at d_state = 16 as many bytes as one
bfloat16 array like x, and nothing else: the backward kernel computes everything again.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from biomamba_jax.errors import UserError
from biomamba_jax.ops import dispatch, mosaic_gpu
from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.ops.kernel_arrays import pad, round_up, vary_alike
from biomamba_jax.ops.numerics import segment_starts
from biomamba_jax.ops.selective_scan import pallas_gpu_backward, pallas_gpu_forward
from biomamba_jax.ops.selective_scan import pallas_gpu_blocks as cut
from biomamba_jax.ops.selective_scan.inputs import FilledInputs, Inputs
from biomamba_jax.ops.selective_scan.pallas_gpu_blocks import Blocks, Parameters, Tokens

_WIDTH = 64  # channels of a block
_MOST_STATES_AT_WIDTH = 32  # a block of more has half the channels, as shared memory allows


def selective_scan(
    inputs: Inputs,
    *,
    interpret: Any = None,
) -> tuple[Float[Array, "B L E"], Float[Array, "B E N"]]:
    """All outputs and the last state; see `api.selective_scan`.

    Args:
      interpret: parameters of Pallas's interpreter for GPU, which needs no GPU and is slow. For tests.

    Raises:
      UserError: the kernels cannot compute these arrays, or not in this program.
    """
    if reason := why_not(inputs.x, inputs.A) or (None if interpret else dispatch.unavailable("pallas_gpu")):
        raise UserError(
            f"selective_scan: implementation 'pallas_gpu' cannot be used: {reason}; give implementation=None for the"
            " best one here"
        )
    return _scan(vary_alike(inputs.with_zeros()), interpret)


def why_not(x: Array, A: Array) -> str | None:
    """Why the kernels can't compute these arrays, if so."""
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"x is {x.dtype}, and it computes in float32"
    if A.shape[1] > cut.MOST_STATES:
        return f"d_state is {A.shape[1]}, more than {cut.MOST_STATES}"
    return None


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scan(inputs: FilledInputs, interpret: Any) -> tuple[Array, Array]:
    return _run(inputs, interpret, for_backward=False)[0]


def _forward(inputs: FilledInputs, interpret: Any):
    results, boundary = _run(inputs, interpret, for_backward=True)
    return results, (inputs, boundary)


def _run(inputs: FilledInputs, interpret: Any, for_backward: bool):
    blocks = _blocks(inputs)
    _, length, channels = inputs.x.shape
    tokens, parameters = _padded(inputs, blocks)
    arguments = pallas_gpu_forward.Inputs(tokens, parameters, _split_state(inputs.initial_state, blocks))
    out = pallas_gpu_forward.forward(arguments, blocks, for_backward, interpret)
    return (out.y[:, :length, :channels], _plain_state(out.final, inputs)), out.boundary


def _backward(interpret: Any, residuals, cotangents):
    inputs, boundary = residuals
    blocks = _blocks(inputs)
    _, length, channels = inputs.x.shape
    tokens, parameters = _padded(inputs, blocks)
    dy = pad(cotangents[0].astype(inputs.x.dtype), tokens.x.shape)
    arguments = pallas_gpu_backward.Inputs(tokens, parameters, dy, _split_state(cotangents[1], blocks), boundary)
    g = pallas_gpu_backward.backward(arguments, blocks, interpret)

    def narrow(v: Array, like: Array) -> Array:
        v = jnp.sum(v, axis=1)
        return v.reshape(*v.shape[:2], -1)[:, :length, : like.shape[2]].astype(like.dtype)

    def vector(v: Array, like: Array) -> Array:
        return jnp.sum(v, axis=0)[:channels].astype(like.dtype)

    return (
        FilledInputs(
            x=g.x[:, :length, :channels],
            dt=g.dt[:, :length, :channels],
            A=jnp.sum(_plain_state(g.A, inputs), axis=0).astype(inputs.A.dtype),
            B=narrow(g.B, inputs.B),
            C=narrow(g.C, inputs.C),
            D=vector(g.D, inputs.D),
            z=None if g.z is None else g.z[:, :length, :channels],
            dt_bias=vector(g.dt_bias, inputs.dt_bias),
            segment_ids=None,
            initial_state=_plain_state(g.initial, inputs).astype(inputs.initial_state.dtype),
        ),
    )


_scan.defvjp(_forward, _backward)


def _blocks(inputs: FilledInputs) -> Blocks:
    rows, length, channels = inputs.x.shape
    most = _WIDTH if inputs.A.shape[1] <= _MOST_STATES_AT_WIDTH else _WIDTH // 2
    width = min(most, round_up(channels, cut.GROUP))
    return Blocks(
        rows=rows,
        length=round_up(length, cut.CHUNK),
        channels=round_up(channels, width),
        quarters=round_up(inputs.A.shape[1], cut.STATES) // cut.VECTOR,
        width=width,
        gated=inputs.z is not None,
        segmented=inputs.segment_ids is not None,
    )


def _padded(inputs: FilledInputs, blocks: Blocks) -> tuple[Tokens, Parameters]:
    """Tokens are filled up with steps of softplus(-infinity) = 0, which leave the state as it is."""
    wide = (blocks.rows, blocks.length, blocks.channels)
    narrow = (blocks.rows, blocks.length, blocks.d_state)
    A = inputs.A.astype(jnp.float32)
    reset = None
    if inputs.segment_ids is not None:
        A = jnp.minimum(A, cut.WEAKEST_A)
        steps = jnp.where(segment_starts(inputs.segment_ids), cut.RESET_STEP, 0.0)
        reset = pad(steps.astype(jnp.float32), narrow[:2])
    A = pad(A, (blocks.channels, blocks.d_state), fill=-1)
    tokens = Tokens(
        x=pad(inputs.x, wide),
        dt=pad(inputs.dt, wide, fill=-jnp.inf),
        z=None if inputs.z is None else pad(inputs.z, wide),
        B=pad(inputs.B, narrow),
        C=pad(inputs.C, narrow),
        reset=reset,
    )
    parameters = Parameters(
        A_log2e=(A * mosaic_gpu.LOG2_E).reshape(blocks.channels, blocks.quarters, cut.VECTOR),
        D=pad(inputs.D.astype(jnp.float32), (blocks.channels,)),
        dt_bias=pad(inputs.dt_bias.astype(jnp.float32), (blocks.channels,)),
    )
    return tokens, parameters


def _split_state(state: Float[Array, "B E N"], blocks: Blocks) -> Float[Array, "B E Q 4"]:
    padded = pad(state.astype(jnp.float32), (blocks.rows, blocks.channels, blocks.d_state))
    return padded.reshape(blocks.rows, blocks.channels, blocks.quarters, cut.VECTOR)


def _plain_state(state: Float[Array, "B E Q 4"], inputs: FilledInputs) -> Float[Array, "B E N"]:
    plain = state.reshape(*state.shape[:2], -1)
    return plain[:, : inputs.A.shape[0], : inputs.A.shape[1]]
