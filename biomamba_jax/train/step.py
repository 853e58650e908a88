"""One optimizer step: a batch in, new weights and the sums of the loss out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from biomamba_jax.config import LossConfig
from biomamba_jax.model import LanguageModel
from biomamba_jax.ops import linear_cross_entropy
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.cross_entropy import LossSums
from biomamba_jax.parallel.collectives import UNSHARDED, Collectives
from biomamba_jax.parallel.layout import Layout

Batch = dict[str, Int[Array, "B L"]]
LossFunction = Callable[..., tuple[Array, LossSums]]
"""(params, batch, *frozen) -> the summed loss, differentiable in params, and the sums. `frozen` gets no gradient."""


@struct.dataclass
class TrainState:
    """Everything that a training step updates and a checkpoint saves."""

    step: Int[Array, ""]
    """Steps done, skipped updates included."""
    params: Any
    """Float32 parameters, a nested dict."""
    optimizer: Any
    """State of the optax transforms, including the moving average of the weights."""
    key: Array
    """Random key of the run, as raw key data: a plain array in checkpoints."""
    skipped: Int[Array, ""]
    """Number of updates skipped because the loss or its gradient was not finite."""
    skipped_in_a_row: Int[Array, ""]
    """Number of consecutive skipped updates."""


@struct.dataclass
class StepMetrics:
    """Metrics of one step, over the whole batch."""

    sums: LossSums
    """Sums over the tokens that the loss counts."""
    tokens: Int[Array, ""]
    """Tokens in the batch, without padding; the loss may count fewer."""
    gradient_norm: Float[Array, ""]
    """Global norm of the mean gradient, before clipping."""
    skipped: Int[Array, ""]
    """As in the state."""
    skipped_in_a_row: Int[Array, ""]
    """As in the state."""


def language_model_loss(graph: nnx.GraphDef, config: LossConfig, collectives: Collectives = UNSHARDED) -> LossFunction:
    """Return the summed next-token loss of a batch as a function of the parameters.

    Args:
      graph: the model's graph definition, from `nnx.split`.
      config: smoothing, z-loss and chunk size.
      collectives: of the devices that parameters and tokens are sharded over; the loss is then of one device's shard.
    """

    def loss(params: Any, batch: Batch) -> tuple[Array, LossSums]:
        # Gathered in float32, the dtype in which its gradient is summed over tokens; once, so that the two gradients of
        # an embedding that is the head too are added before they are reduce-scattered.
        name = "lm_head" if "lm_head" in params else "embedding"
        head = collectives.all_gather(name, params[name], jnp.float32)
        model: LanguageModel = nnx.merge(graph, params | {name: head})
        inside = collectives.without({name})
        hidden, _ = model.hidden(batch["inputs"], segment_ids=batch["segment_ids"], collectives=inside)
        hidden, vocab = collectives.copy_to_tensor_parallel(hidden), model.config.known_vocab
        sums = cross_entropy_sums(hidden, head, vocab, batch, config, collectives.tensor_axis)
        return sums.loss, sums

    return loss


def cross_entropy_sums(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "V D"],
    valid: int,
    batch: Batch,
    config: LossConfig,
    axis: str | None = None,
) -> LossSums:
    """Return sums of the cross-entropy over the batch's targets; padding and negative targets do not count.

    Args:
      hidden: output of the last norm.
      head: output matrix, whose rows are tokens or classes.
      valid: number of rows of the head in use; the others are padding.
      batch: targets and segments of the hidden vectors.
      config: smoothing, z-loss and chunk size.
      axis: mesh axis that the head's rows are sharded over.
    """
    targets = batch["targets"].reshape(-1)
    return linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        jnp.maximum(targets, 0),
        weights=((batch["segment_ids"].reshape(-1) != 0) & (targets >= 0)).astype(jnp.float32),
        valid_vocab_size=valid,
        label_smoothing=config.label_smoothing,
        z_loss=config.z_loss,
        chunk_size=config.chunk_size,
        axis=axis,
    )


def make_train_step(
    loss: LossFunction,
    optimizer: optax.GradientTransformation,
    accumulation: int = 1,
    layout: Layout | None = None,
) -> Callable[..., tuple[TrainState, StepMetrics]]:
    """Return the function of one training step, (state, batch, *frozen) -> (state, metrics).

    Gradients of summed losses are accumulated and divided by the tokens of the whole batch that the loss counts, so the
    result does not depend on how tokens are distributed over microbatches. A loss or gradient that is not finite
    changes nothing but the counters.

    Args:
      loss: of one device's shard of batch and parameters; see `language_model_loss`.
      optimizer: see `make_optimizer`.
      accumulation: number of microbatches that a batch is computed in.
      layout: devices that batch and parameters are sharded over; None for one device.
    """
    loss_and_gradients = jax.value_and_grad(loss, has_aux=True)

    def accumulate(params: Any, batch: Batch, *frozen: Any) -> tuple[LossSums, Any]:
        def add_microbatch(total: Any, microbatch: Batch) -> tuple[Any, None]:
            (_, sums), grads = loss_and_gradients(params, microbatch, *frozen)
            return jax.tree.map(jnp.add, total, (sums, grads)), None

        microbatches = jax.tree.map(lambda x: x.reshape(accumulation, -1, x.shape[-1]), batch)
        zeros = (LossSums.zeros(), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(add_microbatch, zeros, microbatches)[0]

    if layout is not None:
        accumulate = layout.sharded_sum(accumulate)

    def train_step(state: TrainState, batch: Batch, *frozen: Any) -> tuple[TrainState, StepMetrics]:
        sums, grads = accumulate(state.params, batch, *frozen)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums.weight, 1), grads)

        norm = optax.global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums.loss)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)

        def if_finite(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)

        new = TrainState(
            step=state.step + 1,
            params=if_finite(params, state.params),
            optimizer=if_finite(optimizer_state, state.optimizer),
            key=state.key,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        if layout is not None:
            new = jax.lax.with_sharding_constraint(new, layout.shardings(new))
        tokens = (batch["segment_ids"] != 0).sum()
        return new, StepMetrics(sums, tokens, norm, new.skipped, new.skipped_in_a_row)

    return train_step
