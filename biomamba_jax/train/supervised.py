"""Fine-tuning: answers learnt from prompts, whole model or adapters, by the loop that pretraining uses.

What differs from pretraining is decided here, before anything is compiled: which parameters are trained (all, or
adapters beside weights that the step is given), what the targets are (the examples say), and what answers (the language
model or a classifier).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from biomamba_jax.config import FinetuneConfig, LoraConfig, LossConfig
from biomamba_jax.data.examples import EncodedExamples
from biomamba_jax.data.packing import RowPlan
from biomamba_jax.data.pipeline import every_batch, shuffled_batches
from biomamba_jax.errors import UserError
from biomamba_jax.interop import Weights
from biomamba_jax.interop.adapters import fingerprint
from biomamba_jax.model import LanguageModel, initializers
from biomamba_jax.model.lora import drop_inputs, init_adapters, merge
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.cross_entropy import LossSums
from biomamba_jax.parallel.collectives import UNSHARDED, Collectives
from biomamba_jax.parallel.layout import Layout
from biomamba_jax.parallel.mesh import make_mesh, reader, replicated, rows_per_host
from biomamba_jax.parallel.sharding import path_names
from biomamba_jax.train.heldout import SummedLoss
from biomamba_jax.train.loop import Training, run
from biomamba_jax.train.optimizer import Params, decay_mask
from biomamba_jax.train.setup import abstract_model
from biomamba_jax.train.step import Batch, LossFunction, TrainState, language_model_loss, target_sums

CHECKED_STEP = 3
"""Updates after which every adapter must have had a gradient. The first gives one to B alone, which begins as zero; the
second to A as well, and one is to spare."""


def finetune(config: FinetuneConfig, weights: Weights, train: EncodedExamples, development: EncodedExamples) -> bool:
    """Fine-tunes as `config` says, from the newest checkpoint in its run directory where there is one.

    Args:
      config: with the model that `weights` are of, and with `labels` if its head is a classifier.
      weights: what to start from.

    Returns:
      Whether the run is complete; not after SIGTERM or Ctrl-C.

    Raises:
      UserError: config, weights and checkpoint do not fit together, gradients stayed non-finite, or an adapter got
        none.
    """
    graph, layout = abstract_model(config.model, make_mesh(config.mesh))
    params, fixed, kept = _trained(config, weights)
    if fixed or config.labels:
        layout = _without_rules(layout)
    fixed = jax.device_put(fixed, replicated(layout.mesh))
    loss_of = classification_loss if config.labels else language_model_loss
    loss = loss_of(graph, config.loss, layout.collectives)
    plain = loss_of(graph, LossConfig(), layout.collectives)
    if fixed:
        loss = adapted(loss, config.lora)
        plain = adapted(plain, dataclasses.replace(config.lora, dropout=0.0))
    rows = config.data
    plan = RowPlan(train.lengths, rows.sequence_length, seed=config.train.seed)
    epoch_steps = plan.rows_in_epoch() / rows.batch_size
    training = Training(
        config=config,
        steps=config.train.steps or max(1, math.ceil(config.train.epochs * epoch_steps)),
        epoch_steps=epoch_steps,
        loss=loss,
        held_out=Development(plain, development, config, layout, fixed),
        batches=shuffled_batches(
            train,
            sequence_length=rows.sequence_length,
            batch_size=rows_per_host(rows.batch_size, layout.mesh, config.train.accumulation),
            seed=config.train.seed,
            process_index=reader(layout.mesh).index,
            process_count=reader(layout.mesh).count,
        ),
        fixed=fixed,
        decayed=_all if fixed else _decayed,
        tokenizer=weights.tokenizer_file,
        hooks=[(1, AdapterCheck())] if fixed else [],
        kept=kept,
        notes=_notes(train, development, params, weights.params if fixed else None),
    )
    return run(training, layout, params)


def _trained(config: FinetuneConfig, weights: Weights) -> tuple[Params, tuple[Any, ...], dict[str, Any]]:
    """What is trained, what the loss is given besides, and what checkpoints say of that."""
    adapters, head = jax.random.split(jax.random.key(config.train.seed))
    params: Params = dict(weights.params)
    fixed: tuple[Any, ...] = ()
    kept: dict[str, Any] = {}
    if config.lora.rank:
        params = init_adapters(weights.params, config.lora.targets, config.lora.rank, adapters)
        fixed, kept = (weights.params,), {"base_sha256": fingerprint(weights.params)}
    if config.labels:
        width, known = config.model.d_model, weights.classifier
        if known is not None and known.labels == tuple(config.labels):
            params["classifier"] = known.weight
        else:
            params["classifier"] = initializers.linear(width)(head, (len(config.labels), width))
    return params, fixed, kept


def _without_rules(layout: Layout) -> Layout:
    """Every device holds all parameters: the rules know neither adapters nor classifiers."""
    if layout.mesh.shape["tensor"] > 1:
        raise UserError(f"mesh.tensor = {layout.mesh.shape['tensor']}: must be 1 for adapters and classifiers")
    return Layout(layout.mesh)


def _all(params: Params) -> Params:
    return jax.tree.map(lambda _: True, params)


def _decayed(params: Params) -> Params:
    """As in pretraining. A classifier is decayed; a language model's head that it leaves unused is not."""
    if "classifier" not in params:
        return decay_mask(params)
    mask = decay_mask({name: value for name, value in params.items() if name != "classifier"})
    return mask | {"classifier": True} | ({"lm_head": False} if "lm_head" in mask else {})


