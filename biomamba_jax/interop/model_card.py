"""The model card, README.md of an exported model: its sizes, usage, training and evaluation."""

from typing import Any

from biomamba_jax.config import ModelConfig
from biomamba_jax.html import TEMPLATES


def model_card(
    name: str, dialect: str, config: ModelConfig, dtype: str, about: dict[str, Any], has_tokenizer: bool
) -> str:
    """Return the text of README.md.

    Args:
      name: name of the folder, for the example.
      dialect: format of the weights.
      config: the model.
      dtype: dtype of the weights.
      about: result of `runs.describe`; sections without information are omitted.
      has_tokenizer: True if a tokenizer is exported with the weights.
    """
    return TEMPLATES.get_template("model_card.md.jinja").render(locals()) + "\n"
