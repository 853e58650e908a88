"""Settings of `classify`."""

from dataclasses import dataclass

from biomamba_jax.config.model import InferenceConfig


@dataclass(frozen=True)
class ClassifyConfig(InferenceConfig):
    """The texts to classify, and the model."""

    file: str | None = None
    """JSON lines (.jsonl, .jsonl.gz); default: standard input."""
    prompt: str = "{prompt}"
    """Template of the prompt, as in training; {name} stands for that key of the line."""
