"""Input files: reading them to their end, plain or gzip, knowing them by checksum, and putting them in order."""

import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from biomamba_jax.errors import UserError

_MD5 = re.compile(r"\b[0-9a-fA-F]{32}\b")
_NLM_NAME = re.compile(r"(?:pubmed|medline)(\d\d)n(\d{4,})\D")


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
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: truncated or damaged gzip ({error}); download it again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} near byte {error.start}); convert it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check --input") from None


def read_chunks(path: str | Path, size: int) -> Iterator[bytes]:
    """The file's bytes, unzipped if its name ends in .gz, to the end: gzip's own checksum is always verified."""
    with naming_errors(path), open(path, "rb") as raw:
        file = gzip.GzipFile(fileobj=raw) if str(path).endswith(".gz") else raw
        while chunk := file.read(size):
            yield chunk


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 text file, unzipped if its name ends in .gz, without their line ends."""
    opener = gzip.open if str(path).endswith(".gz") else open
    with naming_errors(path), opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
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
    sidecar = Path(f"{path}.md5")
    if sidecar.is_file():
        stated = _MD5.findall(sidecar.read_text("utf-8", "replace"))
        if not stated:
            raise UserError(f"{sidecar}: holds no MD5 sum; download it again or remove it")
        if stated[-1].lower() != md5.hexdigest():
            raise UserError(
                f"{path}: its MD5 is {md5.hexdigest()}, {sidecar.name} says {stated[-1].lower()}; download it again"
            )
    return Checksums(size, md5.hexdigest(), sha256.hexdigest())


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
