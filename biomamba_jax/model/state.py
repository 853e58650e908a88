"""The recurrent state of a language model, whose size does not depend on the length of the text."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from biomamba_jax.config import ModelConfig
from biomamba_jax.ops.array_typing import Array, Float, Int


@struct.dataclass
class MixerState:
    """State of one mixer, or of all layers, stacked along a first axis."""

    conv_x: Float[Array, "*layers B past E"]
    """Last K-1 inputs of the convolution over x."""
    conv_bc: Float[Array, "*layers B past GN2"] | None
    """Last K-1 inputs of the convolution over B and C, 2 G N channels; Mamba-2 only."""
    ssm: Float[Array, "*layers_B_channels N"]
    """State of the state-space model, [B E N] in Mamba-1 and [B H P N] in Mamba-2, in the accumulator dtype."""


@struct.dataclass
class ModelState:
    """State of a language model after any number of tokens."""

    layers: MixerState
    """States of all layers, stacked."""
    segment_ids: Int[Array, " B"]
    """Segment of each row's last token; a call whose first token is of another segment starts from an empty state."""


def empty_state(config: ModelConfig, batch_size: int, dtype: DTypeLike) -> ModelState:
    """Return the state before the first token.

    Args:
      config: the model.
      batch_size: number of rows.
      dtype: the model's compute dtype, that of the convolutions' inputs.
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


def reset_changed_segments(state: ModelState, first: Int[Array, " B"]) -> ModelState:
    """Return `state` with every row reset whose segment is not the one of its next token, `first`."""
    same = state.segment_ids == first

    def keep(x: Array) -> Array:  # axis 1 is the row, axis 0 the layer
        return jnp.where(same.reshape(1, -1, *[1] * (x.ndim - 2)), x, jnp.zeros_like(x))

    return ModelState(layers=jax.tree.map(keep, state.layers), segment_ids=first)
