"""Loss on held-out text during training: token-weighted, with every token of every document predicted."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx

from biomamba_jax.config import DataConfig, LossConfig
from biomamba_jax.data.pipeline import Batch, evaluation_batches
from biomamba_jax.data.shards import Manifest
from biomamba_jax.errors import UserError
from biomamba_jax.ops.cross_entropy import LossSums
from biomamba_jax.parallel.layout import Layout
from biomamba_jax.parallel.mesh import host_batch, shard_batch
from biomamba_jax.train.step import LossFunction, language_model_loss


class LossEvaluator:
    """Sums a loss over batches, on all devices.

    Args:
      loss: of one device's shard; see `language_model_loss`.
      layout: devices, and the sharding of parameters.
      frozen: further arguments of the loss.
    """

    def __init__(self, loss: LossFunction, layout: Layout, frozen: tuple[Any, ...] = ()):
        sums = layout.sharded_sum(lambda *arguments: (loss(*arguments)[1], None), with_gradients=False)
        self._sums, self._mesh, self._frozen = jax.jit(sums), layout.mesh, frozen

    def __call__(self, params: Any, batches: Iterable[Batch]) -> dict[str, float]:
        """Return `LossSums` by name, accumulated over batches in float64: float32 would lose digits."""
        total = dict.fromkeys(LossSums._fields, 0.0)
        for batch in batches:
            sums, _ = jax.device_get(self._sums(params, shard_batch(batch, self._mesh), *self._frozen))
            total = {name: total[name] + float(value) for name, value in sums._asdict().items()}
        return total


class HeldOutEvaluator:
    """Evaluates parameters on the validation split of the shards, always on the same batches.

    Args:
      graph: the model's graph definition.
      data: shards and batch size.
      layout: devices, and the sharding of parameters.
      batches: number of batches; None for the whole split, whose bits per byte are exact. Those of fewer batches assume
        the split's mean bytes per token.
    """

    def __init__(self, graph: nnx.GraphDef, data: DataConfig, layout: Layout, *, batches: int | None):
        info = Manifest.load(data.path).splits["validation"]
        if info.documents == 0:
            raise UserError(f"{data.path}: the validation split is empty; prepare with a larger validation_fraction")
        self._data, self._mesh, self._batches = data, layout.mesh, batches
        self._bytes_per_token = info.bytes / info.tokens
        # The plain cross-entropy, without the smoothing and z-loss of the training loss.
        self._sums = LossEvaluator(language_model_loss(graph, LossConfig(), layout.collectives), layout)

    def __call__(self, params: Any) -> dict[str, float]:
        """Return loss in nats per token, perplexity, bits per byte and the number of tokens."""
        batches = evaluation_batches(
            self._data.path,
            sequence_length=self._data.sequence_length,
            **host_batch(self._data.batch_size, self._mesh),
        )
        sums = self._sums(params, itertools.islice(batches, self._batches))
        loss = sums["nll"] / sums["weight"]
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "bits_per_byte": loss / math.log(2) / self._bytes_per_token,
            "tokens": int(sums["weight"]),
        }


def perplexity(loss: float) -> float:
    """Return exp(loss), infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
