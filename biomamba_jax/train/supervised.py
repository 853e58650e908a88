"""Fine-tuning on prompts and answers, of the whole model or of LoRA adapters, by the loop that pretraining uses.

What differs from pretraining is decided here: which parameters are trained (all, or adapters next to frozen weights),
what the targets are (the examples say), and what predicts them (the language model's head or a classifier).
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from biomamba_jax.config import FinetuneConfig, LoraConfig, LossConfig
from biomamba_jax.data.examples import EncodedExamples
from biomamba_jax.data.packing import RowPlan
from biomamba_jax.data.pipeline import evaluation_batches
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.interop import Weights
from biomamba_jax.interop.adapters import fingerprint
from biomamba_jax.interop.vocabulary import identity
from biomamba_jax.model import LanguageModel, initializers
from biomamba_jax.model.lora import drop_inputs, init_adapters, merge
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.cross_entropy import LossSums
from biomamba_jax.parallel.collectives import UNSHARDED, Collectives
from biomamba_jax.parallel.layout import Layout
from biomamba_jax.parallel.mesh import host_batch, make_mesh, replicated
from biomamba_jax.parallel.sharding import leaves_by_path
from biomamba_jax.train.heldout import LossEvaluator, Metrics
from biomamba_jax.train.loop import TrainingRun, run
from biomamba_jax.train.optimizer import Params, decay_mask
from biomamba_jax.train.program import abstract_model, train_program
from biomamba_jax.train.step import Batch, LossFunction, TrainState, cross_entropy_sums, language_model_loss

CHECKED_STEP = 3
"""Updates after which every adapter must have had a gradient. The first one reaches B alone, since B is initialised to
zero; the second reaches A too, and one is to spare."""


def finetune(config: FinetuneConfig, weights: Weights, train: EncodedExamples, development: EncodedExamples) -> bool:
    """Fine-tune as `config` says, from the newest checkpoint in its run directory where there is one.

    Args:
      config: the run, with the model of `weights`, and with `labels` if its head is a classifier.
      weights: what to start from.
      train: examples to train on.
      development: examples for early stopping and the choice of the best weights.

    Returns:
      True if the run is complete; False after SIGTERM or Ctrl-C.

    Raises:
      UserError: config, weights and checkpoint do not fit together, gradients stayed non-finite, or an adapter got
        none.
    """
    graph, layout = abstract_model(config.model, make_mesh(config.mesh), config.train.reduce_dtype)
    mesh, rows, lora = layout.mesh, config.data, config.lora
    adapters, classifier = bool(lora.rank), bool(config.labels)
    params = _trained_params(config, weights)
    if adapters or classifier:  # the sharding rules know neither: all parameters are replicated
        if mesh.shape["tensor"] > 1:
            raise UserError(f"mesh.tensor = {mesh.shape['tensor']}: must be 1 for adapters and classifiers")
        layout = Layout(mesh)
    file = weights.tokenizer_file
    known = {"tokenizer": identity(load_tokenizer(file))} if file else {}
    frozen = (jax.device_put(weights.params, replicated(mesh)),) if adapters else ()

    def loss(loss_config: LossConfig, lora: LoraConfig) -> LossFunction:
        plain = classification_loss if classifier else language_model_loss
        function = plain(graph, loss_config, layout.collectives)
        return adapted(function, lora) if adapters else function

    plan = RowPlan(train.lengths, rows.sequence_length, seed=config.train.seed)
    epoch_steps = plan.rows_in_epoch() / rows.batch_size
    steps = config.train.steps or max(1, math.ceil(config.train.epochs * epoch_steps))
    trained, held_out = loss(config.loss, lora), loss(LossConfig(), dataclasses.replace(lora, dropout=0.0))
    mask = partial(jax.tree.map, lambda _: True) if adapters else _decay_mask
    program = train_program(config, graph, layout, trained, steps, params=params, weight_decay_mask=mask)
    of_host: dict[str, Any] = {"sequence_length": rows.sequence_length, **host_batch(rows.batch_size, mesh)}
    development_batches = partial(evaluation_batches, development, **of_host)
    training = TrainingRun(
        config=config,
        program=program,
        steps=steps,
        epoch_steps=epoch_steps,
        evaluate=LossEvaluator(held_out, layout, development_batches, _metrics, frozen),
        documents=train,
        frozen=frozen,
        tokenizer=weights.tokenizer_file,
        hooks=[(1, AdapterCheck())] if adapters else [],
        identity=known | ({"base_sha256": fingerprint(weights.params)} if adapters else {}),
        messages=_messages(train, development, params, weights.params if adapters else None),
    )
    return run(training, params)


def _trained_params(config: FinetuneConfig, weights: Weights) -> Params:
    adapters, head = jax.random.split(jax.random.key(config.train.seed))
    params: Params = dict(weights.params)
    if config.lora.rank:
        params = init_adapters(weights.params, config.lora.targets, config.lora.rank, adapters)
    if config.labels:
        width, known = config.model.d_model, weights.classifier
        if known is not None and known.labels == tuple(config.labels):
            params["classifier"] = known.weight
        else:
            params["classifier"] = initializers.linear(width)(head, (len(config.labels), width))
    return params


def _metrics(sums: Metrics) -> Metrics:
    """Return loss in nats, accuracy of the most probable token or class, and the number of targets."""
    count = sums["weight"]
    return {"loss": sums["nll"] / count, "accuracy": sums["correct"] / count, "targets": int(count)}


def _decay_mask(params: Params) -> Params:
    """Return pretraining's mask; a classifier is decayed, a language model head that it leaves unused is not."""
    if "classifier" not in params:
        return decay_mask(params)
    mask = decay_mask({name: value for name, value in params.items() if name != "classifier"})
    return mask | {"classifier": True} | ({"lm_head": False} if "lm_head" in mask else {})


