"""The training step of a config, as training, planning and benchmarks run it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from biomamba_jax.config import ModelConfig, PretrainConfig, RunConfig, TrainConfig
from biomamba_jax.errors import UserError
from biomamba_jax.hardware import find_chip
from biomamba_jax.model import LanguageModel, init_params
from biomamba_jax.model.sharding import sharding_rules
from biomamba_jax.parallel.layout import Layout
from biomamba_jax.parallel.mesh import BATCH_SPEC, replicated, rows_per_host
from biomamba_jax.train.optimizer import Params, decay_mask, make_optimizer
from biomamba_jax.train.schedule import learning_rate
from biomamba_jax.train.step import LossFunction, TrainState, language_model_loss, make_train_step


@dataclass(frozen=True)
class TrainProgram:
    """A training step, jitted but not compiled, with the shapes and shardings of its arguments."""

    step: jax.stages.Wrapped
    """(state, batch, *frozen) -> (state, StepMetrics); donates the state."""
    init: jax.stages.Wrapped
    """(params or None) -> sharded TrainState before the first step."""
    state: TrainState
    """Shape, dtype and sharding of each array of the state."""
    batch: dict[str, jax.ShapeDtypeStruct]
    """Shape, dtype and sharding of the global batch."""
    schedule: optax.Schedule
    """Learning rate of each step."""
    graph: nnx.GraphDef
    """The model's graph definition."""
    layout: Layout
    """Devices, and the sharding of parameters."""


def pretrain_program(config: PretrainConfig, mesh: Mesh, steps: int) -> TrainProgram:
    """Return the step of pretraining `config`, whose vocabulary is known, over `mesh`.

    Raises:
      UserError: the sizes of model, batch and mesh do not fit together, or the compiler refuses an option.
    """
    graph, layout = abstract_model(config.model, mesh, config.train.reduce_dtype)
    loss = language_model_loss(graph, config.loss, layout.collectives)
    return train_program(config, graph, layout, loss, steps)


def train_program(
    config: RunConfig,
    graph: nnx.GraphDef,
    layout: Layout,
    loss: LossFunction,
    steps: int,
    *,
    params: Params = None,
    weight_decay_mask: Callable[[Params], Params] = decay_mask,
) -> TrainProgram:
    """Return the step that minimises `loss` as `config` says.

    Args:
      config: the run.
      graph: the model's graph definition.
      layout: devices, and the sharding of parameters.
      loss: of one device's shard of batch and parameters.
      steps: optimizer steps of the whole run, for the schedule.
      params: what is trained; None for the parameters of a new language model.
      weight_decay_mask: see `make_optimizer`.

    Raises:
      UserError: the batch does not divide over the mesh, or the compiler refuses an option.
    """
    data, mesh = config.data, layout.mesh
    rows_per_host(data.batch_size, mesh, config.train.accumulation)  # checks
    if data.sequence_length % mesh.shape["sequence"]:
        raise UserError(f"mesh.sequence = {mesh.shape['sequence']}: must divide data.sequence_length")
    schedule = learning_rate(config.schedule, config.optimizer.learning_rate, steps)
    optimizer = make_optimizer(config.optimizer, config.model, schedule, weight_decay_mask)
    step = make_train_step(loss, optimizer, config.train.accumulation, layout)
    init = partial(initial_state, config.model, optimizer, config.train.seed)
    state = jax.eval_shape(init, params)
    shardings = layout.shardings(state)
    shape = (data.batch_size, data.sequence_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
    return TrainProgram(
        step=_jit(step, config.train, mesh),
        init=jax.jit(init, out_shardings=shardings),
        state=jax.tree.map(lambda x, sharding: x.update(sharding=sharding), state, shardings),
        batch=dict.fromkeys(("inputs", "targets", "segment_ids"), tokens),
        schedule=schedule,
        graph=graph,
        layout=layout,
    )


def abstract_model(model: ModelConfig, mesh: Mesh, reduce_dtype: str = "float32") -> tuple[nnx.GraphDef, Layout]:
    """Return the model's graph definition and the layout of its parameters, without allocating any.

    Raises:
      UserError: the model's sizes do not divide over the mesh.
    """
    graph, shapes = nnx.split(nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0))))
    rules = sharding_rules(model, mesh.shape["tensor"])
    return graph, Layout.from_rules(mesh, nnx.to_pure_dict(shapes), rules, reduce_dtype)


def initial_state(
    model: ModelConfig, optimizer: optax.GradientTransformation, seed: int, params: Params = None
) -> TrainState:
    """Return the state before the first step, with the given parameters or, for None, random ones."""
    initial, key = jax.random.split(jax.random.key(seed))
    if params is None:
        params = init_params(model, nnx.Rngs(initial))
    counters = dict.fromkeys(("step", "skipped", "skipped_in_a_row"), jnp.zeros((), jnp.int32))
    return TrainState(params=params, optimizer=optimizer.init(params), key=jax.random.key_data(key), **counters)


_OFFLOAD = "xla_tpu_enable_sparse_core_collective_offload_{}"  # options of libtpu


def _jit(step: Callable[..., Any], config: TrainConfig, mesh: Mesh) -> jax.stages.Wrapped:
    """Return the step jitted with the options of XLA that `config` asks for, for the devices of `mesh`.

    Raises:
      UserError: their compiler refuses an option or its value, or they have no SparseCores to offload collectives to.
    """
    options: dict[str, Any] = {}
    if config.offload_collectives:
        kind = mesh.devices.flat[0].device_kind
        chip = find_chip(kind)
        if chip is None or not chip.sparse_cores:
            raise UserError(f"train.offload_collectives: {kind} has no SparseCores that run collectives")
        options = {_OFFLOAD.format(name): True for name in ("all_gather", "reduce_scatter")}
    options |= config.compiler_options
    if options:  # before anything else is compiled, or written
        scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
        try:
            jax.jit(lambda x: x, compiler_options=options).lower(scalar).compile()
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"train.compiler_options: {error}") from None
    return jax.jit(step, donate_argnums=0, compiler_options=options or None)
