"""Mamba-1, Mamba-2 and Mamba-3 language models and their recurrent state."""

from biomamba_jax.model.language_model import LanguageModel, init_params
from biomamba_jax.model.state import MixerState, ModelState

__all__ = ["LanguageModel", "MixerState", "ModelState", "init_params"]
