"""Loss on held-out text during training: token-weighted, with every token of every document predicted."""

import itertools
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
from flax import nnx

from biomamba_jax.config import DataConfig, LossConfig, RowsConfig
from biomamba_jax.data.examples import EncodedExamples
from biomamba_jax.data.pipeline import Batch, evaluation_batches
from biomamba_jax.data.shards import open_split
from biomamba_jax.errors import UserError
from biomamba_jax.ops.cross_entropy import LossSums, perplexity
from biomamba_jax.parallel.layout import Layout
from biomamba_jax.parallel.mesh import host_batch, shard_batch
from biomamba_jax.train.step import LossFunction, language_model_loss

Metrics = dict[str, float]


class LossEvaluator:
    """Evaluates parameters by a loss summed over the same batches every time, on all devices.

    Args:
      loss: of one device's shard; see `language_model_loss`.
      layout: devices, and the sharding of parameters.
      batches: returns this host's batches.
      metrics: the metrics to report, of `LossSums` by name.
      frozen: further arguments of the loss.
    """

    def __init__(
        self,
        loss: LossFunction,
        layout: Layout,
        batches: Callable[[], Iterable[Batch]],
        metrics: Callable[[Metrics], Metrics],
        frozen: tuple[Any, ...] = (),
    ):
        sums = layout.sharded_sum(lambda *arguments: (loss(*arguments)[1], None), with_gradients=False)
        self._sums, self._mesh, self._frozen = jax.jit(sums), layout.mesh, frozen
        self._batches, self._metrics = batches, metrics

    def __call__(self, params: Any) -> Metrics:
        """Return the metrics of parameters; sums are accumulated over batches in float64."""
        total = dict.fromkeys(LossSums._fields, 0.0)
        for batch in self._batches():
            sums, _ = jax.device_get(self._sums(params, shard_batch(batch, self._mesh), *self._frozen))
            total = {name: total[name] + float(value) for name, value in sums._asdict().items()}
        return self._metrics(total)


def held_out_evaluator(graph: nnx.GraphDef, data: DataConfig, layout: Layout, count: int | None) -> LossEvaluator:
    """Return an evaluator of the plain cross-entropy on the validation split, without smoothing and z-loss.

    Args:
      graph: the model's graph definition.
      data: shards and batch size.
      layout: devices, and the sharding of parameters.
      count: number of batches; None for the whole split, whose bits per byte are exact. Those of fewer batches assume
        the split's mean bytes per token.

    Raises:
      UserError: the split is empty.
    """
    manifest, documents = open_split(data.path, "validation")
    info = manifest.splits["validation"]
    if info.documents == 0:
        raise UserError(f"{data.path}: the validation split is empty; prepare with a larger validation_fraction")
    bytes_per_token = info.bytes / info.tokens
    rows = host_batch(data.batch_size, layout.mesh)

    def batches() -> Iterable[Batch]:
        return itertools.islice(evaluation_batches(documents, sequence_length=data.sequence_length, **rows), count)

    def metrics(sums: Metrics) -> Metrics:
        loss = sums["nll"] / sums["weight"]
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "bits_per_byte": loss / math.log(2) / bytes_per_token,
            "tokens": int(sums["weight"]),
        }

    return LossEvaluator(language_model_loss(graph, LossConfig(), layout.collectives), layout, batches, metrics)


def examples_evaluator(
    loss: LossFunction,
    layout: Layout,
    examples: EncodedExamples,
    rows: RowsConfig,
    unit: str,
    frozen: tuple[Any, ...] = (),
) -> LossEvaluator:
    """Return an evaluator of the mean loss and accuracy of examples.

    Args:
      loss: see `LossEvaluator`.
      layout: devices, and the sharding of parameters.
      examples: the held-out examples.
      rows: shape of a batch.
      unit: name of what the loss counts; its number is a metric.
      frozen: further arguments of the loss.
    """
    of_host = host_batch(rows.batch_size, layout.mesh)
    batches = partial(evaluation_batches, examples, sequence_length=rows.sequence_length, **of_host)

    def metrics(sums: Metrics) -> Metrics:
        count = sums["weight"]
        return {"loss": sums["nll"] / count, "accuracy": sums["correct"] / count, unit: int(count)}

    return LossEvaluator(loss, layout, batches, metrics, frozen)
