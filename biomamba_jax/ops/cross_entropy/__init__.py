"""Next-token loss from hidden states, without the logits of the whole batch."""

from biomamba_jax.ops.cross_entropy.api import linear_cross_entropy, token_negative_log_likelihoods
from biomamba_jax.ops.cross_entropy.loss import LossSums, perplexity

__all__ = ["LossSums", "linear_cross_entropy", "perplexity", "token_negative_log_likelihoods"]
