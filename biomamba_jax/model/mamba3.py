"""The Mamba-3 mixer: Lahoti et al. 2026 (arXiv 2603.15569).

With a_t = exp(dt_t A_t), R ranks (one in SISO) and the trapezoidal rule, which weighs the input at both ends of a step,

    S_t = a_t (S_{t-1} + (1 - trap_t) dt_t sum_r x_{t-1,r} B_{t-1,r}^T) + trap_t dt_t sum_r x_{t,r} B_{t,r}^T
    y_{t,r} = S_t C_{t,r} + D x_{t,r}

B and C are rotated by an angle that accumulates over time: a complex decay. If each input enters with its weights in
this step and in the next, all of it is one call of `ssd` with a head's own B and C, in which the ranks of a token are
steps without decay; only what a token reads of itself needs correcting. No convolution is needed.

Projections that are one matrix in the released weights are separate parameters here, as in Mamba-2, and the dimensions
that rotate as a pair are N / 2 apart, also those that are neighbours in released SISO weights; `interop` reorders them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from biomamba_jax.config import ModelConfig
from biomamba_jax.model import initializers
from biomamba_jax.model.layers import RMSNorm, dense, row_parallel
from biomamba_jax.model.state import MixerState
from biomamba_jax.ops import rotary_embedding
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.numerics import accumulator_dtype, broadcast_merged
from biomamba_jax.parallel.collectives import UNSHARDED, Collectives


class Mamba3Mixer(nnx.Module):
    """z, x, B, C, dt, A, trap, angle = in(u); B, C = rotate(norm(B, C) + bias, angle); out(ssd(x, B, C) * silu(z))."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, heads, ranks, d_state = config.d_inner, config.n_heads, config.n_ranks, config.state_size
        self.in_z = dense(config.d_model, width, dtype=dtype, rngs=rngs)
        self.in_x = dense(config.d_model, width, dtype=dtype, rngs=rngs)
        self.in_bc = dense(config.d_model, 2 * ranks * config.n_groups * d_state, dtype=dtype, rngs=rngs)
        self.in_dt = dense(config.d_model, heads, dtype=dtype, rngs=rngs)
        self.in_A = dense(config.d_model, heads, dtype=dtype, rngs=rngs)
        self.in_trap = dense(config.d_model, heads, dtype=dtype, rngs=rngs)
        self.in_angle = dense(config.d_model, config.n_angles, dtype=dtype, rngs=rngs)
        self.dt_bias = nnx.Param(initializers.dt_bias(rngs.params(), (heads,)))
        self.norm_B = RMSNorm(d_state, eps=config.norm_eps, dtype=accumulator_dtype(dtype))
        self.norm_C = RMSNorm(d_state, eps=config.norm_eps, dtype=accumulator_dtype(dtype))
        self.B_bias = nnx.Param(jnp.ones((heads, ranks, d_state)))
        self.C_bias = nnx.Param(jnp.ones((heads, ranks, d_state)))
        self.D = nnx.Param(jnp.ones(heads))
        mimo, ones = config.mimo_rank is not None, jnp.ones((heads, ranks, config.headdim))
        self.mimo_x = nnx.Param(ones / ranks) if mimo else None
        self.mimo_z = nnx.Param(ones) if mimo else None
        self.mimo_o = nnx.Param(ones / ranks) if mimo else None
        norm = RMSNorm(width, eps=config.norm_eps, groups=heads, dtype=accumulator_dtype(dtype))
        self.norm = norm if config.outproj_norm else None
        self.out = dense(width, config.d_model, scale=config.n_layers**-0.5, dtype=dtype, rngs=rngs)
        self.ranks, self.groups, self.headdim = ranks, config.n_groups, config.headdim
        self.a_floor, self.chunk_size, self.implementation = config.a_floor, config.chunk_size, config.implementation

    def __call__(
        self,
        u: Float[Array, "B L D"],
        state: MixerState | None,
        segment_ids: Int[Array, "B L"] | None,
        collectives: Collectives = UNSHARDED,
    ) -> tuple[Float[Array, "B L D"], MixerState]:
        """Return the mixer's output and the state after the last token; see `LanguageModel.hidden`."""
        # Every device along tensor computes the angles and B and C of all groups; heads are sharded.
        bc, angle = self.in_bc(u), collectives.copy_to_tensor_parallel(self.in_angle(u))
        u = collectives.copy_to_tensor_parallel(u)
        of_heads = self.in_z(u), self.in_x(u), self.in_dt(u), self.in_A(u), self.in_trap(u)
        y, state = self.mix(*of_heads, bc, angle, state, segment_ids, collectives)
        return row_parallel(self.out, y, collectives), state

    def mix(
        self,
        z: Float[Array, "B L HP"],
        x: Float[Array, "B L HP"],
        dt: Float[Array, "B L H"],
        A: Float[Array, "B L H"],
        trap: Float[Array, "B L H"],
        bc: Float[Array, "B L RGN2"],
        angle: Float[Array, "B L S"],
        state: MixerState | None,
        segment_ids: Int[Array, "B L"] | None,
        collectives: Collectives = UNSHARDED,
    ) -> tuple[Float[Array, "B L HP"], MixerState]:
        """Return what the output projection reads, from the input projections' results, and the state."""
        rows, length, heads = dt.shape
        compute_dtype, dtype = x.dtype, accumulator_dtype(x.dtype)
        dt = jax.nn.softplus(dt.astype(dtype) + self.dt_bias[...].astype(dtype))
        log_decay = -dt * jnp.maximum(_heavy_tail(A.astype(dtype)), self.a_floor)
        trap = jax.nn.sigmoid(trap.astype(dtype))
        here, from_last = trap * dt, (1 - trap) * dt
        weight = here + collectives.next_in_segment(from_last, segment_ids)

        angles, speed = angle.shape[2], math.pi * jnp.tanh(angle.astype(dtype))
        turns = broadcast_merged(dt[..., None], heads, angles) * broadcast_merged(speed[:, :, None], heads, angles)
        past = None if state is None or state.angle is None else state.angle.reshape(rows, -1)
        total = collectives.segment_cumsum(turns, segment_ids=segment_ids, initial=past, period=2 * math.pi)
        total = total.reshape(rows, length, heads, angles)
        B, C, own = self._rotated(bc, total, compute_dtype, collectives)
        x, z = x[:, :, None], z[:, :, None].astype(dtype)
        if self.mimo_x is not None:
            x = (x * _merged(self.mimo_x)).astype(compute_dtype)
        initial = None
        if state is not None and state.last_x is not None and state.last_B is not None:
            term = jnp.einsum("brhp,brhn->bhpn", state.last_x, state.last_B, preferred_element_type=dtype)
            initial = state.ssm + from_last[:, 0, :, None, None] * term

        def of_channels(v: Float[Array, "*batch H"]) -> Float[Array, "*batch HP"]:
            return broadcast_merged(v[..., None], heads, self.headdim)

        def steps(v: Array) -> Array:  # the ranks of a token are steps one after the other
            return v.reshape(rows, length * self.ranks, heads, -1)

        y, ssm = collectives.ssd(
            steps((x * of_channels(weight)[:, :, None]).astype(compute_dtype)),
            None,
            jnp.pad(log_decay[:, :, None], ((0, 0), (0, 0), (0, self.ranks - 1), (0, 0))).reshape(rows, -1, heads),
            steps(B),
            steps(C),
            segment_ids=None if segment_ids is None else jnp.repeat(segment_ids, self.ranks, axis=1),
            initial_state=initial,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        # So far rank r has read its token's ranks up to r, with the next step's weight; it reads all, with this one's.
        read = jnp.tril(jnp.ones((self.ranks, self.ranks), dtype))[..., None]
        own = own * (here[:, :, None, None] - weight[:, :, None, None] * read)
        own += self.D[...].astype(dtype) * jnp.eye(self.ranks, dtype=dtype)[..., None]
        y = y.reshape(x.shape).astype(dtype)
        for k in range(self.ranks):
            y += of_channels(own[:, :, :, k]) * x[:, :, k : k + 1]

        if self.norm is not None:
            y = self.norm(y, collectives=collectives)
        if self.mimo_z is not None and self.mimo_o is not None:
            z, y = z * _merged(self.mimo_z), y * _merged(self.mimo_o)
        y = jnp.sum(y * jax.nn.silu(z), axis=2).astype(compute_dtype)
        last_x = x[:, -1].reshape(rows, self.ranks, heads, -1)
        return y, MixerState(ssm, angle=total[:, -1], last_x=last_x, last_B=B[:, -1])

    def _rotated(
        self, bc: Float[Array, "B L RGN2"], angle: Float[Array, "B L H S"], dtype: DTypeLike, collectives: Collectives
    ) -> tuple[Float[Array, "B L R H N"], Float[Array, "B L R H N"], Float[Array, "B L R R H"]]:
        """Return B and C of each head, and C_r . B_k of each token and head, which the rotation leaves unchanged."""

        def of_groups(v: Float[Array, "B L RGN"], norm: RMSNorm) -> Float[Array, "B L R g N"]:
            v = norm(v.reshape(*v.shape[:2], self.ranks, self.groups, -1))
            return collectives.local_groups(collectives.copy_to_tensor_parallel(v))

        B, C = map(of_groups, jnp.split(bc, 2, axis=-1), (self.norm_B, self.norm_C))
        B_bias, C_bias = (bias[...].swapaxes(0, 1) for bias in (self.B_bias, self.C_bias))
        b, c = (v.reshape(self.ranks, B.shape[3], -1, B.shape[4]).astype(B.dtype) for v in (B_bias, C_bias))
        dot = functools.partial(jnp.einsum, precision="highest")
        own = dot("blrgn,blkgn->blrkg", C, B)[..., None] + dot("rghn,kghn->rkgh", c, b)
        own += dot("blrgn,kghn->blrkgh", C, b) + dot("rghn,blkgn->blrkgh", c, B)
        B, C = rotary_embedding(B, C, B_bias, C_bias, angle, dtype=dtype, implementation=self.implementation)
        return B, C, own.reshape(*own.shape[:4], -1)


def _merged(parameter: nnx.Param) -> Float[Array, "R HP"]:
    """Return a parameter of each head, rank and channel [H R P] in the axes of x."""
    v = parameter[...].swapaxes(0, 1)
    return v.reshape(v.shape[0], -1)


def _heavy_tail(v: Array) -> Array:
    """Return 1 + v where v >= 0 and 1 / (1 - v) below: positive, with a continuous derivative."""
    return jnp.maximum(v, 0) + 1 / (1 - jnp.minimum(v, 0))
