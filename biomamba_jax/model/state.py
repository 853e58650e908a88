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

    ssm: Float[Array, "*layers_B_channels N"]
    """State of the state-space model, [B E N] in Mamba-1 and [B H P N] in the others, in the accumulator dtype."""
    conv_x: Float[Array, "*layers B past E"] | None = None
    """Last K-1 inputs of the convolution over x; Mamba-1 and Mamba-2."""
    conv_bc: Float[Array, "*layers B past GN2"] | None = None
    """Last K-1 inputs of the convolution over B and C, 2 G N channels; Mamba-2 only."""
    angle: Float[Array, "*layers B H S"] | None = None
    """Running angle of each rotating pair, in radians, in the accumulator dtype; Mamba-3 only."""
    last_x: Float[Array, "*layers B R H P"] | None = None
    """Input of the last token, whose second term in the trapezoidal rule is the next token's; Mamba-3 only."""
    last_B: Float[Array, "*layers B R H N"] | None = None
    """Rotated B of the last token; Mamba-3 only."""


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
    heads, d_state, past = config.n_heads, config.state_size, (rows, config.d_conv - 1)
    channels = (config.d_inner,) if config.kind == "mamba1" else (heads, config.headdim)
    ssm = jnp.zeros((rows, *channels, d_state), accumulator_dtype(dtype))
    if config.kind == "mamba3":
        return MixerState(
            ssm,
            angle=jnp.zeros((rows, heads, config.n_angles), accumulator_dtype(dtype)),
            last_x=jnp.zeros((rows, config.n_ranks, *channels), dtype),
            last_B=jnp.zeros((rows, config.n_ranks, heads, d_state), dtype),
        )
    conv_bc = None if config.kind == "mamba1" else jnp.zeros((*past, 2 * config.n_groups * d_state), dtype)
    return MixerState(ssm, jnp.zeros((*past, config.d_inner), dtype), conv_bc)


def reset_changed_segments(state: ModelState, first: Int[Array, " B"]) -> ModelState:
    """Return `state` with every row reset whose segment is not the one of its next token, `first`."""
    same = state.segment_ids == first

    def keep(x: Array) -> Array:  # axis 1 is the row, axis 0 the layer
        return jnp.where(same.reshape(1, -1, *[1] * (x.ndim - 2)), x, jnp.zeros_like(x))

    return ModelState(layers=jax.tree.map(keep, state.layers), segment_ids=first)