def _messages(train: EncodedExamples, development: EncodedExamples, params: Params, base: Params | None) -> list[str]:
    messages = [f"{len(train):,} examples to train on, {len(development):,} for early stopping"]
    if shortened := train.shortened + development.shortened:
        messages.append(f"{shortened:,} prompts do not fit into a row and lose their beginning (data.sequence_length)")
    if base is not None:
        trained, frozen = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, base))
        messages.append(f"adapters: {trained / 1e6:.2f} M trained parameters, {frozen / 1e6:.1f} M frozen ones")
    return messages


# --- Losses ----------------------------------------------------------------------------------------------------------


def classification_loss(graph: nnx.GraphDef, config: LossConfig, collectives: Collectives = UNSHARDED) -> LossFunction:
    """Return the summed loss of a classifier, whose targets are rows of params["classifier"] instead of tokens.

    Args:
      graph: the model's graph definition.
      config: smoothing, z-loss and chunk size.
      collectives: see `language_model_loss`.
    """

    def loss(params: Any, batch: Batch) -> tuple[Array, LossSums]:
        head = params["classifier"]
        model: LanguageModel = nnx.merge(graph, {name: value for name, value in params.items() if name != "classifier"})
        hidden, _ = model.hidden(batch["inputs"], segment_ids=batch["segment_ids"], collectives=collectives)
        sums = cross_entropy_sums(hidden.astype(head.dtype), head, head.shape[0], batch, config)
        return sums.loss, sums

    return loss


def adapted(loss: LossFunction, config: LoraConfig) -> LossFunction:
    """Return `loss` as a function of (adapters, batch, base), where the adapters are merged into the frozen base."""

    def adapted_loss(adapters: Any, batch: Batch, base: Any) -> tuple[Array, LossSums]:
        if config.dropout:
            # Seeded by the tokens themselves: a resumed run draws the same, and no key is carried along.
            tokens = batch["inputs"].reshape(-1).astype(jnp.uint32)
            seed = (tokens * jnp.arange(1, tokens.size + 1, dtype=jnp.uint32)).sum()
            adapters = drop_inputs(adapters, config.dropout, jax.random.key(seed))
        return loss(merge(base, adapters, config.scale), batch)

    return adapted_loss


# --- Hook ------------------------------------------------------------------------------------------------------------


class AdapterCheck:
    """A hook that ends a run after a few steps unless every adapter of every layer has had a gradient.

    It reads the optimizer's first moment, which stays exactly zero where no gradient ever came.
    """

    def __init__(self) -> None:
        self._done = False
        self._any: Callable[[Any], Any] = jax.jit(lambda tree: jax.tree.map(lambda x: (x != 0).any((-2, -1)), tree))

    def __call__(self, step: int, state: TrainState) -> None:
        """Check once, after `CHECKED_STEP` updates.

        Raises:
          UserError: an adapter has had no gradient.
        """
        if self._done or step < CHECKED_STEP or int(state.step - state.skipped) < CHECKED_STEP:
            return
        self._done = True
        reached = jax.device_get(self._any(optax.tree_utils.tree_get(state.optimizer, "mu")))
        dead = [
            name + (f" (layers {', '.join(map(str, np.flatnonzero(~flag)))})" if flag.ndim else "")
            for name, flag in leaves_by_path(reached).items()
            if not flag.all()
        ]
        if dead:
            raise UserError(
                f"lora: no gradient has reached {'; '.join(dead)} in {step} steps: the loss does not depend on it; "
                "leave it out of lora.targets"
            )
