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
        rate = jnp.maximum(_heavy_tail(A.astype(dtype)), self.a_floor)
        trap = jax.nn.sigmoid(trap.astype(dtype))

        angles, speed = angle.shape[2], math.pi * jnp.tanh(angle.astype(dtype))
        turns = broadcast_merged(dt[..., None], heads, angles) * broadcast_merged(speed[:, :, None], heads, angles)
        past = None if state is None or state.angle is None else state.angle.reshape(rows, -1)
        total = collectives.segment_cumsum(turns, segment_ids, past, 2 * math.pi).reshape(rows, length, heads, angles)
        B, C = (
            self._of_groups(v, norm, collectives)
            for v, norm in zip(jnp.split(bc, 2, axis=-1), (self.norm_B, self.norm_C), strict=True)
        )
        biases = self._per_rank(self.B_bias), self._per_rank(self.C_bias)
        own = _own_products(B, C, *biases)
        B, C = rotary_embedding(B, C, *biases, total, dtype=compute_dtype, implementation=self.implementation)
        x, z = x[:, :, None], z[:, :, None].astype(dtype)
        if self.mimo_x is not None:
            x = (x * self._merged(self.mimo_x)).astype(compute_dtype)
        y, ssm = self._scan(x, dt, dt * -rate, trap, B, C, own, state, segment_ids, collectives)

        if self.norm is not None:
            y = self.norm(y, collectives=collectives)
        if self.mimo_z is not None and self.mimo_o is not None:
            z = z * self._merged(self.mimo_z)
            y = y * self._merged(self.mimo_o)
        y = jnp.sum(y * jax.nn.silu(z), axis=2).astype(compute_dtype)
        last_x = x[:, -1].reshape(rows, self.ranks, heads, -1)
        return y, MixerState(ssm, angle=total[:, -1], last_x=last_x, last_B=B[:, -1])

    def _of_groups(self, v: Float[Array, "B L RGN"], norm: RMSNorm, collectives: Collectives) -> Array:
        """Return B or C [B L R G N] of this device's groups, normalized."""
        rows, length = v.shape[:2]
        v = norm(v.reshape(rows, length * self.ranks, self.groups, -1))
        v = collectives.local_groups(collectives.copy_to_tensor_parallel(v))
        return v.reshape(rows, length, self.ranks, *v.shape[2:])

    def _scan(
        self,
        x: Float[Array, "B L R HP"],
        dt: Float[Array, "B L H"],
        log_decay: Float[Array, "B L H"],
        trap: Float[Array, "B L H"],
        B: Float[Array, "B L R H N"],
        C: Float[Array, "B L R H N"],
        own: Float[Array, "B L R R H"],
        state: MixerState | None,
        segment_ids: Int[Array, "B L"] | None,
        collectives: Collectives,
    ) -> tuple[Float[Array, "B L R HP"], Float[Array, "B H P N"]]:
        """Return y of the module's recurrence and the state after the last token; `own` is C_r . B_k of each token."""
        rows, length, ranks = x.shape[:3]
        heads = dt.shape[2]
        here, from_last = trap * dt, (1 - trap) * dt
        weight = here + collectives.next_in_segment(from_last, segment_ids)
        initial = None
        if state is not None and state.last_x is not None and state.last_B is not None:
            term = jnp.einsum("brhp,brhn->bhpn", state.last_x, state.last_B, preferred_element_type=dt.dtype)
            initial = state.ssm + from_last[:, 0, :, None, None] * term

        def of_channels(v: Float[Array, "*batch H"]) -> Float[Array, "*batch HP"]:
            return broadcast_merged(v[..., None], heads, self.headdim)

        def steps(v: Array) -> Array:  # the ranks of a token are steps one after the other
            return v.reshape(rows, length * ranks, heads, -1)

        y, ssm = collectives.ssd(
            steps((x * of_channels(weight)[:, :, None]).astype(x.dtype)),
            None,
            jnp.pad(log_decay[:, :, None], ((0, 0), (0, 0), (0, ranks - 1), (0, 0))).reshape(rows, -1, heads),
            steps(B),
            steps(C),
            segment_ids=None if segment_ids is None else jnp.repeat(segment_ids, ranks, axis=1),
            initial_state=initial,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        # So far rank r has read its token's ranks up to r, with the next step's weight; it reads all, with this one's.
        read = jnp.tril(jnp.ones((ranks, ranks), dt.dtype))[..., None]
        own = own * (here[:, :, None, None] - weight[:, :, None, None] * read)
        own += self.D[...].astype(dt.dtype) * jnp.eye(ranks, dtype=dt.dtype)[..., None]
        y = y.reshape(x.shape).astype(dt.dtype)
        for k in range(ranks):
            y += of_channels(own[:, :, :, k]) * x[:, :, k : k + 1]
        return y, ssm

    @staticmethod
    def _per_rank(parameter: nnx.Param) -> Float[Array, "R H C"]:
        """Return a parameter of each head and rank in the axes of activations."""
        return parameter[...].swapaxes(0, 1)

    @classmethod
    def _merged(cls, parameter: nnx.Param) -> Float[Array, "R HP"]:
        """Return a parameter of each head, rank and channel likewise, with the axes of x."""
        v = cls._per_rank(parameter)
        return v.reshape(v.shape[0], -1)


def _own_products(
    B: Float[Array, "B L R G N"],
    C: Float[Array, "B L R G N"],
    B_bias: Float[Array, "R H N"],
    C_bias: Float[Array, "R H N"],
) -> Float[Array, "B L R R H"]:
    """Return C_r . B_k of each token and head: the rotation, the same for both, leaves it unchanged."""
    groups = B.shape[3]
    b, c = (v.reshape(v.shape[0], groups, -1, v.shape[2]).astype(B.dtype) for v in (B_bias, C_bias))
    dot = functools.partial(jnp.einsum, precision="highest")
    own = dot("blrgn,blkgn->blrkg", C, B)[..., None] + dot("rghn,kghn->rkgh", c, b)
    own += dot("blrgn,kghn->blrkgh", C, b) + dot("rghn,blkgn->blrkgh", c, B)
    return own.reshape(*own.shape[:4], -1)


def _heavy_tail(v: Array) -> Array:
    """Return 1 + v where v >= 0 and 1 / (1 - v) below: positive, with a continuous derivative."""
    return jnp.maximum(v, 0) + 1 / (1 - jnp.minimum(v, 0))
