"""One optimizer step: a batch in, new weights and the sums of the loss out."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from biomamba_jax.config import LossConfig
from biomamba_jax.errors import UserError
from biomamba_jax.model import LanguageModel
from biomamba_jax.ops import linear_cross_entropy
from biomamba_jax.ops.array_typing import Array, Float, Int
from biomamba_jax.ops.cross_entropy import LossSums
from biomamba_jax.parallel.collectives import UNSHARDED, Collectives
from biomamba_jax.parallel.layout import Layout

Batch = dict[str, Int[Array, "B L"]]
LossFunction = Callable[..., tuple[Array, LossSums]]
"""(params, batch, *fixed): the summed loss, differentiable in params, and the sums; `fixed` gets no gradient."""


@struct.dataclass
class TrainState:
    """All that training changes, and a checkpoint holds."""

    step: Int[Array, ""]
    """Steps done, skipped updates included."""
    params: Any
    """Float32 parameters, a nested dict."""
    optimizer: Any
    """State of the optax transforms, the average of the weights among them."""
    key: Array
    """Random key of the run, as its raw data: a plain array in checkpoints."""
    skipped: Int[Array, ""]
    """Updates skipped because a gradient was not finite."""
    skipped_in_a_row: Int[Array, ""]
    """How many of them came last, one after the other."""


@struct.dataclass
class StepMetrics:
    """What a step reports; sums are over the batch's tokens."""

    sums: LossSums
    tokens: Int[Array, ""]
    """Tokens read, padding not included; the loss may count fewer."""
    gradient_norm: Float[Array, ""]
    """Global norm of the mean gradient, before clipping."""
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


def language_model_loss(graph: nnx.GraphDef, config: LossConfig, collectives: Collectives = UNSHARDED) -> LossFunction:
    """The summed next-token loss of a batch as a function of the parameters.

    Args:
      graph: the model's graph definition, from `nnx.split`.
      collectives: how parameters and tokens are spread over devices; the loss is then of one device's part of both.
    """

    def loss(params: Any, batch: Batch) -> tuple[Array, LossSums]:
        model: LanguageModel = nnx.merge(graph, params)
        hidden, _ = model.hidden(batch["inputs"], segment_ids=batch["segment_ids"], collectives=collectives)
        name = "embedding" if model.lm_head is None else "lm_head"
        head = collectives.gather(
            name, model.head[...], jnp.float32
        )  # float32: so is the sum of its gradient over tokens
        sums = target_sums(
            collectives.enter(hidden), head, model.config.known_vocab, batch, config, collectives.tensor_axis
        )
        return sums.loss, sums

    return loss


def target_sums(
    hidden: Float[Array, "B L D"],
    head: Float[Array, "V D"],
    valid: int,
    batch: Batch,
    config: LossConfig,
    axis: str | None = None,
) -> LossSums:
    """Sums of the cross-entropy over the batch's targets; padding and negative targets count nothing.

    Args:
      valid: rows of the head that stand for something.
      axis: mesh axis that the head's rows are spread over.
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
    """The function of one step, of (state, batch, *fixed), for `jit_step`.

    A batch is computed in `accumulation` parts. Gradients of sums are added up and divided by the tokens of the whole
    batch, so that the result does not depend on how tokens fall into parts. A gradient that is not finite changes
    nothing but the counters.

    Args:
      layout: devices that batch and parameters are spread over; None is one device. The loss is then of one device's
        part of both, with `layout.collectives`: see `language_model_loss`.
    """
    gradients = jax.value_and_grad(loss, has_aux=True)

    def summed(params: Any, batch: Batch, *fixed: Any) -> tuple[LossSums, Any]:
        def add_part(total: Any, part: Batch) -> tuple[Any, None]:
            (_, sums), grads = gradients(params, part, *fixed)
            return jax.tree.map(jnp.add, total, (sums, grads)), None

        parts = jax.tree.map(lambda x: x.reshape(accumulation, -1, x.shape[-1]), batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients, params, first, *fixed)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0][1], shapes[1]))
        return jax.lax.scan(add_part, zeros, parts)[0]

    if layout is not None:
        summed = layout.summed(summed)

    def train_step(state: TrainState, batch: Batch, *fixed: Any) -> tuple[TrainState, StepMetrics]:
        sums, grads = summed(state.params, batch, *fixed)
        grads = jax.tree.map(lambda g: g / jnp.maximum(sums.weight, 1), grads)

        norm = optax.global_norm(grads)
        finite = jnp.isfinite(norm)
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


def jit_step(step: Callable[..., Any], options: dict[str, Any], mesh: Mesh) -> jax.stages.Wrapped:
    """The step, to be compiled with `options` of XLA for the devices of `mesh`; its state is donated.

    Raises:
      UserError: their compiler does not know an option, or its value.
    """
    if options:  # before anything else is compiled, or written
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
        try:
            jax.jit(lambda x: x, compiler_options=options).lower(scalar).compile()
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"train.compiler_options: {error}") from None
    return jax.jit(step, donate_argnums=0, compiler_options=options or None)
