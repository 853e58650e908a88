"""Blocking of the Mosaic GPU kernels of the selective scan, and the operations that both directions share.

A block is one warpgroup and owns `width` channels of one row of the batch. A thread holds four states of one channel in
every 32: the states of a channel are in four threads (more registers where d_state is above 16), so that four times as
many warps share the work as with one thread per channel, and a step reads its four B and four C in one load each.
Softplus, skip and gate need no states and are computed for a whole chunk at once, one thread per channel.

Sums over d_state are deferred: a thread stores the sum of its own four, and those are reduced for many steps at once.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from biomamba_jax.ops import mosaic_gpu
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.selective_scan.pallas_arrays import Parameters, Tokens

CHUNK = 32  # time steps in shared memory at once, and between two saved states
GROUP = 32  # channels whose states fill one layout of a warpgroup
VECTOR = 4  # states of a channel in one thread
STATES = 16  # d_state is padded to a multiple of it
MAX_STATES = 64  # more would not fit into registers

# States [32 Q 4]: a warp has 8 channels, a lane one of four quarters Q.
STATE = plgpu.Layout.TILED(plgpu.Tiling(((32, 4, 4), (8, 4, 4))), warp_dims=(-6,), lane_dims=(-3, -2), vector_dim=-1)
CHANNEL = STATE.reduce((1, 2))  # [32]
PER_STATE = STATE.reduce(0)  # [Q 4], replicated over channels
# Sums over a thread's four states, for many steps [T C Q]: a warp has one step, a lane one channel.
PARTIAL = plgpu.Layout.TILED(plgpu.Tiling(((4, 32, 4),)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
TOKEN = PARTIAL.reduce(2)  # [T C]
VECTOR_OF_CHANNELS = TOKEN.reduce(0)  # [C]
VECTOR_OF_STEPS = TOKEN.reduce(1)  # [T]


class Blocks(NamedTuple):
    """Sizes of padded arrays; static."""

    rows: int
    """Rows of the batch."""
    length: int
    """A multiple of CHUNK."""
    channels: int
    """A multiple of width."""
    quarters: int
    """d_state / 4, a multiple of 4."""
    width: int
    """Channels of a block, a multiple of 32."""
    gated: bool
    """True if there is a gate z."""
    segmented: bool
    """True if there are segment ids."""

    @property
    def d_state(self) -> int:
        """Padded d_state."""
        return self.quarters * VECTOR

    @property
    def chunks(self) -> int:
        """Chunks of a row."""
        return self.length // CHUNK

    @property
    def tiles(self) -> int:
        """Blocks of channels."""
        return self.channels // self.width

    @property
    def groups(self) -> int:
        """Groups of 32 channels in a block."""
        return self.width // GROUP

    @property
    def grid(self) -> dict[str, int]:
        """One block per row and tile."""
        return {"row": self.rows, "tile": self.tiles}

    @property
    def state(self) -> tuple[int, int, int]:
        """Shape of the states of one group of channels [32 Q 4]."""
        return GROUP, self.quarters, VECTOR


def smem(*shape: int, dtype: Any = jnp.float32) -> Any:
    """Return a shared-memory allocation."""
    return plgpu.SMEM(shape, dtype)


def token_buffers(tokens: Tokens, blocks: Blocks, slots: int) -> Tokens:
    """Return shared memory for `slots` chunks of a block's tokens."""

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


def fetch(tokens: Tokens, buffers: Tokens, barrier: Any, row: Any, chunk: Any, channels: Any) -> None:
    """Start the copies of a chunk of a block's channels into one slot; each arrives at the barrier."""
    time = mosaic_gpu.ds(chunk, CHUNK)
    for name, buffer in buffers._asdict().items():
        if buffer is not None:
            where = (row, time, channels) if name in ("x", "dt", "z") else (row, time)
            plgpu.copy_gmem_to_smem(getattr(tokens, name).at[where], buffer, barrier)


def copies(tokens: Tokens) -> int:
    """Return the number of copies that `fetch` starts."""
    return len(jax.tree.leaves(tokens))


