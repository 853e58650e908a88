"""Embeddings of texts: a weighted mean of the hidden states after their tokens.

As in training a text follows its start token, whose own state counts only where the text is empty. A long text is
read in rows of a fixed number of tokens with the recurrent state carried, so memory does not depend on its length.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from biomamba_jax.config.embed import EmbeddingConfig, Pooling
from biomamba_jax.data.tokenizer import Tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.model.decode import InferenceModel, LayerStates
from biomamba_jax.model.state import empty_state
from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.tasks.devices import over_rows, row_mesh, rows_of
from biomamba_jax.tasks.padding import batched, bucket_length, bucket_rows, pad_right


class Embedder:
    """Turns texts into vectors.

    Args:
      model: the model.
      tokenizer: its tokenizer.
      config: pooling, tokens of a row and rows of a batch.
      name: the model's name in errors.
    """

    def __init__(self, model: InferenceModel, tokenizer: Tokenizer, config: EmbeddingConfig, name: str = "the model"):
        self._model, self._tokenizer, self._config, self._name = model, tokenizer, config, name
        self._mesh = row_mesh()
        self._rows = rows_of(config.batch_size, self._mesh)
        self.tokens = 0
        """Tokens of all texts embedded so far."""

    def __call__(self, texts: Sequence[str]) -> Float[np.ndarray, "texts D"]:
        """Return the embedding of each text, float32.

        Raises:
          UserError: an embedding is NaN or infinite.
        """
        ids = self._tokenizer.encode_batch(texts)
        self.tokens += sum(map(len, ids))
        vectors = self.of_ids([[self._tokenizer.start_id, *each] for each in ids])
        if not np.isfinite(vectors).all():
            raise UserError(f"{self._name}: its hidden states are NaN or infinite: damaged weights, or an overflow")
        return vectors

    def of_ids(self, rows: Sequence[list[int]]) -> Float[np.ndarray, "texts D"]:
        """Return the embedding of each list of ids, float32; the first id of each is the start token.

        Texts of similar length are computed together. Of a batch, the rows that end first are masked.
        """
        vectors = np.empty((len(rows), self._model.config.d_model), np.float32)
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        for chosen in batched(order, self._rows):
            vectors[chosen] = self._pool([rows[index] for index in chosen])[: len(chosen)]
        return vectors

    def _pool(self, rows: Sequence[list[int]]) -> Float[np.ndarray, "B D"]:
        model, chunk = self._model, self._config.chunk
        batch = min(self._rows, rows_of(bucket_rows(len(rows)), self._mesh))
        lengths = np.zeros(batch, np.int64)
        lengths[: len(rows)] = [len(row) for row in rows]
        longest, total = int(lengths.max()), np.zeros((batch, model.config.d_model))
        states: LayerStates | None = None
        if longest > chunk:
            states = (empty_state(model.config, batch, model.dtype),) * model.config.n_layers
        for start in range(0, longest, chunk):
            width = min(chunk, bucket_length(longest - start))
            part = pad_right([row[start : start + width] for row in rows], (batch, width))
            weights = pooling_weights(self._config.pooling, lengths, start, width)
            sums, states = _weighted_sums(model, {"inputs": part, "weights": weights}, states, self._mesh)
            total += np.asarray(sums, np.float64)
        return total.astype(np.float32)


def pooling_weights(pooling: Pooling, lengths: np.ndarray, start: int, width: int) -> Float[np.ndarray, "B width"]:
    """Return the weights, which sum to 1 over a text, of the states at positions start ... start + width - 1, float32.

    Args:
      pooling: "weighted" is proportional to the position (Muennighoff 2022, SGPT).
      lengths: tokens of each text, the start token at position 0 included, integers [B].
      start: first position.
      width: number of positions.
    """
    position, length = np.arange(start, start + width), np.maximum(lengths, 1)[:, None]
    if pooling == "last":
        return np.where(position == lengths[:, None] - 1, 1, 0).astype(np.float32)
    counts = position if pooling == "weighted" else np.minimum(position, 1)
    counts = np.where(lengths[:, None] == 1, 1, counts)
    sums = np.where(length == 1, 1, length * (length - 1) // 2 if pooling == "weighted" else length - 1)
    return np.where(position < lengths[:, None], counts / sums, 0).astype(np.float32)


@partial(jax.jit, static_argnames=("mesh",))
def _weighted_sums(
    model: InferenceModel, rows: dict[str, Array], states: LayerStates | None, mesh: Mesh
) -> tuple[Float[Array, "B D"], LayerStates | None]:
    """Return sums of hidden states by rows["weights"], and the states after the row where there were some before."""

    def local(
        model: InferenceModel, rows: dict[str, Array], states: LayerStates | None
    ) -> tuple[Array, LayerStates | None]:
        hidden, after = model.hidden(rows["inputs"], states)
        exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        sums = jnp.einsum("bl,bld->bd", rows["weights"], hidden.astype(jnp.float32), **exact)
        return sums, None if states is None else after

    return over_rows(local, mesh)(model, rows, states)
