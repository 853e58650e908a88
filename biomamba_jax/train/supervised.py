"""Fine-tuning on prompts and answers, of the whole model or of LoRA adapters, by the loop that pretraining uses.

What differs from pretraining is decided here: which parameters are trained (all, or adapters next to frozen weights),
what the targets are (the examples say), and what predicts them (the language model's head or another one).
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from biomamba_jax.config import FinetuneConfig, LoraConfig, LossConfig
from biomamba_jax.config.checks import check
from biomamba_jax.config.heads import HeadConfig
from biomamba_jax.data.examples import EncodedExamples
from biomamba_jax.data.tokenizer import load_tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.interop import Weights
from biomamba_jax.interop.adapters import fingerprint
from biomamba_jax.interop.vocabulary import identity
from biomamba_jax.model import heads, initializers
from biomamba_jax.model.lora import drop_inputs, init_adapters, merge
from biomamba_jax.ops.array_typing import Array
from biomamba_jax.ops.cross_entropy import LossSums
from biomamba_jax.parallel.collectives import UNSHARDED, Collectives
from biomamba_jax.parallel.layout import Layout
from biomamba_jax.parallel.mesh import make_mesh, replicated
from biomamba_jax.parallel.sharding import leaves_by_path
from biomamba_jax.train.heldout import examples_evaluator
from biomamba_jax.train.loop import TrainingRun, run
from biomamba_jax.train.optimizer import Params, decay_mask
from biomamba_jax.train.program import abstract_model, train_program
from biomamba_jax.train.setup import example_steps
from biomamba_jax.train.step import Batch, LossFunction, TrainState, cross_entropy_sums, language_model_loss

CHECKED_STEP = 3
"""Updates after which every adapter must have had a gradient. The first one reaches B alone, since B is initialised to
zero; the second reaches A too, and one is to spare."""


def finetune(config: FinetuneConfig, weights: Weights, train: EncodedExamples, development: EncodedExamples) -> bool:
    """Fine-tune as `config` says, from the newest checkpoint in its run directory where there is one.

    Args:
      config: the run, with the model of `weights`, and with `labels` if its head is not the language model's.
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
    mesh, lora = layout.mesh, config.lora
    adapters, head = bool(lora.rank), config.head_config
    base = weights.params
    if head is not None and head.reading == "bidirectional":
        base = heads.with_reversed(base, weights.head.reversed if weights.head else None)
    params = _trained_params(config, weights, base)
    if adapters or head is not None:  # the sharding rules know neither: all parameters are replicated
        for axis in ("tensor", "sequence") if head is not None else ("tensor",):
            check(mesh.shape[axis] == 1, f"mesh.{axis}", mesh.shape[axis], "must be 1 for adapters and heads")
        layout = Layout(mesh)
    file = weights.tokenizer_file
    known = {"tokenizer": identity(load_tokenizer(file))} if file else {}
    frozen = (jax.device_put(base, replicated(mesh)),) if adapters else ()

    def loss(loss_config: LossConfig, lora: LoraConfig) -> LossFunction:
        if head is None:
            function = language_model_loss(graph, loss_config, layout.collectives)
        else:
            function = head_loss(graph, head, loss_config, layout.collectives)
        return adapted(function, lora) if adapters else function

    steps, epoch_steps = example_steps(config, train)
    trained, held_out = loss(config.loss, lora), loss(LossConfig(), dataclasses.replace(lora, dropout=0.0))
    mask = partial(jax.tree.map, lambda _: True) if adapters else _decay_mask
    program = train_program(config, graph, layout, trained, steps, params=params, weight_decay_mask=mask)
    training = TrainingRun(
        config=config,
        program=program,
        steps=steps,
        epoch_steps=epoch_steps,
        evaluate=examples_evaluator(held_out, layout, development, config.data, "targets", frozen),
        documents=train,
        frozen=frozen,
        tokenizer=weights.tokenizer_file,
        hooks=[(1, AdapterCheck())] if adapters else [],
        identity=known | ({"base_sha256": fingerprint(weights.params)} if adapters else {}),
        messages=[*data_messages(train, development), *_adapter_messages(params, base if adapters else None)],
    )
    return run(training, params)


def _trained_params(config: FinetuneConfig, weights: Weights, base: Params) -> Params:
    adapters, key = jax.random.split(jax.random.key(config.train.seed))
    params: Params = dict(base)
    if config.lora.rank:
        params = init_adapters(base, config.lora.targets, config.lora.rank, adapters)
    if (head := config.head_config) is not None:
        if (known := weights.head) is not None and known.config == head:
            params["head"] = {"weight": known.weight, "bias": known.bias}
        else:
            count, width = len(head.labels), head.width(config.model.d_model)
            weight = initializers.linear(width)(key, (count, width))
            params["head"] = {"weight": weight, "bias": jnp.zeros(count)}
    return params


def _decay_mask(params: Params) -> Params:
    """Return pretraining's mask; a head's weight is decayed, a language model head that it leaves unused is not."""
    mask = decay_mask({name: value for name, value in params.items() if name not in ("head", "reversed")})
    if "reversed" in params:
        mask["reversed"] = {name: mask[name] for name in params["reversed"]}
    if "head" in params:
        mask |= {"head": {"weight": True, "bias": False}} | ({"lm_head": False} if "lm_head" in mask else {})
    return mask


def data_messages(train: EncodedExamples, development: EncodedExamples) -> list[str]:
    """Return lines about the number of examples and what is cut or left out of them."""
    messages = [f"{len(train):,} examples to train on, {len(development):,} for early stopping"]
    if shortened := train.shortened + development.shortened:
        messages.append(f"{shortened:,} texts do not fit into a row and are cut (data.sequence_length)")
    if left_out := train.left_out + development.left_out:
        messages.append(f"{left_out:,} questions are left out: no answer of whole words in the text of their row")
    return messages


def _adapter_messages(params: Params, base: Params | None) -> list[str]:
    if base is None:
        return []
    trained, frozen = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, base))
    return [f"adapters: {trained / 1e6:.2f} M trained parameters, {frozen / 1e6:.1f} M frozen ones"]


# --- Losses ----------------------------------------------------------------------------------------------------------


def head_loss(
    graph: nnx.GraphDef, head: HeadConfig, config: LossConfig, collectives: Collectives = UNSHARDED
) -> LossFunction:
    """Return the summed loss of a head; see `model.heads` for its parameters and its targets.

    Args:
      graph: the model's graph definition.
      head: kind, labels and reading.
      config: smoothing and z-loss of a softmax over labels.
      collectives: see `language_model_loss`.
    """

    def loss(params: Any, batch: Batch) -> tuple[Array, LossSums]:
        weight, bias = params["head"]["weight"], params["head"]["bias"]
        targets, segments = batch["targets"], batch["segment_ids"]
        hidden = heads.head_hidden(graph, params, head, batch["inputs"], segments, collectives).astype(weight.dtype)
        if head.kind in ("classifier", "token_classifier"):  # the bias is the weight of a state that is always 1
            hidden = jnp.concatenate([hidden, jnp.ones_like(hidden[..., :1])], -1)
            weight = jnp.concatenate([weight, bias[:, None]], -1)
            sums = cross_entropy_sums(hidden, weight, len(head.labels), batch, config)
        else:
            logits = jnp.matmul(hidden, weight.T, precision=jax.lax.Precision.HIGHEST) + bias
            valid = (segments != 0) & (targets >= 0)
            if head.kind == "multi_label":
                sums = heads.multi_label_sums(logits, targets, valid)
            elif head.kind == "regression":
                sums = heads.regression_sums(logits, targets, valid)
            else:
                sums = heads.span_sums(logits, targets, valid, segments)
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
        self._any: Callable[[Any], Any] = jax.jit(
            lambda tree: jax.tree.map(lambda x: (x != 0).any(tuple(range(-min(x.ndim, 2), 0))), tree)
        )

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