def group(j: int) -> Any:
    """Return the slice of a block's channels that is group j."""
    return slice(j * GROUP, (j + 1) * GROUP)


def read_channels(ref: Any, t: Any, j: int, blocks: Blocks) -> Array:
    """Read the value of each channel at step t, broadcast to its states."""
    return mosaic_gpu.broadcast(mosaic_gpu.to_layout(ref[t, group(j)], CHANNEL), blocks.state, (0,), STATE)


def read_per_state(ref: Any, t: Any, blocks: Blocks) -> Array:
    """Read the d_state values of step t, broadcast to the channels."""
    return mosaic_gpu.broadcast(mosaic_gpu.to_layout(ref[t], PER_STATE), blocks.state, (1, 2), STATE)


def read_states(ref: Any, first: Any, blocks: Blocks) -> list[Array]:
    """Read the states of a block's groups from [E Q 4] in global memory; `first` is the block's first channel."""
    return [mosaic_gpu.read(ref.at[_channels(first, j)], STATE) for j in range(blocks.groups)]


def read_parameters(parameters: Parameters, first: Any, blocks: Blocks) -> tuple[list[Array], Array, Array]:
    """Read A_log2e as states, dt_bias and D of a block's channels."""
    channels = pl.ds(first, blocks.width)
    A_log2e = read_states(parameters.A_log2e, first, blocks)
    bias, skip = (mosaic_gpu.read(v.at[channels], VECTOR_OF_CHANNELS) for v in (parameters.dt_bias, parameters.D))
    return A_log2e, bias, skip


def exponent_step(scratch: Any) -> Any:
    """Return the buffer of the steps in the exponents: delta + reset, or delta without segments."""
    return scratch.delta if scratch.exponent_step is None else scratch.exponent_step


def write_states(ref: Any, first: Any, states: list[Array]) -> None:
    """Write the states of a block's groups to [E Q 4] in global memory."""
    for j, state in enumerate(states):
        ref[_channels(first, j)] = state


def _channels(first: Any, j: int) -> Any:
    return pl.ds(first + j * GROUP, GROUP)


def read_tokens(ref: Any) -> Array:
    """Read [T C] as float32."""
    return mosaic_gpu.to_layout(ref[...], TOKEN).astype(jnp.float32)


def over_steps(v: Array, steps: int) -> Array:
    """Broadcast per-channel values over the steps: [C] -> [T C]."""
    return mosaic_gpu.broadcast(v, (steps, v.shape[0]), (1,), TOKEN)


def sum_partials(ref: Any) -> Array:
    """Finish the sums over d_state: [T C Q] -> [T C]."""
    return jnp.sum(mosaic_gpu.read(ref, PARTIAL), axis=2)


def prepare(tokens: Tokens, bias: Array, scratch: Any, blocks: Blocks) -> None:
    """Compute what the steps of a chunk read, in float32: delta, the exponents' steps, u = delta x, B and C."""
    delta = mosaic_gpu.softplus(read_tokens(tokens.dt) + over_steps(bias, CHUNK))
    scratch.delta[...] = delta
    if scratch.exponent_step is not None:
        reset = mosaic_gpu.to_layout(tokens.reset[...], VECTOR_OF_STEPS)
        scratch.exponent_step[...] = delta + mosaic_gpu.broadcast(reset, delta.shape, (0,), TOKEN)
    scratch.u[...] = delta * read_tokens(tokens.x)
    for source, target in ((tokens.B, scratch.B), (tokens.C, scratch.C)):
        target[...] = source[...].reshape(target.shape).astype(jnp.float32)


def unrolled(steps: int, unroll: int, step: Any, carry: Any) -> Any:
    """Run step(t, carry) for t = 0, 1, ..., `unroll` of them per loop iteration."""

    def iteration(i: Any, carry: Any) -> Any:
        for k in range(unroll):
            carry = step(i * unroll + k, carry)
        return carry

    return lax.fori_loop(0, steps // unroll, iteration, carry)
