"""The Mamba-1 mixer: Gu and Dao 2023 (arXiv 2312.00752), section 3.4.

The projections of x and z, one matrix in the released weights, are separate parameters here, so that each is sharded
over its own channels and none is sliced; `interop` concatenates them.
"""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from biomamba_jax.config import ModelConfig
from biomamba_jax.model import initializers
from biomamba_jax.model.layers import CausalConv1d, dense, negative_exp, row_parallel
from biomamba_jax.model.state import MixerState
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.parallel.collectives import UNSHARDED, Collectives


class Mamba1Mixer(nnx.Module):
    """x, z = in(u); x = silu(conv(x)); dt, B, C = proj(x); y = selective_scan(x, dt, A, B, C, D, z); out(y)."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, rank, d_state = config.d_inner, config.dt_size, config.state_size
        self.in_x = dense(config.d_model, width, bias=config.bias, dtype=dtype, rngs=rngs)
        self.in_z = dense(config.d_model, width, bias=config.bias, dtype=dtype, rngs=rngs)
        self.conv = CausalConv1d(width, config, dtype=dtype, rngs=rngs)
        self.x_proj = dense(width, rank + 2 * d_state, dtype=dtype, rngs=rngs)
        self.dt_proj = dense(rank, width, dtype=dtype, rngs=rngs)
        self.dt_bias = nnx.Param(initializers.dt_bias(rngs.params(), (width,)))
        self.A_log = nnx.Param(initializers.a_log_range(None, (width, d_state)))
        self.D = nnx.Param(jnp.ones(width))
        scale = config.n_layers**-0.5
        self.out = dense(width, config.d_model, bias=config.bias, scale=scale, dtype=dtype, rngs=rngs)
        self.split, self.implementation = (rank, rank + d_state), config.implementation

    def __call__(
        self,
        u: Float[Array, "B L D"],
        state: MixerState | None,
        segment_ids: Int[Array, "B L"] | None,
        collectives: Collectives = UNSHARDED,
    ) -> tuple[Float[Array, "B L D"], MixerState]:
        """Return the mixer's output and the state after the last token; see `LanguageModel.hidden`."""
        past_conv, past_ssm = (None, None) if state is None else (state.conv_x, state.ssm)
        u = collectives.copy_to_tensor_parallel(u)
        x, conv = self.conv(self.in_x(u), past_conv, segment_ids, collectives)
        # dt, B and C are sums over the channels of all devices, and every device needs them whole.
        low_rank = collectives.copy_to_tensor_parallel(row_parallel(self.x_proj, x, collectives))
        dt, B, C = jnp.split(low_rank, self.split, axis=-1)
        y, ssm = collectives.selective_scan(
            x,
            self.dt_proj(dt),
            negative_exp(self.A_log),
            B,
            C,
            self.D[...],
            self.in_z(u),
            dt_bias=self.dt_bias[...],
            segment_ids=segment_ids,
            initial_state=past_ssm,
            implementation=self.implementation,
        )
        return row_parallel(self.out, y, collectives), MixerState(ssm, conv_x=conv)
