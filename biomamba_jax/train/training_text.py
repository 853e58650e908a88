"""The training text that a config names, as the data room takes it."""

from biomamba_jax.config import DataConfig
from biomamba_jax.data.mixture import Mixture, Share
from biomamba_jax.data.shards import Manifest


def mixture_of(data: DataConfig) -> Mixture | None:
    """The mixture that is trained on; None where it is data.path alone."""
    if not data.mixture.sources:
        return None
    weights = data.mixture.weights
    shares = (Share(name, source.path, weights[name]) for name, source in data.mixture.sources.items())
    return Mixture(tuple(shares), data.mixture.counts)


def epoch_tokens(data: DataConfig, manifest: Manifest) -> int:
    """Tokens of one epoch, at least 1: a pass over the training split, of a mixture over its main source's.

    Args:
      manifest: of data.path.
    """
    mixture = mixture_of(data)
    return max(manifest.splits["train"].tokens if mixture is None else mixture.tokens_an_epoch(), 1)
