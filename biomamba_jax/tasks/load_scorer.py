"""Chooses the scorer of a folder: this package for its own models, transformers for everybody else's."""

from pathlib import Path

from biomamba_jax.config import EvaluateConfig
from biomamba_jax.files import read_json
from biomamba_jax.interop import dialect_of
from biomamba_jax.tasks import native_scorer, transformers_scorer
from biomamba_jax.tasks.scoring import Scorer

TRANSFORMERS_PREFIX = "hf:"
_OUR_TYPES = ("mamba", "mamba2")


def load_scorer(name: str, path: str, config: EvaluateConfig) -> Scorer:
    """The scorer of a folder; `hf:FOLDER` asks for transformers where this program could read the folder too.

    Raises:
      UserError: no model there, or the extra that it needs is not installed.
    """
    folder = Path(path.removeprefix(TRANSFORMERS_PREFIX))
    ours = dialect_of(folder) != "hf" or read_json(folder / "config.json")["model_type"] in _OUR_TYPES
    if ours and not path.startswith(TRANSFORMERS_PREFIX):
        return native_scorer.load(name, folder, config)
    return transformers_scorer.load(name, folder, config)
