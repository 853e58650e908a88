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

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from biomamba_jax.config import ModelConfig
from biomamba_jax.model import initializers
from biomamba_jax.model.layers import RMSNorm, dense, row_parallel
from biomamba_jax.model.state import MixerState
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.numerics import accumulator_dtype
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
        rows, length = u.shape[:2]
        dtype = accumulator_dtype(u.dtype)
        dt = jax.nn.softplus(self.in_dt(u).astype(dtype) + self.dt_bias[...].astype(dtype))
        rate = jnp.maximum(_heavy_tail(self.in_A(u).astype(dtype)), self.a_floor)
        trap = jax.nn.sigmoid(self.in_trap(u).astype(dtype))

        turns = dt[..., None] * (math.pi * jnp.tanh(angle.astype(dtype)))[:, :, None]
        past = None if state is None or state.angle is None else state.angle.reshape(rows, -1)
        total = collectives.segment_cumsum(turns.reshape(rows, length, -1), segment_ids, past, 2 * math.pi)
        total = total.reshape(turns.shape)
        B, C = (
            self._rotated(v, norm, bias, total, collectives).astype(u.dtype)
            for v, norm, bias in zip(
                jnp.split(bc, 2, axis=-1), (self.norm_B, self.norm_C), (self.B_bias, self.C_bias), strict=True
            )
        )
        x = self.in_x(u).reshape(rows, length, 1, -1, self.headdim)
        if self.mimo_x is not None:
            x = (x * self._per_rank(self.mimo_x)).astype(u.dtype)
        y, ssm = self._scan(x, dt, dt * -rate, trap, B, C, state, segment_ids, collectives)

        z = self.in_z(u).reshape(rows, length, 1, -1, self.headdim).astype(y.dtype)
        if self.norm is not None:
            width = (rows, length, self.ranks, -1)
            y = self.norm(y.reshape(width), collectives=collectives).reshape(y.shape)
        if self.mimo_z is not None and self.mimo_o is not None:
            z = z * self._per_rank(self.mimo_z)
            y = y * self._per_rank(self.mimo_o)
        y = jnp.sum(y * jax.nn.silu(z), axis=2).reshape(rows, length, -1).astype(u.dtype)
        state = MixerState(ssm, angle=total[:, -1], last_x=x[:, -1], last_B=B[:, -1])
        return row_parallel(self.out, y, collectives), state

    def _rotated(
        self, v: Float[Array, "B L RGN"], norm: RMSNorm, bias: nnx.Param, angle: Array, collectives: Collectives
    ) -> Float[Array, "B L R H N"]:
        """Return B or C of each head: normalised, with the head's bias, rotated."""
        rows, length, heads = angle.shape[:3]
        v = norm(v.reshape(rows, length * self.ranks, self.groups, -1))
        v = collectives.local_groups(collectives.copy_to_tensor_parallel(v))
        v = v.reshape(rows, length, self.ranks, -1, 1, v.shape[-1])
        v = jnp.broadcast_to(v, (*v.shape[:4], heads // v.shape[3], v.shape[5])).reshape(*v.shape[:3], heads, -1)
        v = v + self._per_rank(bias)
        pairs, rotating = v.shape[-1] // 2, angle.shape[-1]
        left, right = v[..., :rotating], v[..., pairs : pairs + rotating]
        cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
        fixed = v[..., rotating:pairs], v[..., pairs + rotating :]
        return jnp.concatenate(
            [left * cos - right * sin, fixed[0], left * sin + right * cos, fixed[1]],
            axis=-1,
        )

    def _scan(
        self,
        x: Float[Array, "B L R H P"],
        dt: Float[Array, "B L H"],
        log_decay: Float[Array, "B L H"],
        trap: Float[Array, "B L H"],
        B: Float[Array, "B L R H N"],
        C: Float[Array, "B L R H N"],
        state: MixerState | None,
        segment_ids: Int[Array, "B L"] | None,
        collectives: Collectives,
    ) -> tuple[Float[Array, "B L R H P"], Float[Array, "B H P N"]]:
        """Return y of the module's recurrence and the state after the last token."""
        rows, length, ranks = x.shape[:3]
        here, from_last = trap * dt, (1 - trap) * dt
        weight = here + collectives.next_in_segment(from_last, segment_ids)
        initial = None
        if state is not None and state.last_x is not None and state.last_B is not None:
            term = jnp.einsum("brhp,brhn->bhpn", state.last_x, state.last_B, preferred_element_type=dt.dtype)
            initial = state.ssm + from_last[:, 0, :, None, None] * term

        def steps(v: Array) -> Array:  # the ranks of a token are steps one after the other
            return v.reshape(rows, length * ranks, *v.shape[3:])

        y, ssm = collectives.ssd(
            steps((x * weight[:, :, None, :, None]).astype(x.dtype)),
            None,
            steps(jnp.pad(log_decay[:, :, None], ((0, 0), (0, 0), (0, ranks - 1), (0, 0)))),
            steps(B),
            steps(C),
            segment_ids=None if segment_ids is None else jnp.repeat(segment_ids, ranks, axis=1),
            initial_state=initial,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        # So far rank r has read its token's ranks up to r, with the next step's weight; it reads all, with this one's.
        read = jnp.tril(jnp.ones((ranks, ranks), dt.dtype))
        missing = here[..., None, None] - weight[..., None, None] * read
        own = jnp.einsum("blrhn,blkhn->blhrk", C, B, preferred_element_type=dt.dtype) * missing
        own += self.D[...].astype(dt.dtype)[:, None, None] * jnp.eye(ranks, dtype=dt.dtype)
        return y.reshape(x.shape) + jnp.einsum("blhrk,blkhp->blrhp", own, x.astype(dt.dtype)), ssm

    @staticmethod
    def _per_rank(parameter: nnx.Param) -> Float[Array, "R H C"]:
        """Return a parameter of each head and rank in the axes of activations."""
        return parameter[...].swapaxes(0, 1)


def _heavy_tail(v: Array) -> Array:
    """Return 1 + v where v >= 0 and 1 / (1 - v) below: positive, with a continuous derivative."""
    return jnp.maximum(v, 0) + 1 / (1 - jnp.minimum(v, 0))
