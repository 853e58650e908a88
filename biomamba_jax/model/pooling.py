"""Pooling of hidden states into one vector for each text, in training and afterwards."""

from typing import Any

from biomamba_jax.config.embed import Pooling


def pooling_weights(pooling: Pooling, position: Any, last: Any) -> Any:
    """Return the weight of each state in the sum that is its text's vector, up to a factor common to a text's states.

    The start token's state counts only where the text has no other token.

    Args:
      pooling: "weighted" is proportional to the position (Muennighoff 2022, arXiv 2202.08904, SGPT).
      position: index of each token in its text, 0 for the start token; integers [... L] of JAX or of NumPy.
      last: True for the last token of a text, [... L].

    Returns:
      Integers or bool [... L].
    """
    if pooling == "last":
        return last
    return (position if pooling == "weighted" else position > 0) + (last & (position == 0))
