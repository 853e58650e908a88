"""Download of models from the Hugging Face hub."""

import os
import re
from pathlib import Path

from biomamba_jax.errors import UserError

_WEIGHTS = ("*.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*")


def local_folder(name: str | os.PathLike[str]) -> Path:
    """Return `name` if it is a folder, else the folder of the hub model "owner/model", downloaded once.

    Raises:
      UserError: the download failed, or needs the [hub] extra.
    """
    folder = Path(name)
    if folder.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return folder  # a missing folder is refused by its reader
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name}: no such folder; to download the hub's model of that name: pip install 'biomamba-jax[hub]'"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(_WEIGHTS)))
    except Exception as error:  # of the network, the hub or its client
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name}: no such folder, and the hub's model of that name could not be downloaded ({reason})"
        ) from None
