"""Models by their name on the Hugging Face hub."""

import os
import re
from pathlib import Path

from biomamba_jax.errors import UserError

_WEIGHTS = ("*.json", "*.safetensors", "pytorch_model*.bin", "tokenizer*")


def local_folder(name: str | os.PathLike[str]) -> Path:
    """`name` itself where it is a folder; otherwise the hub's model of that name ("owner/model"), downloaded once.

    Raises:
      UserError: neither a folder nor a hub name, or the download is not possible; names the remedy.
    """
    folder = Path(name)
    if folder.is_dir() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return folder  # one that does not exist is refused where it is read
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"{name}: no such folder; to fetch it by that name install the extra: pip install 'biomamba-jax[hub]'"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(_WEIGHTS)))
    except Exception as error:  # whatever the network, the hub or its client say
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name}: no such folder, and it could not be fetched by that name ({reason})") from None