def _notes(train: EncodedExamples, development: EncodedExamples, params: Params, base: Params | None) -> list[str]:
    notes = [f"{len(train):,} examples to train on, {len(development):,} to stop by"]
    if shortened := train.shortened + development.shortened:
        notes.append(f"{shortened:,} prompts do not fit into a row and lose their beginning (data.sequence_length)")
    if base is not None:
        count, of = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, base))
        notes.append(f"adapters: {count / 1e6:.2f} M parameters beside {of / 1e6:.1f} M that stay as they are")
    return notes


# --- Losses ----------------------------------------------------------------------------------------------------------


def classification_loss(graph: nnx.GraphDef, config: LossConfig, collectives: Collectives = UNSHARDED) -> LossFunction:
    """As `language_model_loss`, of classes: targets are rows of params["classifier"] instead of tokens."""

    def loss(params: Any, batch: Batch) -> tuple[Array, LossSums]:
        head = params["classifier"]
        model: LanguageModel = nnx.merge(graph, {name: value for name, value in params.items() if name != "classifier"})
        hidden, _ = model.hidden(batch["inputs"], segment_ids=batch["segment_ids"], collectives=collectives)
        sums = target_sums(hidden.astype(head.dtype), head, head.shape[0], batch, config)
        return sums.loss, sums

    return loss


def adapted(loss: LossFunction, config: LoraConfig) -> LossFunction:
    """`loss` as a function of adapters: (adapters, batch, weights that they are added to)."""

    def adapted_loss(adapters: Any, batch: Batch, base: Any) -> tuple[Array, LossSums]:
        if config.dropout:
            # Drawn from the tokens themselves: a resumed run draws the same, and there is no key to carry along.
            tokens = batch["inputs"].reshape(-1).astype(jnp.uint32)
            seed = (tokens * jnp.arange(1, tokens.size + 1, dtype=jnp.uint32)).sum()
            adapters = drop_inputs(adapters, config.dropout, jax.random.key(seed))
        return loss(merge(base, adapters, config.scale), batch)

    return adapted_loss


# --- Between steps ---------------------------------------------------------------------------------------------------


class Development:
    """Evaluates parameters on the development split: loss and accuracy of what is predicted."""

    def __init__(
        self,
        loss: LossFunction,
        examples: EncodedExamples,
        config: FinetuneConfig,
        layout: Layout,
        fixed: tuple[Any, ...],
    ):
        self._examples, self._rows, self._mesh = examples, config.data, layout.mesh
        self._sums = SummedLoss(loss, layout, fixed)

    def __call__(self, params: Any) -> dict[str, float]:
        """Loss in nats, and the share of first guesses that are right, of answers' tokens or of classes."""
        batches = every_batch(
            self._examples,
            sequence_length=self._rows.sequence_length,
            batch_size=rows_per_host(self._rows.batch_size, self._mesh),
            process_index=reader(self._mesh).index,
            process_count=reader(self._mesh).count,
        )
        sums = self._sums(params, batches)
        count = sums["weight"]
        return {"loss": sums["nll"] / count, "accuracy": sums["correct"] / count, "targets": int(count)}


class AdapterCheck:
    """Ends a run some steps after its start unless every adapter of every layer has had a gradient.

    The optimizer's first moment tells: it stays exactly zero where no gradient ever came.
    """

    def __init__(self) -> None:
        self._done = False
        self._any: Callable[[Any], Any] = jax.jit(lambda tree: jax.tree.map(lambda x: (x != 0).any((-2, -1)), tree))

    def __call__(self, step: int, state: TrainState) -> None:
        """The hook."""
        if self._done or step < CHECKED_STEP or int(state.step - state.skipped) < CHECKED_STEP:
            return
        self._done = True
        moments = optax.tree_utils.tree_get(state.optimizer, "mu")
        reached = jax.device_get(self._any(moments))
        names, flags = jax.tree.leaves(path_names(moments)), jax.tree.leaves(reached)
        dead = [
            name + (f" (layers {', '.join(map(str, np.flatnonzero(~flag)))})" if flag.ndim else "")
            for name, flag in zip(names, flags, strict=True)
            if not flag.all()
        ]
        if dead:
            raise UserError(
                f"lora: no gradient has reached {'; '.join(dead)} in {step} steps: nothing that is learnt depends on "
                "it; leave it out of lora.targets"
            )
