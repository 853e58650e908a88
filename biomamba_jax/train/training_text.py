"""The training text that a config names, as `data` reads it."""

from biomamba_jax.config import DataConfig
from biomamba_jax.data.mixture import Mixture, Share
from biomamba_jax.data.shards import Manifest


def training_mixture(data: DataConfig) -> Mixture | None:
    """Return the mixture of sources to train on; None for data.path alone."""
    if not data.mixture.sources:
        return None
    weights = data.mixture.weights
    shares = (Share(name, source.path, weights[name]) for name, source in data.mixture.sources.items())
    return Mixture(tuple(shares), data.mixture.counts)


def epoch_tokens(data: DataConfig, manifest: Manifest) -> int:
    """Return the tokens of one epoch, at least 1: of the training split, or of a mixture's main source.

    Args:
      data: shards or mixture.
      manifest: that of data.path.
    """
    mixture = training_mixture(data)
    return max(manifest.splits["train"].tokens if mixture is None else mixture.tokens_an_epoch(), 1)
