"""Download of NLM's baseline and update files: parallel, resumable, verified by MD5.

A file is downloaded as NAME.partial. What a broken connection or a kill leaves of it is resumed by the next try (HTTP
range requests). A complete file whose MD5 is that of the sidecar NAME.md5 gets its name; any other is discarded and
fetched again from its first byte. Files that are complete already are not fetched again. The file `lock` in the folder
keeps a second download out.
"""

import hashlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import requests
import urllib3

from biomamba_jax.data.input_files import stated_md5
from biomamba_jax.errors import UserError
from biomamba_jax.files import write_text
from biomamba_jax.folders import locked

Part = Literal["baseline", "updates", "all"]
_FOLDERS = {"baseline": ("baseline",), "updates": ("updatefiles",), "all": ("baseline", "updatefiles")}
_NAME = re.compile(r"pubmed\d\dn(\d{4,})\.xml\.gz")
_BLOCK_BYTES = 1 << 18
_MAX_PAUSE = 60.0
_TRANSIENT = (408, 429, 500, 502, 503, 504)
_LEAST_SPEED = 1_000  # bytes/s
_LONGEST_TEXT = 1 << 25  # bytes of a listing
# requests' exceptions are OSErrors; a broken URL that a server redirects to raises its own or a ValueError.
_PROBLEMS = (OSError, urllib3.exceptions.HTTPError, ValueError)

logging.getLogger("urllib3").setLevel(logging.ERROR)  # its warning of a malformed header is a traceback


class Remote(NamedTuple):
    """A file on the server."""

    name: str
    """Name of the file."""
    url: str
    """Its address."""


class _HeadersInTime:
    """A connection that is shut down unless an answer's headers end within its timeout, however they drip."""

    sock: Any
    timeout: Any

    def getresponse(self) -> Any:
        """Return the answer, of which the body is still to be read."""
        late, sock = threading.Event(), self.sock

        def shut_down() -> None:
            late.set()
            with suppress(OSError):  # it is closed already
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of an SSLSocket too, whose own is not thread-safe

        timer = threading.Timer(self.timeout, shut_down)
        timer.start()
        try:
            answer = super().getresponse()  # type: ignore[misc]
        except Exception:
            if not late.is_set():
                raise
        finally:
            timer.cancel()
        if late.is_set():  # what had arrived by then could pass for all headers
            raise TimeoutError(f"the headers do not end within {self.timeout:g} s")
        return answer


class _HTTP(_HeadersInTime, urllib3.connection.HTTPConnection):
    """A connection without TLS."""


class _HTTPS(_HeadersInTime, urllib3.connection.HTTPSConnection):
    """A connection with TLS."""


class _Adapter(requests.adapters.HTTPAdapter):
    """Makes such connections, also through proxies."""

    def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
        """Return a pool of connections."""
        pool: Any = super().get_connection_with_tls_context(*args, **options)
        pool.ConnectionCls = _HTTPS if pool.scheme == "https" else _HTTP
        return pool


def _session(retries: urllib3.Retry | int = 0) -> requests.Session:
    http = requests.Session()
    for scheme in ("http://", "https://"):
        http.mount(scheme, _Adapter(max_retries=retries))
    return http


class _Stopped(Exception):
    """The program is ending; what has arrived is kept."""


class Downloader:
    """Fetches files into a folder."""

    def __init__(self, folder: Path, tries: int = 5, timeout: float = 60.0, pause: float = 1.0):
        """Configure downloads.

        Args:
          folder: where the files go.
          tries: tries for each file.
          timeout: seconds without a byte, below 1,000 bytes/s or for an answer's headers, after which a connection is
            closed.
          pause: seconds before the second try of a file; doubled for each further one.
        """
        self.folder = folder
        self._tries = tries
        self._timeout = timeout
        self._pause = pause
        self._http = _session()
        self._stopped = threading.Event()

    def fetch_all(self, files: Sequence[Remote], connections: int, progress: Callable[[Remote, str], None]) -> None:
        """Fetch files over several connections; a failed file does not keep the others.

        Args:
          files: the files.
          connections: number of files that are fetched at a time.
          progress: called with a file that is "there" already, "fetched", or will be fetched "again: REASON".

        Raises:
          UserError: some files could not be fetched; names them and the reasons. Or the folder cannot be made, or
            another download uses it.
        """
        failed: dict[Remote, str] = {}
        with locked(self.folder), ThreadPoolExecutor(connections) as pool:
            self._stopped.clear()  # set by an earlier call that was interrupted
            running = {pool.submit(self._fetch, file, partial(progress, file)): file for file in files}
            try:
                for done in as_completed(running):
                    error = done.exception()
                    if isinstance(error, UserError):
                        failed[running[done]] = str(error)
                    elif error is not None:
                        raise error
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if failed:
            reasons = "; ".join(failed[file] for file in files if file in failed)
            raise UserError(f"{len(failed)} of {len(files)} files are missing: {reasons}; run the same command again")

    def _fetch(self, file: Remote, progress: Callable[[str], None]) -> None:
        """Fetch one file unless it is complete; UserError after `tries` failed tries."""
        reason = ""
        for attempt in range(self._tries):
            if attempt:
                progress(f"again: {reason}")
                self._stopped.wait(min(self._pause * 2 ** (attempt - 1), _MAX_PAUSE))
            self._check_running()
            try:
                return progress(self._try(file))
            except requests.HTTPError as error:
                assert error.response is not None
                reason = f"HTTP {error.response.status_code} {error.response.reason}"
                if error.response.status_code not in _TRANSIENT:
                    break
            except urllib3.exceptions.ProtocolError as error:
                reason = f"the connection broke ({_root_cause(error)})"
            except _PROBLEMS as error:
                reason = _root_cause(error)
        raise UserError(f"{file.url}: {reason}")

    def _try(self, file: Remote) -> str:
        """Fetch what is missing of a file and its sidecar; return "there" or "fetched"."""
        path = self.folder / file.name
        sidecar = _read(self._http, f"{file.url}.md5", self._timeout)
        md5 = stated_md5(sidecar)
        if md5 is None:
            raise OSError("its .md5 holds no MD5 sum")
        there = path.exists() and _md5(path) == md5
        if not there:
            partial_path = Path(f"{path}.partial")
            self._append(file.url, partial_path)
            if (found := _md5(partial_path)) != md5:
                partial_path.unlink()
                raise OSError(f"its MD5 is {found}, its sidecar says {md5}")
            os.replace(partial_path, path)
        write_text(f"{path}.md5", sidecar)
        return "there" if there else "fetched"

    def _append(self, url: str, path: Path) -> None:
        """Append to `path` what is missing of the file."""
        have = path.stat().st_size if path.exists() else 0
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        with self._http.get(url, headers=headers, stream=True, timeout=self._timeout) as response:
            if response.status_code == 416:  # `path` is at least as long as the file: the caller compares MD5 sums
                return
            response.raise_for_status()
            with open(path, "ab") as output:
                if response.status_code != 206:  # the server ignores ranges
                    output.truncate(0)
                for block in _blocks(response, self._timeout):
                    output.write(block)
                    self._check_running()

    def _check_running(self) -> None:
        if self._stopped.is_set():
            raise _Stopped


