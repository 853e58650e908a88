"""Input files: reading them to their end, plain or compressed, knowing them by checksum, and putting them in order."""

import bz2
import hashlib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from isal import igzip
from isal.isal_zlib import IsalError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from biomamba_jax.errors import UserError

_MD5 = re.compile(r"\b[0-9a-fA-F]{32}\b")
_NLM_NAME = re.compile(r"(?:pubmed|medline)(\d\d)n(\d{4,})\D")
_DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda raw: igzip.IGzipFile(fileobj=raw),  # takes a third of the time of gzip's
    ".bz2": bz2.BZ2File,
    ".zst": zstd.ZstdFile,
}
# The library's own annotation calls its exception class an exception.
_DAMAGED = (EOFError, cast(type[Exception], IsalError), igzip.BadGzipFile, zstd.ZstdError)


@dataclass(frozen=True)
class Checksums:
    """Size in bytes and hexadecimal digests of a file as it lies on disk."""

    size: int
    md5: str
    sha256: str


@contextmanager
def naming_errors(path: str | Path) -> Iterator[None]:
    """Turns what can go wrong while a file is read into a UserError that names it."""
    try:
        yield
    except _DAMAGED as error:
        kind = {".bz2": "bzip2", ".zst": "zstd"}.get(Path(path).suffix, "gzip")
        raise UserError(f"{path}: truncated or damaged {kind} ({error}); download it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} near byte {error.start}); convert it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None


def uncompressed_name(path: str | Path) -> str:
    """The file's name without .gz, .bz2 or .zst."""
    path = Path(path)
    return path.stem if path.suffix in _DECOMPRESSORS else path.name


def _uncompressed(path: str | Path, raw: BinaryIO) -> BinaryIO:
    decompressor = _DECOMPRESSORS.get(Path(path).suffix)
    if decompressor is None:
        return raw
    if os.fstat(raw.fileno()).st_size == 0:  # gzip's reader takes it for the end of a file
        raise EOFError("it is empty")
    return decompressor(raw)


def read_chunks(path: str | Path, size: int) -> Iterator[bytes]:
    """The file's bytes, uncompressed, to the end: the format's own checksum is always verified."""
    with naming_errors(path), open(path, "rb") as raw:
        file = _uncompressed(path, raw)
        while chunk := file.read(size):
            yield chunk


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, uncompressed, without their line ends."""
    with (
        naming_errors(path),
        open(path, "rb") as raw,
        io.TextIOWrapper(_uncompressed(path, raw), encoding="utf-8-sig", newline="\n") as file,
    ):
        for line in file:
            yield line.rstrip("\r\n")


def checksums(path: str | Path) -> Checksums:
    """Digests of the file; UserError if a sidecar `FILE.md5` (NLM's `MD5(file)= hex`) states another."""
    md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    with naming_errors(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            md5.update(block)
            sha256.update(block)
            size += len(block)
    check_md5(path, md5.hexdigest())
    return Checksums(size, md5.hexdigest(), sha256.hexdigest())


def check_md5(path: str | Path, md5: str) -> None:
    """UserError if a sidecar `FILE.md5` (NLM's `MD5(file)= hex`) states another sum than `md5`."""
    sidecar = Path(f"{path}.md5")
    if not sidecar.is_file():
        return
    stated = stated_md5(sidecar.read_text("utf-8", "replace"))
    if stated is None:
        raise UserError(f"{sidecar}: holds no MD5 sum; download it again or remove it")
    if stated != md5:
        raise UserError(f"{path}: its MD5 is {md5}, {sidecar.name} says {stated}; download it again")


def stated_md5(sidecar: str) -> str | None:
    """The sum in the text of a sidecar, lower-case; None if it has none."""
    return found[-1].lower() if (found := _MD5.findall(sidecar)) else None


def in_order(paths: Sequence[str]) -> list[Path]:
    """NLM's files by year and number (the baseline before its updates), then all others as given.

    Later files win over earlier ones, so the order in which NLM's files arrive or are named does not matter.
    """
    resolved = [Path(path) for path in paths]
    seen: set[Path] = set()
    for path in resolved:
        if path.resolve() in seen:
            raise UserError(f"{path}: given twice; name each input once")
        seen.add(path.resolve())

    def key(path: Path) -> tuple[int, int, int]:
        match = _NLM_NAME.match(path.name)
        return (0, int(match[1]), int(match[2])) if match else (1, 0, 0)

    return sorted(resolved, key=key)
