"""AdamW for Mamba, with layer-wise learning rates and a moving average of the weights, as optax transforms.

Parameters are a nested dict of arrays; rules are regular expressions for their paths ("layers/mixer/out/kernel"). A
rule that matches nothing is an error, so that a renamed parameter cannot silently lose its rule.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from biomamba_jax.config import ModelConfig, OptimizerConfig
from biomamba_jax.errors import UserError
from biomamba_jax.parallel.sharding import path_names

Params = Any

DECAYED = (r"embedding", r"layers/(.*/kernel|mixer/conv.*/weight|mixer/mimo_[xzo])")
"""Parameters that weight decay applies to: matrices, embedding, convolution taps and MIMO projections, and an untied
lm_head. Norms, biases, A_log, D and dt_bias are never decayed."""


def decay_mask(params: Params) -> Params:
    """Return a tree of booleans: True for the parameters of a model that weight decay applies to.

    Raises:
      UserError: a rule matches no parameter.
    """
    rules = (*DECAYED, r"lm_head") if "lm_head" in params else DECAYED
    names = path_names(params)
    for rule in rules:
        if not any(re.fullmatch(rule, name) for name in jax.tree.leaves(names)):
            raise UserError(f"optimizer: rule {rule!r} matches no parameter; paths: {jax.tree.leaves(names)}")
    return jax.tree.map(lambda name: any(re.fullmatch(rule, name) for rule in rules), names)


def scale_by_layer_decay(model: ModelConfig, decay: float, embedding_rate: str) -> optax.GradientTransformation:
    """Return a transform that multiplies updates by decay^(layers above).

    The factor is 1 for the head and the final norm, `decay` for the top layer, and so on down. The embedding counts as
    the layer below the first ("bottom"), or keeps the full rate ("full"), as in BioMamba's published recipe.
    """
    rates = decay ** jnp.arange(model.n_layers, 0, -1, dtype=jnp.float32)
    bottom = decay ** (model.n_layers + 1) if embedding_rate == "bottom" else 1.0

    def scale(update: jax.Array, name: str) -> jax.Array:
        if name.startswith(("layers/", "reversed/layers/")):
            return update * rates.reshape(-1, *[1] * (update.ndim - 1)).astype(update.dtype)
        return update * bottom if name == "embedding" else update

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, path_names(updates)))


class AverageState(NamedTuple):
    """State of `average_weights`."""

    average: Params
    """Exponential moving average of the weights."""


def average_weights(decay: float) -> optax.GradientTransformation:
    """Return a transform that averages the weights after each update exponentially. Must be last in a chain."""

    def init(params: Params) -> AverageState:
        return AverageState(jax.tree.map(jnp.copy, params))

    def update(updates: Params, state: AverageState, params: Params = None) -> tuple[Params, AverageState]:
        new = optax.incremental_update(optax.apply_updates(params, updates), state.average, 1 - decay)
        return updates, AverageState(new)

    return optax.GradientTransformation(init, update)


def make_optimizer(
    config: OptimizerConfig,
    model: ModelConfig,
    learning_rate: optax.Schedule,
    weight_decay_mask: Callable[[Params], Params] = decay_mask,
) -> optax.GradientTransformation:
    """Return AdamW as the config describes it.

    Args:
      config: rates, decays and clipping.
      model: number of layers, for layer-wise learning rates.
      learning_rate: schedule of the learning rate.
      weight_decay_mask: returns a tree of booleans for parameters: True where weight decay applies.
    """
    steps: list[optax.GradientTransformation] = []
    if config.clip:
        steps.append(optax.clip_by_global_norm(config.clip))
    steps.append(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon))
    steps.append(optax.add_decayed_weights(config.weight_decay, weight_decay_mask))
    if config.layer_decay != 1:
        steps.append(scale_by_layer_decay(model, config.layer_decay, config.embedding_rate))
    steps.append(optax.scale_by_learning_rate(learning_rate))
    if config.ema:
        steps.append(average_weights(config.ema))
    return optax.chain(*steps)


def evaluation_weights(params: Params, optimizer_state: Any) -> Params:
    """Return the weights to evaluate and export: their moving average where the optimizer keeps one."""
    return optax.tree_utils.tree_get(optimizer_state, "average", params)
