"""`protocol: paper_v1`: perplexity as the first version of BioMamba's code computes it, with padding in the loss.

Only to explain published figures. After LeoYML/BioMamba at e61db22, legacy/pretrain_v1: every text is truncated or
padded to 512 tokens, and the labels are these same ids, so the padding counts as predicted tokens; perplexity is exp of
the mean of batch means of 32 rows. Its training has the same loss (`data.pad_rows`). A model that never saw padding
learns to repeat it within a few steps, and its perplexity then falls by a factor that grows with the share of padding,
whatever becomes of the text.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from biomamba_jax.ops.cross_entropy import perplexity
from biomamba_jax.tasks.documents import Document
from biomamba_jax.tasks.paper import mean_of_batch_means
from biomamba_jax.tasks.scoring import Scorer, check_finite

ROW_TOKENS = 512
BATCH_ROWS = 32


@dataclass(frozen=True)
class PaddedFigures:
    """Figures of one model on one domain; cross-entropies in nats per token."""

    perplexity: float
    """exp(cross_entropy)."""
    cross_entropy: float
    """Mean of batch means over all tokens, padding included."""
    padding: float
    """Share of the predicted tokens that are padding."""
    text_cross_entropy: float
    """Mean over the tokens of text alone, in the same rows."""
    padding_cross_entropy: float
    """Mean over the padding alone."""
    rows: int
    """Number of rows, one a document."""
    seconds: float
    """Time to compute them."""

    def loss_at(self, padding: float) -> float:
        """Return the cross-entropy if that share of the tokens were padding."""
        return (1 - padding) * self.text_cross_entropy + padding * self.padding_cross_entropy


def domain_figures(scorer: Scorer, documents: Sequence[Document]) -> PaddedFigures:
    """Compute the figures of a domain.

    Args:
      scorer: the model.
      documents: the domain's documents.

    Raises:
      UserError: a log-likelihood is NaN or infinite.
    """
    start = time.perf_counter()
    ids = [row[:ROW_TOKENS] for row in scorer.encode([document.text for document in documents])]
    rows = [[*row, *[scorer.padding_id] * (ROW_TOKENS - len(row))] for row in ids]
    text, padding = np.zeros((2, len(rows)))
    for index, nats in scorer.rows(rows):
        text_tokens = max(0, len(ids[index]) - 1)  # the first is not predicted
        text[index], padding[index] = nats[:text_tokens].sum(), nats[text_tokens:].sum()
    check_finite(scorer, text + padding)
    tokens = np.full(len(rows), ROW_TOKENS - 1)
    of_text = sum(max(0, len(row) - 1) for row in ids)
    of_padding = tokens.sum() - of_text
    loss = mean_of_batch_means(text + padding, tokens, BATCH_ROWS)
    return PaddedFigures(
        perplexity=perplexity(loss),
        cross_entropy=loss,
        padding=float(of_padding / tokens.sum()),
        text_cross_entropy=float(text.sum() / max(1, of_text)),
        padding_cross_entropy=float(padding.sum() / max(1, of_padding)),
        rows=len(rows),
        seconds=time.perf_counter() - start,
    )
