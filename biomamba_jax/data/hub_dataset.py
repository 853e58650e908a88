"""Datasets of the Hugging Face hub as input, `hf:OWNER/NAME[@REVISION][:CONFIG]`: their train split, streamed.

A dataset is read in parts, its files, each by one task; a part is named hf:DATASET#FINGERPRINT#INDEX-of-COUNT, so that
spools belong to one state of the dataset. Only data files are read; datasets cannot run code.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from biomamba_jax.errors import UserError
from biomamba_jax.extras import extra

if TYPE_CHECKING:
    from datasets import IterableDataset

PREFIX = "hf:"
_LONGEST_REASON = 300


def parts(name: str) -> list[str]:
    """Return the parts of a dataset.

    Raises:
      UserError: there is no such dataset, the hub is out of reach, or the library is not installed.
    """
    fingerprint, rows = _open(name)
    return [f"{name}#{fingerprint}#{index}-of-{rows.num_shards}" for index in range(rows.num_shards)]


def read_part(part: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a part.

    Raises:
      UserError: it cannot be read, or the dataset is not in the state of the part's name any more.
    """
    name, fingerprint, place = part.rsplit("#", 2)
    index, _, count = place.partition("-of-")
    found, rows = _open(name)
    if (found, rows.num_shards) != (fingerprint, int(count)):
        raise UserError(f"{name}: changed while it was read; run the same command again")
    with _naming_errors(name):
        yield from rows.shard(rows.num_shards, int(index))


@lru_cache(4)
def _open(name: str) -> "tuple[str, IterableDataset]":
    """Return a dataset's fingerprint and its rows."""
    datasets = extra("hub", "datasets", f"{name}: datasets of the hub need datasets")
    path, _, config = name.removeprefix(PREFIX).partition(":")
    path, _, revision = path.partition("@")
    datasets.disable_progress_bars()
    with _naming_errors(name):
        builder = datasets.load_dataset_builder(path, config or None, revision=revision or None)
        return str(builder.hash), builder.as_streaming_dataset("train")


@contextmanager
def _naming_errors(name: str) -> Iterator[None]:
    """Convert the library's errors, of many kinds, into a UserError that names the dataset."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
        raise UserError(f"{name}: cannot be read ({reason}); check the name and the connection") from None
