"""Compiles this folder's C++ once for the machine at hand and registers its functions with XLA.

On first use rather than at installation: installing needs no compiler and no headers of the right jaxlib, a wheel stays
one file for every platform, and the compiler can use all instructions of the CPU that it runs on. The library lies in
the user's cache folder. Its name is a digest of all that it depends on, so a new jaxlib, compiler or CPU (of a home
folder that several machines share) gets its own. Processes that compile at the same time each move a whole file into
place. CXX and CXXFLAGS name another compiler and more flags.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax

from biomamba_jax.errors import UserError
from biomamba_jax.folders import cache_folder

_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread")
_FUNCTIONS = (
    *("selective_scan_forward", "selective_scan_backward", "causal_conv1d_forward", "causal_conv1d_backward"),
    *("ssd_forward", "ssd_backward", "mixed_matmul"),
)
_TIMEOUT = 300  # seconds; it takes about 10

_LOG = logging.getLogger(__name__)


@functools.cache
def unavailable_reason() -> str | None:
    """Build the library, load it and register its functions; return why that failed, or None."""
    try:
        library = ctypes.CDLL(str(build()))
        for name in _FUNCTIONS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except (OSError, subprocess.SubprocessError, UserError) as error:
        return " ".join(str(error).split())
    return None


def build() -> Path:
    """Compile the library unless that was done before, and return its path.

    Raises:
      OSError: there is no compiler, or the cache folder cannot be written.
      SubprocessError: the compiler failed.
    """
    command = _compiler()
    sources = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".cc", ".h"))
    # All predefined macros: the compiler's version and the instruction sets that `native` stands for.
    command, macros = _first_that_runs(command)
    parts = [macros, importlib.metadata.version("jaxlib"), *command, *(path.read_text("utf-8") for path in sources)]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
    path = cache_folder() / "native" / f"{name}.so"
    if not path.exists():
        _LOG.info("compiling the native ops into %s; this is done once", path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            compiled = Path(folder) / path.name
            code = [str(source) for source in sources if source.suffix == ".cc"]
            _run([*command, f"-I{jax.ffi.include_dir()}", "-o", str(compiled), *code])
            compiled.replace(path)
    return path


def _compiler() -> list[str]:
    for name in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        words = shlex.split(name)
        if words and shutil.which(words[0]):
            return [*words, *_FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    raise OSError("no C++ compiler was found (looked for $CXX, c++, g++ and clang++); install one")


def _first_that_runs(command: Sequence[str]) -> tuple[list[str], str]:
    """Return the command with the flag for this machine's CPU that the compiler knows, and its predefined macros."""
    error: Exception = OSError()
    for flag in ("-march=native", "-mcpu=native"):
        targeted = [command[0], flag, *command[1:]]
        try:
            return targeted, _run([*targeted, "-dM", "-E", "-x", "c++", os.devnull])
        except subprocess.SubprocessError as failure:
            error = failure
    raise error


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise subprocess.SubprocessError(f"{command[0]} did not end within {_TIMEOUT} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or [""]
        raise subprocess.SubprocessError(f"{command[0]} failed with status {done.returncode}: {lines[0][:300]}")
    return done.stdout