def list_files(mirror: str, part: Part, *, tries: int = 5, timeout: float = 60.0) -> list[Remote]:
    """Return the files that the mirror's listings name, sorted by name.

    Args:
      mirror: URL of a folder that holds baseline/ and updatefiles/.
      part: which of the two.
      tries: tries for each listing.
      timeout: seconds without a byte, below 1,000 bytes/s or for an answer's headers, after which a connection is
        closed.

    Raises:
      UserError: a listing cannot be read or names no file.
    """
    found: dict[str, Remote] = {}
    http = _session(urllib3.Retry(tries - 1, backoff_factor=1, backoff_max=_MAX_PAUSE, status_forcelist=_TRANSIENT))
    for folder in _FOLDERS[part]:
        base = f"{mirror.rstrip('/')}/{folder}/"
        try:
            listing = _read(http, base, timeout)
        except _PROBLEMS as error:
            reason = _root_cause(error)
            raise UserError(
                f"{base}: its listing cannot be read ({reason}); check --mirror and the connection"
            ) from None
        names = {match[0] for match in _NAME.finditer(listing)}
        if not names:
            raise UserError(f"{base}: its listing names no pubmed..n....xml.gz; check --mirror")
        found |= {name: Remote(name, base + name) for name in names}
    return [found[name] for name in sorted(found)]


def choose(files: Iterable[Remote], numbers: str | None) -> list[Remote]:
    """Return the files with the given numbers, such as "1-20,1335"; None returns all.

    Raises:
      UserError: `numbers` is malformed or names a file that is not there.
    """
    files = list(files)
    if numbers is None:
        return files
    by_number = {int(match[1]): file for file in files if (match := _NAME.fullmatch(file.name))}
    there = f"{min(by_number)}-{max(by_number)}" if by_number else "none"
    wanted: set[int] = set()
    for part in numbers.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part)
        chosen = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not chosen:
            raise UserError(f"--numbers {numbers}: give numbers and ranges such as 1-20,1335")
        for number in chosen:  # one by one: a range may be absurdly long
            if number not in by_number:
                raise UserError(f"--numbers {numbers}: there is no file {number}; the mirror has {there}")
            wanted.add(number)
    return [by_number[number] for number in sorted(wanted)]


def _read(http: requests.Session, url: str, timeout: float) -> str:
    with http.get(url, stream=True, timeout=timeout) as response:
        response.raise_for_status()
        content = bytearray()
        for block in _blocks(response, timeout, decode_content=True):
            content += block
            if len(content) > _LONGEST_TEXT:
                raise OSError(f"more than {_LONGEST_TEXT >> 20} MB arrive, where a listing or an MD5 sum should")
        return content.decode("utf-8", "replace")


def _blocks(response: requests.Response, period: float, *, decode_content: bool = False) -> Iterator[bytes]:
    """Yield what arrives, however little at a time.

    Args:
      response: a response whose body has not been read.
      period: seconds over which the speed is measured.
      decode_content: undo the transfer's compression.

    Raises:
      OSError: it arrives more slowly than `_LEAST_SPEED`.
    """
    start, arrived = time.monotonic(), 0
    while block := response.raw.read1(_BLOCK_BYTES, decode_content=decode_content):
        yield block
        arrived += len(block)
        if (passed := time.monotonic() - start) > period:
            if arrived < _LEAST_SPEED * passed:
                raise OSError(f"{arrived / passed:.0f} bytes/s arrive, less than {_LEAST_SPEED}")
            start, arrived = time.monotonic(), 0


def _root_cause(error: BaseException) -> str:
    """Return the message of the innermost exception; those around it only name connection pools."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return str(error) or type(error).__name__


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
