"""How the Mosaic GPU kernels of the selective scan cut up the work, and what both directions share.

A block is one warpgroup and owns `width` channels of one row of the batch. A thread holds four states of one channel in
every 32: the states of a channel lie in four threads (more registers where d_state is above 16), so that four times as
many warps share the work as with a channel a thread, and a step reads its four B and four C in one load each. Softplus,
skip and gate need no states and are computed for a whole chunk at once, a channel a thread.

Sums over d_state are put off: a thread stores the sum of its own four, and those are added up for many steps at once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from biomamba_jax.ops import mosaic_gpu
from biomamba_jax.ops.array_typing import Array

CHUNK = 32  # time steps that lie in shared memory at once, and between two states that are kept
GROUP = 32  # channels of a warpgroup whose states lie side by side in its threads
VECTOR = 4  # states of a channel in one thread
STATES = 16  # d_state is padded to a multiple
MOST_STATES = 64  # more would not fit into registers

# The exponent delta A of a step into a new segment becomes -infinity in all but name, and its decay exactly 0: the
# reset costs nothing inside the loop. Infinity itself would make NaN of 0 * delta in the gradient by A.
RESET_STEP = 1e33
WEAKEST_A = -1e-30  # with segments: a decay rate of 0 could not be overcome by any step

# States [32 Q 4]: a warp has 8 channels, a lane one of four quarters Q.
STATE = plgpu.Layout.TILED(plgpu.Tiling(((32, 4, 4), (8, 4, 4))), warp_dims=(-6,), lane_dims=(-3, -2), vector_dim=-1)
CHANNEL = STATE.reduce((1, 2))  # [32]
NARROW = STATE.reduce(0)  # [Q 4], the same for all channels
# Sums over a thread's four states, for many steps [T C Q]: a warp has one step, a lane one channel.
PARTIAL = plgpu.Layout.TILED(plgpu.Tiling(((4, 32, 4),)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
TOKEN = PARTIAL.reduce(2)  # [T C]
VECTOR_OF_CHANNELS = TOKEN.reduce(0)  # [C]
VECTOR_OF_STEPS = TOKEN.reduce(1)  # [T]


class Blocks(NamedTuple):
    """Sizes of padded arrays; static."""

    rows: int
    length: int  # a multiple of CHUNK
    channels: int  # a multiple of width
    quarters: int  # d_state / 4, a multiple of 4
    width: int  # channels of a block, a multiple of 32
    gated: bool
    segmented: bool

    @property
    def d_state(self) -> int:
        return self.quarters * VECTOR

    @property
    def chunks(self) -> int:
        return self.length // CHUNK

    @property
    def tiles(self) -> int:
        return self.channels // self.width

    @property
    def groups(self) -> int:
        return self.width // GROUP

    @property
    def grid(self) -> dict[str, int]:
        return {"row": self.rows, "tile": self.tiles}

    @property
    def state(self) -> tuple[int, int, int]:
        """Shape of the states of one group of channels."""
        return GROUP, self.quarters, VECTOR


class Tokens(NamedTuple):
    """Padded inputs that differ from token to token."""

    x: Any  # [B L E]
    dt: Any  # [B L E]
    z: Any  # [B L E] or None
    B: Any  # [B L N]
    C: Any  # [B L N]
    reset: Any  # [B L] float32: what is added to delta in the exponent, 0 or RESET_STEP; None without segments


class Parameters(NamedTuple):
    """Padded parameters, float32."""

    A_log2e: Any  # [E Q 4]: exp(delta A) = exp2(delta A_log2e)
    D: Any  # [E]
    dt_bias: Any  # [E]


def smem(*shape: int, dtype: Any = jnp.float32) -> Any:
    return plgpu.SMEM(shape, dtype)


def token_buffers(tokens: Tokens, blocks: Blocks, slots: int) -> Tokens:
    """Shared memory for `slots` chunks of the tokens of a block."""

    def like(v: Array | None, *shape: int) -> Any:
        return None if v is None else smem(slots, CHUNK, *shape, dtype=v.dtype)

    return Tokens(
        x=like(tokens.x, blocks.width),
        dt=like(tokens.dt, blocks.width),
        z=like(tokens.z, blocks.width),
        B=like(tokens.B, blocks.d_state),
        C=like(tokens.C, blocks.d_state),
        reset=like(tokens.reset),
    )


def of_slot(buffers: Tokens, slot: Any) -> Tokens:
    return Tokens(*(None if buffer is None else buffer.at[slot] for buffer in buffers))


def fetch(tokens: Tokens, buffers: Tokens, barrier: Any, row: Any, chunk: Any, channels: Any) -> None:
    """Starts the copies of a chunk of a block's channels into one slot; each arrives at the barrier."""
    time = mosaic_gpu.ds(chunk, CHUNK)
    for name, buffer in buffers._asdict().items():
        if buffer is not None:
            where = (row, time, channels) if name in ("x", "dt", "z") else (row, time)
            plgpu.copy_gmem_to_smem(getattr(tokens, name).at[where], buffer, barrier)


