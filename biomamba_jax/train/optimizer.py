"""AdamW for Mamba: what is decayed, layer-wise learning rates and the averaged weights, each an optax transform.

Parameters are a nested dict of arrays; rules are regular expressions on their paths ("layers/mixer/out/kernel"). A rule
that matches nothing is an error, so that a renamed parameter cannot silently lose its rule.
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

# Matrices, the embedding and the convolution's taps. Everything else (norms, biases, A_log, D, dt_bias) is never
# decayed.
DECAYED = (r"embedding", r"layers/mixer/.*/kernel", r"layers/mixer/conv.*/weight")
DECAYED_UNTIED = (*DECAYED, r"lm_head")


def matching(tree: Params, patterns: tuple[str, ...]) -> Params:
    """A tree of booleans: does any of `patterns` match the whole path?

    Raises:
      UserError: a pattern matches no path.
    """
    names = path_names(tree)
    for pattern in patterns:
        if not any(re.fullmatch(pattern, name) for name in jax.tree.leaves(names)):
            raise UserError(f"optimizer: pattern {pattern!r} matches no parameter; paths: {jax.tree.leaves(names)}")
    return jax.tree.map(lambda name: any(re.fullmatch(pattern, name) for pattern in patterns), names)


def decay_mask(params: Params) -> Params:
    """True for the parameters of a model that weight decay applies to."""
    return matching(params, DECAYED_UNTIED if "lm_head" in params else DECAYED)


def scale_by_layer(model: ModelConfig, decay: float, embedding_rate: str) -> optax.GradientTransformation:
    """Multiplies updates by decay^(layers above): 1 for the head and final norm, decay for the top layer, and so on
    down.

    The embedding counts as the layer below the first ("bottom"), or keeps the full rate ("full"), as BioMamba's
    published recipe has it for the tied embedding.
    """
    rates = decay ** jnp.arange(model.n_layers, 0, -1, dtype=jnp.float32)
    bottom = decay ** (model.n_layers + 1) if embedding_rate == "bottom" else 1.0

    def scale(update: jax.Array, name: str) -> jax.Array:
        if name.startswith("layers/"):
            return update * rates.reshape(-1, *[1] * (update.ndim - 1)).astype(update.dtype)
        return update * bottom if name == "embedding" else update

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, path_names(updates)))


class AverageState(NamedTuple):
    """Exponential moving average of the weights."""

    average: Params


def average_weights(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the weights after each update. Must be last in a chain."""

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
    decayed: Callable[[Params], Params] = decay_mask,
) -> optax.GradientTransformation:
    """AdamW as the config describes it.

    Args:
      decayed: a tree of booleans from parameters: which of them weight decay applies to.
    """
    steps: list[optax.GradientTransformation] = []
    if config.clip:
        steps.append(optax.clip_by_global_norm(config.clip))
    steps.append(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon))
    steps.append(optax.add_decayed_weights(config.weight_decay, decayed))
    if config.layer_decay != 1:
        steps.append(scale_by_layer(model, config.layer_decay, config.embedding_rate))
    steps.append(optax.scale_by_learning_rate(learning_rate))
    if config.ema:
        steps.append(average_weights(config.ema))
    return optax.chain(*steps)


def evaluation_weights(params: Params, optimizer_state: Any) -> Params:
    """The weights that are evaluated and exported: their moving average where the optimizer keeps one."""
    is_average: Callable[[Any], bool] = lambda node: isinstance(node, AverageState)  # noqa: E731
    averages = [node for node in jax.tree.leaves(optimizer_state, is_leaf=is_average) if is_average(node)]
    return averages[0].average if averages else params
