"""The share of a text that a tokenizer does not spell: letters that it replaces by its unknown token, changes or drops.

A model predicts tokens. Of two equally good models, the one whose tokenizer makes half of the text unknown would get
half the bits per byte, so figures are compared only where nearly all of the text is spelled.
"""

import unicodedata
from collections import Counter
from collections.abc import Sequence

from biomamba_jax.tasks.padding import batched
from biomamba_jax.tasks.scoring import Scorer

_BLOCK = 1024
"""Texts that are spelled together."""


def unspelled_share(scorer: Scorer, texts: Sequence[str]) -> float:
    """Return the share of the texts' bytes in UTF-8 whose characters the tokens do not spell, white space aside."""
    lost = total = 0
    for block in batched(texts, _BLOCK):
        for text, spelled in zip(block, scorer.spell(block), strict=True):
            characters, kept = (Counter(unicodedata.normalize("NFC", each)) for each in (text, spelled))
            lost += _bytes(characters - kept)
            total += _bytes(characters)
    return lost / total if total else 0.0


def _bytes(characters: Counter[str]) -> int:
    return sum(count * len(each.encode()) for each, count in characters.items() if not each.isspace())
