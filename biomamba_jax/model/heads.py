"""Heads on a backbone: hidden states from one or two directions, and losses other than a softmax over labels.

Parameters in addition to the language model's: "head", {"weight": [K D], "bias": [K]}, and, for a bidirectional head,
"reversed", the layers and final norm of the backbone that reads from right to left; D is then twice d_model. Targets
are int32 like tokens: an index, a set of labels as bits, the bits of a float32 that is not negative, or, for spans, 1
for the first word of the answer plus 2 for its last one. Negative targets do not count.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from biomamba_jax.config.heads import HeadConfig
from biomamba_jax.model.language_model import LanguageModel
from biomamba_jax.ops.array_typing import Array, Bool, Float, Int
from biomamba_jax.ops.cross_entropy import LossSums
from biomamba_jax.ops.numerics import segment_ends, segment_firsts, softplus
from biomamba_jax.parallel.collectives import UNSHARDED, Collectives

Params = Mapping[str, Any]

REVERSED = ("layers", "norm_f")
"""Parameters that a bidirectional head has a second time, under "reversed"."""
TOLERANCE = 0.5
"""A regression's score that is this near to the true one counts as correct in the training log's accuracy."""


def with_reversed(params: Params, known: Params | None = None) -> dict[str, Any]:
    """Return a language model's parameters with a backbone that reads backwards.

    Args:
      params: of the language model.
      known: the backbone, where one has been trained; None for one that equals the language model's.
    """
    return {**params, "reversed": known or {name: params[name] for name in REVERSED}}


def reversed_order(segment_ids: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """Return the index of the token at each place once every segment, but for its first token, is reversed.

    The first token is the start token, with which both directions begin. The order is its own inverse.
    """
    place, first = jnp.arange(segment_ids.shape[1]), segment_firsts(segment_ids)
    last = jax.lax.cummin(jnp.where(segment_ends(segment_ids), place, len(place)), axis=1, reverse=True)
    return jnp.where(place == first, place, first + 1 + last - place)


def head_hidden(
    graph: nnx.GraphDef,
    params: Params,
    head: HeadConfig,
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"],
    collectives: Collectives = UNSHARDED,
) -> Float[Array, "B L D"]:
    """Return the hidden states that a head's weight multiplies; those of both directions are concatenated.

    Args:
      graph: the language model's graph definition.
      params: of the language model, and "reversed" for a bidirectional head.
      head: its kind and reading.
      tokens: token ids; each segment begins with the start token.
      segment_ids: text of each token.
      collectives: of the devices that the model is sharded over.
    """
    own = {name: value for name, value in params.items() if name not in ("head", "reversed")}
    model: LanguageModel = nnx.merge(graph, own)
    hidden, _ = model.hidden(tokens, segment_ids=segment_ids, collectives=collectives)
    if head.reading != "bidirectional":
        return hidden
    order = reversed_order(segment_ids)
    backwards: LanguageModel = nnx.merge(graph, own | params["reversed"])
    back, _ = backwards.hidden(jnp.take_along_axis(tokens, order, 1), segment_ids=segment_ids, collectives=collectives)
    # At a segment's last place each direction has read all of the text; a word needs the states at its own place.
    if head.of_words:
        back = jnp.take_along_axis(back, order[..., None], 1)
    return jnp.concatenate([hidden, back], -1)


# --- Losses, summed over a batch -------------------------------------------------------------------------------------


def multi_label_sums(logits: Float[Array, "B L K"], targets: Int[Array, "B L"], valid: Bool[Array, "B L"]) -> LossSums:
    """Return sums of the negative log-likelihood of each text's set of labels, each label by itself."""
    wanted = (targets[..., None] >> jnp.arange(logits.shape[-1])) & 1
    nll = (softplus(logits) - logits * wanted).sum(-1)
    return _sums(nll, ((logits > 0) == (wanted == 1)).all(-1), valid)


def regression_sums(logits: Float[Array, "B L 1"], targets: Int[Array, "B L"], valid: Bool[Array, "B L"]) -> LossSums:
    """Return sums of the squared error, in place of a log-likelihood."""
    # The bits of a target that does not count are a NaN, whose gradient would be one too.
    error = logits[..., 0] - jax.lax.bitcast_convert_type(jnp.maximum(targets, 0), jnp.float32)
    return _sums(error**2, jnp.abs(error) <= TOLERANCE, valid)


def _sums(nll: Array, correct: Array, valid: Array) -> LossSums:
    nll, weight = jnp.where(valid, nll, 0).sum(), valid.sum().astype(jnp.float32)
    return LossSums(nll, nll, (correct & valid).sum().astype(jnp.float32), weight)


def span_sums(
    logits: Float[Array, "B L 2"], targets: Int[Array, "B L"], valid: Bool[Array, "B L"], segment_ids: Int[Array, "B L"]
) -> LossSums:
    """Return sums of -log p(first word) - log p(last word), each a softmax over the valid places of its segment."""
    scores = jnp.where(valid[..., None], logits, -1e30)  # finite: a segment without a valid place has no NaN
    picked = (((targets[..., None] >> jnp.arange(2)) & 1) == 1) & valid[..., None]

    def of_row(scores: Array, picked: Array, valid: Array, segments: Array) -> tuple[Array, Array]:
        count = segments.shape[0] + 1
        largest = jax.lax.stop_gradient(jax.ops.segment_max(scores, segments, count))[segments]
        total = jax.ops.segment_sum(jnp.where(valid[:, None], jnp.exp(scores - largest), 0), segments, count)
        nll = largest + jnp.log(jnp.where(total > 0, total, 1))[segments] - scores
        hits = jax.ops.segment_max((picked & (scores >= largest)).astype(jnp.int32), segments, count)
        return jnp.where(picked, nll, 0).sum(), (hits.min(-1) > 0).sum()

    nll, correct = jax.vmap(of_row)(scores, picked, valid, segment_ids)
    weight = picked[..., 0].sum().astype(jnp.float32)
    return LossSums(nll.sum(), nll.sum(), correct.sum().astype(jnp.float32), weight)
