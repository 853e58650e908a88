"""Chooses the scorer of a folder: this package for its own models, transformers for all others."""

from pathlib import Path

import jax

from biomamba_jax.config import EvaluateConfig
from biomamba_jax.errors import UserError
from biomamba_jax.files import read_json
from biomamba_jax.interop import dialect_of
from biomamba_jax.interop.configs import HF_TYPES
from biomamba_jax.interop.hub import local_folder
from biomamba_jax.tasks import span_reader, transformers_scorer
from biomamba_jax.tasks.architectures import SPANS, TRANSFORMERS_PREFIX, check_architecture
from biomamba_jax.tasks.model import load
from biomamba_jax.tasks.native_scorer import NativeScorer
from biomamba_jax.tasks.scoring import Scorer


def check_model(name: str, path: str, config: EvaluateConfig) -> None:
    """Refuse a folder that cannot be scored, as far as its config tells, before hours are spent on other models.

    Raises:
      UserError: the folder holds no model, or one that cannot give what `config` measures.
    """
    folder, ours = _runner(path)
    if not ours:
        check_architecture(name, folder, config)


def load_scorer(name: str, path: str, config: EvaluateConfig) -> Scorer:
    """Load the model of a folder for evaluation.

    Args:
      name: the model's name in the config.
      path: its folder or hub name; `hf:` in front requires transformers even if this package could read the folder.
      config: window, batch size and dtype.

    Raises:
      UserError: the folder holds no model that gives likelihoods, or the extra that it needs is not installed.
    """
    folder, ours = _runner(path)
    if not ours:
        spans = check_architecture(name, folder, config).endswith(SPANS)
        return (span_reader if spans else transformers_scorer).load(name, folder, config)
    if jax.process_count() > 1:
        raise UserError(f"evaluate runs on one host, not on {jax.process_count()}; start it on one of them")
    generator = load(folder, config.dtype).generator
    return NativeScorer(name, generator, path, config.window, config.batch_size)


def _runner(path: str) -> tuple[Path, bool]:
    """Return the folder of a model, and True if this package runs it."""
    folder = local_folder(path.removeprefix(TRANSFORMERS_PREFIX))
    ours = dialect_of(folder) != "hf" or read_json(folder / "config.json")["model_type"] in HF_TYPES
    return folder, ours and not path.startswith(TRANSFORMERS_PREFIX)
