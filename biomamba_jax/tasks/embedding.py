"""Embeddings of texts: a weighted mean of the hidden states after their tokens.

As in training a text follows its start token, whose own state counts only where the text is empty, and rows are packed:
each text is a segment. One that is longer than a row continues in the next ones with the recurrent state, so that
memory does not depend on its length.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from biomamba_jax.config.embed import EmbeddingConfig, Pooling
from biomamba_jax.data.packing import Piece
from biomamba_jax.data.tokenizer import Tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.model.decode import InferenceModel, LayerStates
from biomamba_jax.model.state import empty_state
from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.tasks.devices import over_rows, row_mesh, rows_of
from biomamba_jax.tasks.padding import bucket_length, bucket_rows, filled_rows, packed_batches


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
        return finite(self.of_ids([[self._tokenizer.start_id, *each] for each in ids]), self._name)

    def of_ids(self, rows: Sequence[list[int]]) -> Float[np.ndarray, "texts D"]:
        """Return the embedding of each list of ids, float32; the first id of each is the start token."""
        model = self._model
        arrays = [np.asarray(row, np.int32) for row in rows]
        lengths = np.array([row.size for row in arrays], np.int64)
        vectors = np.zeros((len(rows), model.config.d_model))
        width = min(self._config.chunk, bucket_length(int(lengths.sum())))
        for batches in packed_batches(lengths, width, self._rows):
            count = min(self._rows, rows_of(bucket_rows(len(batches[0])), self._mesh))
            states: LayerStates = (empty_state(model.config, count, model.dtype),) * model.config.n_layers
            for batch in batches:
                inputs = filled_rows(batch, count, width, lambda index: (arrays[index], arrays[index]))
                inputs["weights"] = self._weights(batch, lengths, inputs["segment_ids"])
                sums, states = _weighted_sums(model, inputs, states, self._mesh)
                for pieces, of_row in zip(batch, np.asarray(sums), strict=False):
                    for piece, of_text in zip(pieces, of_row, strict=False):
                        vectors[piece.document] += of_text
        return vectors.astype(np.float32)

    def _weights(
        self, batch: Sequence[Sequence[Piece]], lengths: np.ndarray, segment_ids: np.ndarray
    ) -> Float[np.ndarray, "B T L"]:
        """Return the weights of each state of a row in the vector of each of its texts, float32."""
        rows, width = segment_ids.shape
        weights = np.zeros((rows, bucket_rows(max(map(len, batch))), width), np.float32)
        for row, pieces in enumerate(batch):
            for text, (document, start, stop) in enumerate(pieces):
                of_text = pooling_weights(self._config.pooling, int(lengths[document]), start, stop)
                weights[row, text, segment_ids[row] == text + 1] = of_text
        return weights


def finite(vectors: np.ndarray, name: str) -> np.ndarray:
    """Return the embeddings of the model `name`.

    Raises:
      UserError: one is NaN or infinite.
    """
    if not np.isfinite(vectors).all():
        raise UserError(f"{name}: its hidden states are NaN or infinite: damaged weights, or an overflow")
    return vectors


def pooling_weights(pooling: Pooling, length: int, start: int, stop: int) -> Float[np.ndarray, " positions"]:
    """Return the weights, which sum to 1 over a text, of the states at positions start ... stop - 1.

    Args:
      pooling: "weighted" is proportional to the position (Muennighoff 2022, SGPT).
      length: tokens of the text, the start token at position 0 included; without others it is the text.
      start: first position.
      stop: end of the positions.
    """
    position = np.arange(start, stop)
    if pooling == "last" or length == 1:
        return (position == length - 1).astype(np.float64)
    return position / (length * (length - 1) // 2) if pooling == "weighted" else (position > 0) / (length - 1)


@partial(jax.jit, static_argnames=("mesh",))
def _weighted_sums(
    model: InferenceModel, rows: dict[str, Array], states: LayerStates, mesh: Mesh
) -> tuple[Float[Array, "B T D"], LayerStates]:
    """Return sums of hidden states by rows["weights"] [B T L], and the states after the rows."""

    def local(model: InferenceModel, rows: dict[str, Array], states: LayerStates) -> tuple[Array, LayerStates]:
        hidden, after = model.hidden(rows["inputs"], states, rows["segment_ids"])
        exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        return jnp.einsum("btl,bld->btd", rows["weights"], hidden.astype(jnp.float32), **exact), after

    return over_rows(local, mesh)(model, rows, states)
