"""Models by their names on the Hugging Face hub: owner/name or owner/name@revision."""

import functools
import logging
import os
import re
from pathlib import Path
from typing import Any

from biomamba_jax.errors import UserError
from biomamba_jax.extras import extra
from biomamba_jax.object_store import local_copy

HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(@[\w./-]+)?")
"""A name on the hub: owner/name or owner/name@revision."""
_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "params/*", "SHA256SUMS")
_TORCH = "pytorch_model*.bin"


def local_folder(name: str | os.PathLike[str]) -> Path:
    """Return the folder of a model: `name` itself, or a copy of a URL's folder or of the hub's model of that name.

    The model is downloaded once, into huggingface_hub's cache, with a progress bar; an interrupted download resumes.
    Where the hub is out of reach, the model is taken from that cache.

    Raises:
      UserError: there is no such folder, and the model cannot be had from the store or the hub; says why.
    """
    folder = local_copy(name)
    if folder.exists() or not (isinstance(name, str) and HUB_NAME.fullmatch(name)):
        return folder  # a missing folder is refused by its reader
    return _download(name)


def _download(name: str) -> Path:
    repo, _, revision = name.partition("@")
    client = _client(f"{name}: no such folder; to download the hub's model of that name")
    fetch = functools.partial(client.snapshot_download, repo, revision=revision or None)
    try:
        folder = Path(fetch(allow_patterns=list(_FILES)))
        if not any(folder.glob("*.safetensors")):
            fetch(allow_patterns=[*_FILES, _TORCH])
        return folder
    except Exception as error:  # of the network, the hub or its client
        raise UserError(f"{name}: no such folder, and not to be had from the hub: {_reason(error)}") from None


def require_token(name: str) -> None:
    """Raise UserError if nothing could be pushed, before a model is made for it."""
    if _client(f"--push {name}").get_token() is None:
        raise UserError(f"--push {name}: you are not logged in to the hub; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, name: str) -> str:
    """Upload a folder as a model of the hub, private if it is new, and return its address.

    Raises:
      UserError: the hub is out of reach or refuses; the folder stays as it is.
    """
    api = _client(f"--push {name}").HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload a model written by biomamba_jax")
    except Exception as error:
        raise UserError(f"--push {name}: {folder} is written, but not pushed: {_reason(error)}") from None
    return f"{api.endpoint}/{name}"


def _client(purpose: str) -> Any:
    client = extra("hub", "huggingface_hub", purpose)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry is a warning of several lines
    return client


def _reason(error: Exception) -> str:
    """Return why the hub or its client failed, in one line."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "its owner grants access on its page; then log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model; for a private one log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the model has no such revision"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return "the hub is out of reach, and the model is not in the cache"
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
