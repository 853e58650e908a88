"""Folders on object stores, such as gs://bucket/prefix, read through copies in the cache folder.

stores/URL/files/DIGEST    a file, under the digest of its name, size and version
stores/URL/STATE/NAME      the folder as it was listed: hard links to its files

A copy never changes: a run keeps what it reads, whatever is uploaded meanwhile. A file is in it whole or not at all.
"""

import functools
import hashlib
import logging
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from biomamba_jax.errors import UserError
from biomamba_jax.files import link_or_move, replacing
from biomamba_jax.folders import cache_folder, locked

_VERSION = ("generation", "md5Hash", "crc32c", "etag", "ETag", "mtime", "created")
"""Properties by which stores identify a file's content; each has some of them."""
_AT_ONCE = 8
"""Files that are fetched together, each in memory in part."""
_LOG = logging.getLogger(__name__)


class _Remote(NamedTuple):
    """A file of a store."""

    path: str
    """Path in the store."""
    size: int
    """Bytes."""
    digest: str
    """Digest of its name, size and version."""

    def is_whole(self, place: Path) -> bool:
        """Return True if a file is there, of this one's size."""
        return place.is_file() and place.stat().st_size == self.size


class _Listing(NamedTuple):
    """Content of a URL's folder at one moment."""

    store: Any
    """The file system of fsspec."""
    files: dict[str, _Remote]
    """Files by their names below the folder."""
    state: str
    """Digest of all of them."""


def is_url(path: str | os.PathLike[str]) -> bool:
    """Return True for an address such as gs://bucket/prefix."""
    return "://" in os.fspath(path)


def local_copy(path: str | os.PathLike[str], subfolder: str | None = None) -> Path:
    """Return a path as it is, and for the URL of a folder its copy in the cache folder, fetching what that lacks.

    A process sees one state of a folder, that of its first call. Several processes of a machine share a copy.

    Args:
      path: a path, or a URL that fsspec knows: gs:// with the [gcs] extra, others with their own libraries.
      subfolder: fetch only this folder and the files next to it, "": only those; default: everything.

    Raises:
      UserError: the folder cannot be fetched; names it and says why.
    """
    if not is_url(path):
        return Path(path)
    url = os.fspath(path).rstrip("/")
    with _naming_errors(url):
        listing = _listed(url)
        root = cache_folder() / "stores" / quote(url, safe="")
        kept, copy = root / "files", root / listing.state
        with locked(root, wait=True):
            parts = None if subfolder is None else ("", subfolder)
            wanted = {n: file for n, file in listing.files.items() if parts is None or n.rpartition("/")[0] in parts}
            lacking = {name: file for name, file in wanted.items() if not file.is_whole(copy / name)}
            _fetch(url, listing.store, lacking.values(), kept)
            for name, file in lacking.items():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                (copy / name).unlink(missing_ok=True)
                link_or_move(kept / file.digest, copy / name)
    return copy


def _list(url: str) -> _Listing:
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # gRPC, for buckets of a single zone
    for library in ("gcsfs", "google.auth"):  # each failed try is a traceback or a warning
        logging.getLogger(library).setLevel(logging.CRITICAL)
    import fsspec

    with warnings.catch_warnings(action="ignore"):
        store, prefix = fsspec.url_to_fs(url, skip_instance_cache=True)  # instances remember listings
    prefix, files = prefix.rstrip("/") + "/", {}
    try:
        found = store.find(prefix, detail=True)
    except FileNotFoundError:
        found = {}
    for path, about in found.items():
        name = path.removeprefix(prefix)
        if path == name or not name or name.endswith("/"):  # the folder itself, or a stand-in for an empty one
            continue
        if ".." in name.split("/") or name.startswith("/"):
            raise UserError(f"{url}: holds {name!r}, which is not the path of a file below it")
        files[name] = _Remote(path, about["size"], _digest(name, about["size"], *map(about.get, _VERSION)))
    if not files:
        raise UserError(f"{url}: no such folder, or no such bucket; check the name")
    return _Listing(store, files, _digest(*sorted(file.digest for file in files.values())))


_listed = functools.cache(_list)


def _digest(*values: Any) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:32]


def _fetch(url: str, store: Any, files: Iterable[_Remote], folder: Path) -> None:
    """Fetch the files that a folder lacks, each under its digest."""
    folder.mkdir(exist_ok=True)
    missing = [file for file in files if not file.is_whole(folder / file.digest)]
    size, free = sum(file.size for file in missing), shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"its {size:,} bytes do not fit into the {free:,} of {folder}; free space or set BIOMAMBA_CACHE")
    if missing:
        _LOG.info(f"{url}: fetching {len(missing):,} files, {size:,} bytes, into {folder.parent}")
    for start in range(0, len(missing), _AT_ONCE):
        batch = missing[start : start + _AT_ONCE]
        with ExitStack() as stack:
            places = [stack.enter_context(replacing(folder / file.digest)) for file in batch]
            store.get([file.path for file in batch], [str(place) for place in places])
            for file, place in zip(batch, places, strict=True):
                if (arrived := place.stat().st_size) != file.size:
                    raise OSError(f"{arrived:,} of the {file.size:,} bytes of {file.path} arrived; try again")
    if missing and (replaced := set(missing) - set(_list(url).files.values())):
        for file in replaced:
            (folder / file.digest).unlink()
        raise OSError(f"{min(replaced).path} was replaced meanwhile; start again")


@contextmanager
def _naming_errors(url: str) -> Iterator[None]:
    """Convert the errors of a store and its library into a UserError of one line that names the URL."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{url}: needs a library ({error}); for gs:// pip install 'biomamba-jax[gcs]'") from None
    except Exception as error:  # of the network, the store or its library
        reason = " ".join(str(error).split()) or type(error).__name__
        login = "; log in with `gcloud auth application-default login`" if "caller does not" in reason else ""
        raise UserError(f"{url}: cannot be fetched: {reason}{login}") from None
