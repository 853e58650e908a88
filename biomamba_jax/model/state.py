"""The recurrent state of a language model: all that it remembers of the text so far, of a size that never grows."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from biomamba_jax.config import ModelConfig
from biomamba_jax.ops.array_typing import Array, Float, Int


@struct.dataclass
class MixerState:
    """State of one mixer, or of all layers when stacked along a first axis."""

    conv_x: Float[Array, "... B K-1 E"]
    """Last inputs of the convolution over x."""
    conv_bc: Float[Array, "... B K-1 2*G*N"] | None
    """Last inputs of the convolution over B and C; Mamba-2 only."""
    ssm: Float[Array, "*layers_B_channels N"]
    """State of the state-space model: [B E N] in Mamba-1, [B H P N] in Mamba-2; at least float32."""


@struct.dataclass
class ModelState:
    """State of a language model after some tokens."""

    layers: MixerState
    """States of all layers, stacked."""
    segment_ids: Int[Array, " B"]
    """Segment of each row's last token: a call that starts with another segment starts from an empty state."""


def empty_state(config: ModelConfig, batch_size: int, dtype: DTypeLike) -> ModelState:
    """The state before the first token, for `batch_size` rows.

    Args:
      dtype: the model's compute type, in which the convolutions' inputs are kept.
    """
    conv = (config.n_layers, batch_size, config.d_conv - 1)
    if config.kind == "mamba1":
        conv_bc = None
        channels: tuple[int, ...] = (config.d_inner,)
    else:
        conv_bc = jnp.zeros((*conv, 2 * config.n_groups * config.state_size), dtype)
        channels = (config.n_heads, config.headdim)
    return ModelState(
        layers=MixerState(
            conv_x=jnp.zeros((*conv, config.d_inner), dtype),
            conv_bc=conv_bc,
            ssm=jnp.zeros(
                (config.n_layers, batch_size, *channels, config.state_size), jnp.promote_types(dtype, jnp.float32)
            ),
        ),
        segment_ids=jnp.zeros(batch_size, jnp.int32),
    )


def enter_segments(state: ModelState, first: Int[Array, " B"]) -> ModelState:
    """`state` for rows that go on with the segments `first`: emptied in every row whose segment has changed."""
    same = state.segment_ids == first

    def keep(x: Array) -> Array:  # rows lie on axis 1, behind the layers
        return jnp.where(same.reshape(1, -1, *[1] * (x.ndim - 2)), x, jnp.zeros_like(x))

    return ModelState(layers=jax.tree.map(keep, state.layers), segment_ids=first)
