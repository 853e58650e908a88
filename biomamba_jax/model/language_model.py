"""The language model: embedding, a stack of residual blocks, a final norm and the output head.

One function serves training, prefill, chunked prefill and decoding: any split of a text into calls gives the same
logits. Layers are stacked along a first axis and run by one `jax.lax.scan`. The residual stream is float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from biomamba_jax.config import ModelConfig
from biomamba_jax.model import initializers
from biomamba_jax.model.layers import GatedMLP, RMSNorm
from biomamba_jax.model.mamba1 import Mamba1Mixer
from biomamba_jax.model.mamba2 import Mamba2Mixer
from biomamba_jax.model.mamba3 import Mamba3Mixer
from biomamba_jax.model.state import MixerState, ModelState, reset_changed_segments
from biomamba_jax.ops import dispatch
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.numerics import accumulator_dtype
from biomamba_jax.parallel.collectives import UNSHARDED, Collectives, recompute_all_gathers

_MIXERS = {"mamba1": Mamba1Mixer, "mamba2": Mamba2Mixer, "mamba3": Mamba3Mixer}
_REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """Return the dtype of activations and matrix products; "auto" is resolved for the platform."""
    if config.compute_dtype == "auto":
        return jnp.dtype(jnp.float32 if dispatch.platform() == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.compute_dtype)


class Block(nnx.Module):
    """A residual block: h + mixer(norm(h)), and with an MLP then h + mlp(norm2(h))."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps, dtype=dtype)
        self.mixer = _MIXERS[config.kind](config, dtype=dtype, rngs=rngs)
        self.norm2 = RMSNorm(config.d_model, eps=config.norm_eps, dtype=dtype) if config.mlp_width else None
        self.mlp = GatedMLP(config, dtype=dtype, rngs=rngs) if config.mlp_width else None

    def __call__(
        self,
        h: Float[Array, "B L D"],
        state: MixerState | None,
        segment_ids: Int[Array, "B L"] | None,
        collectives: Collectives = UNSHARDED,
    ) -> tuple[Float[Array, "B L D"], MixerState]:
        """Return the residual stream after the block, and the state after the last token; see `hidden`."""
        y, state = self.mixer(self.norm(h), state, segment_ids, collectives)
        h = h + y.astype(h.dtype)
        if self.norm2 is not None and self.mlp is not None:
            h = h + self.mlp(self.norm2(h), collectives).astype(h.dtype)
        return h, state


class LanguageModel(nnx.Module):
    """A Mamba-1, Mamba-2 or Mamba-3 language model.

    Args:
      config: sizes; `vocab_size` must be set.
      dtype: compute dtype; left out, that of the config.
      rngs: source of initial values.
    """

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike | None = None, rngs: nnx.Rngs):
        self.config = config
        self.dtype = jnp.dtype(dtype) if dtype is not None else compute_dtype(config)

        @nnx.split_rngs(splits=config.n_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, dtype=self.dtype, rngs=rngs)

        table = (config.padded_vocab, config.d_model)
        self.embedding = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), table))
        self.layers = stack(rngs)
        self.norm_f = RMSNorm(config.d_model, eps=config.norm_eps, dtype=self.dtype)
        untied = initializers.linear(config.d_model)
        self.lm_head = None if config.tie_embeddings else nnx.Param(untied(rngs.params(), table))

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        state: ModelState | None = None,
        segment_ids: Int[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L V"], ModelState]:
        """Return logits of the next token after each token, and the state after the last.

        Args:
          tokens: token ids.
          state: from the previous call; None before the first token.
          segment_ids: document of each token; the state is reset where it changes.

        Returns:
          Float32 logits [B L V] over the padded vocabulary, whose ids from `config.vocab_size` on are padding, and the
          state.
        """
        hidden, state = self.hidden(tokens, state, segment_ids)
        head, dtype = self.head[...].astype(self.dtype), accumulator_dtype(self.dtype)
        return jnp.einsum("bld,vd->blv", hidden, head, preferred_element_type=dtype), state

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        state: ModelState | None = None,
        segment_ids: Int[Array, "B L"] | None = None,
        collectives: Collectives = UNSHARDED,
    ) -> tuple[Float[Array, "B L D"], ModelState]:
        """Return the hidden vectors [B L D] that the head turns into logits, and the state; see `__call__`.

        Args:
          tokens: token ids.
          state: from the previous call; None before the first token.
          segment_ids: document of each token.
          collectives: of the devices that the model and its tokens are sharded over.
        """
        collectives = collectives.with_segments(segment_ids, tokens.shape[0])
        if state is not None and segment_ids is not None:
            state = reset_changed_segments(state, segment_ids[:, 0])
        graph, layers = nnx.split(self.layers)

        def layer(h: Array, inputs: tuple) -> tuple[Array, MixerState]:
            parameters, layer_state = inputs
            parameters = collectives.all_gather_layer("layers", parameters, self.dtype)
            return nnx.merge(graph, parameters)(h, layer_state, segment_ids, collectives)

        if self.config.remat != "none" or collectives.fsdp_axes:
            policy = recompute_all_gathers(_REMAT[self.config.remat])
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        dtype = accumulator_dtype(self.dtype)
        table = collectives.all_gather("embedding", self.embedding[...], dtype)
        h = collectives.vocab_parallel_embedding(table, tokens).astype(dtype)
        h, states = jax.lax.scan(layer, h, (layers, None if state is None else state.layers), unroll=self.config.unroll)
        if segment_ids is not None:
            last = segment_ids[:, -1]
        else:
            last = state.segment_ids if state is not None else jnp.zeros(tokens.shape[0], jnp.int32)
        return self.norm_f(h), ModelState(layers=states, segment_ids=last)

    @property
    def head(self) -> nnx.Param:
        """The output head [V D], which is the embedding unless the config unties them."""
        return self.embedding if self.lm_head is None else self.lm_head


def init_params(config: ModelConfig, rngs: nnx.Rngs) -> dict[str, Any]:
    """Return the parameters of a new model, a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(LanguageModel(config, rngs=rngs)))