def copies(tokens: Tokens) -> int:
    """How many `fetch` starts."""
    return len(jax.tree.leaves(tokens))


def group(j: int) -> Any:
    """The channels of group j of a block."""
    return slice(j * GROUP, (j + 1) * GROUP)


def spread_channels(v: Array, blocks: Blocks) -> Array:
    """[32] -> [32 Q 4]."""
    return mosaic_gpu.broadcast(v, blocks.state, (0,), STATE)


def read_channels(ref: Any, t: Any, j: int, blocks: Blocks) -> Array:
    """The value of each channel at step t, for each of its states."""
    return spread_channels(mosaic_gpu.lay(ref[t, group(j)], CHANNEL), blocks)


def read_narrow(ref: Any, t: Any, blocks: Blocks) -> Array:
    """The d_state values of step t, for each channel."""
    return mosaic_gpu.broadcast(mosaic_gpu.lay(ref[t], NARROW), blocks.state, (1, 2), STATE)


def read_states(ref: Any, first: Any, blocks: Blocks) -> list[Array]:
    """The states of a block's groups from [E Q 4] in global memory; `first`: the block's first channel."""
    return [mosaic_gpu.read(ref.at[_channels(first, j)], STATE) for j in range(blocks.groups)]


def write_states(ref: Any, first: Any, states: list[Array]) -> None:
    for j, state in enumerate(states):
        ref[_channels(first, j)] = state


def _channels(first: Any, j: int) -> Any:
    return pl.ds(first + j * GROUP, GROUP)


def read_tokens(ref: Any) -> Array:
    """[T C] in float32."""
    return mosaic_gpu.lay(ref[...], TOKEN).astype(jnp.float32)


def over_steps(v: Array, steps: int) -> Array:
    """A value of each channel for each of `steps`: [C] -> [T C]."""
    return mosaic_gpu.broadcast(v, (steps, v.shape[0]), (1,), TOKEN)


def over_channels(v: Array, width: int) -> Array:
    """A value of each step for each channel: [T] -> [T C]."""
    return mosaic_gpu.broadcast(v, (v.shape[0], width), (0,), TOKEN)


def sum_partials(ref: Any) -> Array:
    """The put-off last part of sums over d_state: [T C Q] -> [T C]."""
    return jnp.sum(mosaic_gpu.read(ref, PARTIAL), axis=2)


def prepare(tokens: Tokens, bias: Array, scratch: Any, blocks: Blocks) -> None:
    """What the steps of a chunk read, in float32: delta, the exponents' steps, u = delta x, B and C."""
    delta = mosaic_gpu.softplus(read_tokens(tokens.dt) + over_steps(bias, CHUNK))
    scratch.delta[...] = delta
    if scratch.exponent_step is not None:
        reset = mosaic_gpu.lay(tokens.reset[...], VECTOR_OF_STEPS)
        scratch.exponent_step[...] = delta + over_channels(reset, blocks.width)
    scratch.u[...] = delta * read_tokens(tokens.x)
    for source, target in ((tokens.B, scratch.B), (tokens.C, scratch.C)):
        target[...] = source[...].reshape(target.shape).astype(jnp.float32)


def unrolled(steps: int, at_once: int, step: Any, carry: Any) -> Any:
    """step(t, carry) for t = 0, 1, .., `at_once` of them in one turn of the loop."""

    def turn(i: Any, carry: Any) -> Any:
        for k in range(at_once):
            carry = step(i * at_once + k, carry)
        return carry

    return lax.fori_loop(0, steps // at_once, turn, carry)
