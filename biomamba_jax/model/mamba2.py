"""The Mamba-2 mixer: Dao and Gu 2024 (arXiv 2405.21060), section 7.

The projections of z, x, B and C, and dt, one matrix in the released weights, and the convolutions over x and over B
and C, are separate parameters here, so that heads are sharded while B and C, which the heads of a group share, are not;
`interop` concatenates them.
"""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from biomamba_jax.config import ModelConfig
from biomamba_jax.model import initializers
from biomamba_jax.model.layers import CausalConv1d, RMSNorm, dense, negative_exp, row_parallel
from biomamba_jax.model.state import MixerState
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.parallel.collectives import UNSHARDED, Collectives


class Mamba2Mixer(nnx.Module):
    """z, x, BC, dt = in(u); x, B, C = silu(conv(x, BC)); y = ssd(x, dt, A, B, C, D); out(norm(y * silu(z)))."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, heads = config.d_inner, config.n_heads
        groups, d_state = config.n_groups, config.state_size
        self.in_z = dense(config.d_model, width, bias=config.bias, dtype=dtype, rngs=rngs)
        self.in_x = dense(config.d_model, width, bias=config.bias, dtype=dtype, rngs=rngs)
        self.in_bc = dense(config.d_model, 2 * groups * d_state, bias=config.bias, dtype=dtype, rngs=rngs)
        self.in_dt = dense(config.d_model, heads, bias=config.bias, dtype=dtype, rngs=rngs)
        self.conv_x = CausalConv1d(width, config, dtype=dtype, rngs=rngs)
        self.conv_bc = CausalConv1d(2 * groups * d_state, config, dtype=dtype, rngs=rngs)
        self.dt_bias = nnx.Param(initializers.dt_bias(rngs.params(), (heads,)))
        self.A_log = nnx.Param(initializers.a_log_uniform(rngs.params(), (heads,)))
        self.D = nnx.Param(jnp.ones(heads))
        self.norm = RMSNorm(width, eps=config.norm_eps, groups=groups, dtype=dtype)
        scale = config.n_layers**-0.5
        self.out = dense(width, config.d_model, bias=config.bias, scale=scale, dtype=dtype, rngs=rngs)
        self.headdim, self.groups, self.chunk_size = config.headdim, groups, config.chunk_size
        self.implementation = config.implementation

    def __call__(
        self,
        u: Float[Array, "B L D"],
        state: MixerState | None,
        segment_ids: Int[Array, "B L"] | None,
        collectives: Collectives = UNSHARDED,
    ) -> tuple[Float[Array, "B L D"], MixerState]:
        """Return the mixer's output and the state after the last token; see `LanguageModel.hidden`."""
        past_x, past_bc, past_ssm = (None,) * 3 if state is None else (state.conv_x, state.conv_bc, state.ssm)
        # Every device along tensor computes B and C of all groups; heads are sharded.
        bc, conv_bc = self.conv_bc(self.in_bc(u), past_bc, segment_ids, collectives)
        bc, u = collectives.copy_to_tensor_parallel(bc), collectives.copy_to_tensor_parallel(u)
        groups = (part.reshape(*part.shape[:2], self.groups, -1) for part in jnp.split(bc, 2, axis=-1))
        B, C = map(collectives.local_groups, groups)
        x, conv_x = self.conv_x(self.in_x(u), past_x, segment_ids, collectives)
        y, ssm = collectives.ssd(
            x.reshape(*x.shape[:2], -1, self.headdim),
            self.in_dt(u),
            negative_exp(self.A_log),
            B,
            C,
            self.D[...],
            dt_bias=self.dt_bias[...],
            segment_ids=segment_ids,
            initial_state=past_ssm,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )
        y = self.norm(y.reshape(x.shape), self.in_z(u), collectives)
        return row_parallel(self.out, y, collectives), MixerState(ssm, conv_x, conv_bc)
