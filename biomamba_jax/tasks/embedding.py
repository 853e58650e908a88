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

from biomamba_jax.config.embed import EmbeddingConfig
from biomamba_jax.data.tokenizer import Tokenizer
from biomamba_jax.errors import UserError
from biomamba_jax.model.decode import InferenceModel, LayerStates
from biomamba_jax.model.pooling import pooling_weights
from biomamba_jax.ops.array_typing import Array, Float
from biomamba_jax.tasks.devices import over_rows, row_mesh, rows_of
from biomamba_jax.tasks.packed import run_packed
from biomamba_jax.tasks.padding import bucket_rows


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
        inputs = [np.asarray(row, np.int32) for row in rows]
        places = [np.arange(ids.size) for ids in inputs]
        weights = [pooling_weights(self._config.pooling, own, own == len(own) - 1).astype(np.int32) for own in places]

        def sums(rows: dict[str, np.ndarray], states: LayerStates) -> tuple[Array, LayerStates]:
            texts = bucket_rows(int(rows["segment_ids"].max()))
            return _weighted_sums(self._model, rows, states, texts, self._mesh)

        vectors = np.zeros((len(rows), self._model.config.d_model))
        shape = self._config.chunk, self._rows, self._mesh
        for batch, of_rows in run_packed(self._model, inputs, sums, *shape, targets=weights):
            for pieces, of_row in zip(batch, of_rows, strict=False):
                for piece, of_text in zip(pieces, of_row, strict=False):
                    vectors[piece.document] += of_text
        return (vectors / np.array([own.sum() for own in weights])[:, None]).astype(np.float32)


def finite(values: np.ndarray, name: str, what: str = "hidden states") -> np.ndarray:
    """Return what a model computed.

    Args:
      values: floating-point numbers.
      name: the model's name, for the message.
      what: what the numbers are of, for the message.

    Raises:
      UserError: one is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise UserError(f"{name}: its {what} are NaN or infinite: damaged weights, or an overflow")
    return values


@partial(jax.jit, static_argnames=("texts", "mesh"))
def _weighted_sums(
    model: InferenceModel, rows: dict[str, Array], states: LayerStates, texts: int, mesh: Mesh
) -> tuple[Float[Array, "B T D"], LayerStates]:
    """Return sums of the hidden states of each of a row's `texts` by rows["targets"], and the states after the rows."""

    def local(model: InferenceModel, rows: dict[str, Array], states: LayerStates) -> tuple[Array, LayerStates]:
        hidden, after = model.hidden(rows["inputs"], states, rows["segment_ids"])
        of_text = rows["segment_ids"][:, None] == jnp.arange(1, texts + 1)[:, None]
        weights = jnp.where(of_text, rows["targets"][:, None], 0).astype(jnp.float32)
        exact = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
        return jnp.einsum("btl,bld->btd", weights, hidden.astype(jnp.float32), **exact), after

    return over_rows(local, mesh)(model, rows, states)
