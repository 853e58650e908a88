"""Heads on a backbone: what they predict, and how the backbone reads the text for them."""

import re
from dataclasses import dataclass
from typing import Literal

from biomamba_jax.config.checks import check

HeadKind = Literal["classifier", "multi_label", "regression", "token_classifier", "span"]
Reading = Literal["once", "echo", "bidirectional"]

TAG = re.compile("O|[BIES]-.+")
"""Tags of words in IOB or IOBES."""
MAX_LABELS = 31
"""Labels of a multi-label head, whose set is one non-negative int32."""


@dataclass(frozen=True)
class HeadConfig:
    """A linear layer on hidden states: its logits are weight @ hidden state + bias.

    classifier, multi_label and regression read the state after a text's last token; token_classifier and span that
    after the last token of each word, which in a causal model has seen the whole word.
    """

    kind: HeadKind = "classifier"
    """softmax over classes, a sigmoid for each label, one score, softmax over tags for each word, or softmax over the
    words of a text for the answer's first and for its last word."""
    labels: tuple[str, ...] = ()
    """Name of each row of the weight."""
    reading: Reading = "once"
    """once: from left to right. echo: the text twice, predicted on the second reading. bidirectional: also from right
    to left, by a second backbone with the same embedding."""

    def __post_init__(self) -> None:
        fits = self.kind != "multi_label" or len(self.labels) <= MAX_LABELS
        check(fits, "labels", f"{len(self.labels)} labels", f"multi_label has at most {MAX_LABELS}")
        check(len(set(self.labels)) == len(self.labels), "labels", self.labels, "must differ from each other")
        other = [label for label in self.labels if self.kind == "token_classifier" and not TAG.fullmatch(label)]
        check(not other, "labels", other, "must be O or tags such as B-Disease where the head labels words")

    @property
    def of_words(self) -> bool:
        """True if the head predicts for every word, False if for a text."""
        return self.kind in ("token_classifier", "span")

    def width(self, d_model: int) -> int:
        """Return the number of columns of the weight."""
        return d_model * (2 if self.reading == "bidirectional" else 1)
