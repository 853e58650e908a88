"""The recurrent state of a language model, whose size does not depend on the length of the text."""

import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike

from biomamba_jax.config import ModelConfig
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.numerics import accumulator_dtype


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


def empty_state(config: ModelConfig, rows: int, dtype: DTypeLike) -> MixerState:
    """Return the state of one layer before the first token.

    Args:
      config: the model.
      rows: batch size.
      dtype: the model's compute dtype, that of the convolutions' inputs.
    """
    mamba1, past = config.kind == "mamba1", (rows, config.d_conv - 1)
    channels = (config.d_inner,) if mamba1 else (config.n_heads, config.headdim)
    return MixerState(
        conv_x=jnp.zeros((*past, config.d_inner), dtype),
        conv_bc=None if mamba1 else jnp.zeros((*past, 2 * config.n_groups * config.state_size), dtype),
        ssm=jnp.zeros((rows, *channels, config.state_size), accumulator_dtype(dtype)),
    )


def reset_changed_segments(state: ModelState, first: Int[Array, " B"]) -> ModelState:
    """Return `state` with every row reset whose segment is not the one of its next token, `first`."""
    same = state.segment_ids == first

    def keep(x: Array) -> Array:  # axis 1 is the row, axis 0 the layer
        return jnp.where(same.reshape(1, -1, *[1] * (x.ndim - 2)), x, jnp.zeros_like(x))

    return ModelState(layers=jax.tree.map(keep, state.layers), segment_ids=first)
