"""Loss on held-out text during training: token-weighted, every token of every document predicted."""

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
from biomamba_jax.parallel.mesh import reader, rows_per_host, shard_rows
from biomamba_jax.train.step import LossFunction, language_model_loss


class SummedLoss:
    """Adds up a loss over batches, on all devices.

    Args:
      fixed: further arguments of the loss.
    """

    def __init__(self, loss: LossFunction, layout: Layout, fixed: tuple[Any, ...] = ()):
        sums = layout.summed(lambda params, batch, *fixed: (loss(params, batch, *fixed)[1], None), with_gradients=False)
        self._sums, self._mesh, self._fixed = jax.jit(sums), layout.mesh, fixed

    def __call__(self, params: Any, batches: Iterable[Batch]) -> dict[str, float]:
        """`LossSums` by name, added up in float64: those of many batches are too large for float32."""
        total = dict.fromkeys(LossSums._fields, 0.0)
        for batch in batches:
            sums, _ = jax.device_get(self._sums(params, shard_rows(batch, self._mesh), *self._fixed))
            total = {name: total[name] + float(value) for name, value in sums._asdict().items()}
        return total


class HeldOut:
    """Evaluates parameters on one split of the shards, always on the same batches.

    Args:
      batches: how many batches; None takes the whole split, and then bits per byte are exact. Otherwise they are those
        of the split's mean bytes per token.
    """

    def __init__(
        self, graph: nnx.GraphDef, data: DataConfig, layout: Layout, *, batches: int | None, split: str = "validation"
    ):
        self.data, self.mesh, self.split = data, layout.mesh, split
        info = Manifest.load(data.path).splits[split]
        if info.documents == 0:
            raise UserError(f"{data.path}: the {split} split is empty; prepare with a larger {split}_fraction")
        self.batches = batches
        self.bytes_per_token = info.bytes / info.tokens
        # What is reported is the plain cross-entropy, whatever the training loss adds to it.
        self.sums = SummedLoss(language_model_loss(graph, LossConfig(), layout.collectives), layout)

    def __call__(self, params: Any) -> dict[str, float]:
        """Loss in nats per token, perplexity and bits per byte."""
        batches = evaluation_batches(
            self.data.path,
            sequence_length=self.data.sequence_length,
            batch_size=rows_per_host(self.data.batch_size, self.mesh),
            process_index=reader(self.mesh).index,
            process_count=reader(self.mesh).count,
            split=self.split,
        )
        sums = self.sums(params, itertools.islice(batches, self.batches))
        loss = sums["nll"] / sums["weight"]
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "bits_per_byte": loss / math.log(2) / self.bytes_per_token,
            "tokens": int(sums["weight"]),
        }


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf
