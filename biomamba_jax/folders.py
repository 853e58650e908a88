"""The cache folder, digests of the files below a folder, and a folder's lock."""

import fcntl
import hashlib
import logging
import os
import platform
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from biomamba_jax.errors import UserError
from biomamba_jax.files import naming_errors, write_text

_LOG = logging.getLogger(__name__)
_LOCK = "lock"
DIGESTS = "SHA256SUMS"
"""Name of a folder's file of digests, which `sha256sum --check` reads."""


def cache_folder() -> Path:
    """Return the folder of what can be made again: `$BIOMAMBA_CACHE`, else `~/.cache/biomamba_jax`.

    Raises:
      UserError: there is no home folder.
    """
    try:
        return Path(os.environ.get("BIOMAMBA_CACHE") or Path.home() / ".cache" / "biomamba_jax").expanduser()
    except RuntimeError as error:
        raise UserError(f"no cache folder ({error}); set BIOMAMBA_CACHE") from None


def state_of(folder: str | os.PathLike[str]) -> str:
    """Return a name for what a folder holds now: a digest of its files' names, sizes and times of change."""
    folder = Path(folder).resolve()
    found = [(name, (folder / name).stat()) for name in _files_below(folder)]
    held = [(name, about.st_size, about.st_mtime_ns) for name, about in found]
    return hashlib.sha256(repr((str(folder), held)).encode()).hexdigest()[:20]


def write_digests(folder: Path) -> None:
    """Write the sha256 of every file below a folder, but of its lock, into its SHA256SUMS."""
    names = [name for name in _files_below(folder) if name != _LOCK]
    lines = [f"{digest}  {name}\n" for digest, name in zip(_sha256_of(folder, names), names, strict=True)]
    write_text(folder / DIGESTS, "".join(lines))


def check_digests(folder: Path, part: int = 0, parts: int = 1, *, complete: bool = True) -> bool:
    """Compare the files below a folder with its SHA256SUMS.

    Args:
      folder: the folder.
      part: index of the part of the files that this process reads, of `parts` that several processes share.
      parts: number of parts.
      complete: refuse a file that is missing or not listed, as well as one that differs.

    Returns:
      False if the folder has no SHA256SUMS.

    Raises:
      UserError: a file is damaged, missing or not listed; names it.
    """
    sums = folder / DIGESTS
    if not sums.exists():
        return False
    with naming_errors(sums):
        text = sums.read_text("utf-8", errors="replace")
    lines = [re.fullmatch("([0-9a-f]{64})  (.+)", line) for line in text.split("\n")[:-1]]
    stated = {line[2]: line[1] for line in lines if line}
    names = _files_below(folder)
    whole = text.endswith("\n") and None not in lines and len(stated) == len(lines)
    if not whole or (complete and set(names) - stated.keys()):
        raise UserError(f"{sums}: is damaged: it does not list every file next to it")
    if complete and (missing := stated.keys() - set(names)):
        raise UserError(f"{folder / min(missing)}: is missing")
    names = [name for name in names if name in stated][part::parts]
    for name, digest in zip(names, _sha256_of(folder, names), strict=True):
        if digest != stated[name]:
            raise UserError(f"{folder / name}: is damaged (its sha256 is not the one in {DIGESTS})")
    return True


def _files_below(folder: Path) -> list[str]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in paths if path.relative_to(folder) != Path(DIGESTS))


def _sha256_of(folder: Path, names: Iterable[str]) -> Iterator[str]:
    def digest(name: str) -> str:
        with naming_errors(folder / name), open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:  # hashing releases Python's lock
        yield from pool.map(digest, names)


@contextmanager
def locked(folder: str | Path, name: Path | None = None, *, wait: bool = False) -> Iterator[None]:
    """Make a folder and lock it for this process; the system unlocks it when the process ends, however it ends.

    The file `lock` names the owner. Where the file system has no locks, a warning says so.

    Args:
      folder: the folder.
      name: what the lock stands for, for messages; default: the folder.
      wait: wait for another process that holds the lock.

    Raises:
      UserError: another process holds the lock, or the folder cannot be written.
    """
    folder = Path(folder)
    name = name or folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / _LOCK, "a+b", buffering=0)  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{name}: cannot be made ({error.strerror}); name another folder") from None
    with lock:
        lock.seek(0)
        lock_file(lock, name, owner=lock.read().decode(errors="replace").strip(), wait=wait)
        lock.truncate(0)
        with suppress(OSError):  # a full disk ends the run where it writes what matters
            lock.write(f"process {os.getpid()} of host {platform.node()}\n".encode())
        yield


def lock_file(file: IO[Any], name: Path, owner: str = "", *, wait: bool = False) -> None:
    """Lock an open file until it is closed.

    Args:
      file: the open file.
      name: what the lock stands for, for messages.
      owner: who holds the lock if another process does.
      wait: wait for another process that has locked it.

    Raises:
      UserError: another process has locked it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        by = f" ({owner})" if owner else ""
        if not wait:
            raise UserError(f"{name}: another run uses it{by}; wait for it or name another") from None
        _LOG.info(f"{name}: waiting for another run that uses it{by}")
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        reason = f"{name}: cannot be locked on this file system ({error.strerror})"
        _LOG.warning(f"{reason}; see to it that only one run at a time uses it")
