"""Settings of `convert`."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from biomamba_jax.config.checks import Limit, LocalFolder, Settings

_HUB_NAME = Limit("a name on the hub: owner/name", lambda name: re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None)


@dataclass(frozen=True)
class ConvertConfig(Settings):
    """The model to convert, and the format to write."""

    input: str
    """Model to read: a folder (Hugging Face, mamba_ssm, native, or a run directory), also gs://bucket/folder, or a name
    on the Hugging Face hub, owner/name or owner/name@revision."""
    output: LocalFolder
    """Folder to write; must not exist."""
    to: Literal["native", "hf", "mamba_ssm", "gguf"] = "hf"
    """Format to write; gguf, for llama.cpp, needs the [gguf] extra."""
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = "float32"
    """Dtype of the tensors written; native is always float32, and q8_0 is for gguf."""
    tokenizer: str | None = None
    """Tokenizer to export with the weights: a file, or the name gpt-neox. Where the input has another, see
    new_tokenizer."""
    new_tokenizer: bool = False
    """Take the tokenizer where the input has another: rows of the embedding whose tokens it also has keep their values,
    by spelling; the others are drawn anew."""
    push: Annotated[str, _HUB_NAME] | None = None
    """Also upload the folder to the hub under this name, owner/name, as a private model if it is new. Needs
    `hf auth login` or HF_TOKEN, and the [hub] extra."""
    report: str | None = None
    """report.json of `evaluate`, or its folder: what it measured of the input goes into the model card."""
    license: str | None = None
    """Licence of the weights for the model card, as the hub names it, such as apache-2.0; default: unknown."""
    language: str = "en"
    """Language of the text for the model card."""
