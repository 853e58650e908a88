"""The share of a text that a tokenizer does not spell: letters that it replaces by its unknown token, changes or drops.

A model predicts tokens. Of two equally good models, the one whose tokenizer makes half of the text unknown would get
half the bits per byte, so figures are compared only where nearly all of the text is spelled.
"""

from collections.abc import Sequence

from biomamba_jax.data.records import batched
from biomamba_jax.data.text import unspelled
from biomamba_jax.tasks.scoring import Scorer

_BLOCK = 1024
"""Texts that are spelled together."""


def unspelled_share(scorer: Scorer, texts: Sequence[str]) -> float:
    """Return the share of the texts' bytes in UTF-8 whose characters the tokens do not spell, white space aside."""
    lost = total = 0
    for block in batched(texts, _BLOCK):
        for text, spelled in zip(block, scorer.spell(block), strict=True):
            own, all_of_it = unspelled(text, spelled)
            lost, total = lost + own, total + all_of_it
    return lost / total if total else 0.0
