"""Checksums and order of input files."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biomamba_jax.data.hub_dataset import PREFIX
from biomamba_jax.errors import UserError
from biomamba_jax.files import naming_errors

_MD5 = re.compile(r"\b[0-9a-fA-F]{32}\b")
_NLM_NAME = re.compile(r"(?:pubmed|medline)(\d\d)n(\d{4,})\D")


@dataclass(frozen=True)
class Checksums:
    """Size in bytes and hexadecimal digests of a file on disk; 0 and "" for a part of a hub's dataset."""

    size: int
    """Bytes."""
    md5: str
    """Hexadecimal MD5."""
    sha256: str
    """Hexadecimal SHA-256."""


def checksums(path: str | Path) -> Checksums:
    """Compute a file's checksums.

    Raises:
      UserError: it cannot be read, or its sidecar `FILE.md5` (NLM's `MD5(file)= hex`) states another sum.
    """
    if str(path).startswith(PREFIX):
        return Checksums(0, "", "")
    md5, sha256, size = hashlib.md5(usedforsecurity=False), hashlib.sha256(), 0
    with naming_errors(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            md5.update(block)
            sha256.update(block)
            size += len(block)
    check_md5(path, md5.hexdigest())
    return Checksums(size, md5.hexdigest(), sha256.hexdigest())


def check_md5(path: str | Path, md5: str) -> None:
    """Raise UserError if a sidecar `FILE.md5` (NLM's `MD5(file)= hex`) states another sum than `md5`."""
    sidecar = Path(f"{path}.md5")
    if not sidecar.is_file():
        return
    stated = stated_md5(sidecar.read_text("utf-8", "replace"))
    if stated is None:
        raise UserError(f"{sidecar}: holds no MD5 sum; download it again or remove it")
    if stated != md5:
        raise UserError(f"{path}: its MD5 is {md5}, {sidecar.name} says {stated}; download it again")


def stated_md5(sidecar: str) -> str | None:
    """Return the MD5 sum in the text of a sidecar, lower-case; None if it has none."""
    return found[-1].lower() if (found := _MD5.findall(sidecar)) else None


def identity(path: Path) -> tuple[Any, ...]:
    """Return what changes if a file does: its absolute path, size and time; the name of a part of a hub's dataset.

    Raises:
      UserError: there is no such file.
    """
    if str(path).startswith(PREFIX):
        return (str(path),)
    with naming_errors(path):
        found = path.stat()
    return os.path.abspath(path), found.st_size, found.st_mtime_ns


def in_order(paths: Sequence[str]) -> list[Path]:
    """Return NLM's files by year and number (the baseline before its updates), then all others as given.

    Records of later files replace those of earlier ones, so the order in which NLM's files are named must not matter.

    Raises:
      UserError: a file is given twice.
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
