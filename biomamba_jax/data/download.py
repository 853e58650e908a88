"""NLM's baseline and update files by https: in parallel, resumed where a connection broke, checked by MD5.

A file is downloaded as NAME.partial. What a broken connection or a kill leaves of it is the beginning of the next try
(HTTP ranges); once it is as long as the server says its MD5 must be that of the sidecar NAME.md5, and it gets its name.
Otherwise it is thrown away and fetched again from its first byte. A file that is there whole is not fetched again. The
file `lock` in the folder keeps a second download out.
"""

import hashlib
import http.client
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from biomamba_jax.data.input_files import stated_md5
from biomamba_jax.data.work import locked
from biomamba_jax.errors import UserError

NLM = "https://ftp.ncbi.nlm.nih.gov/pubmed"
Part = Literal["baseline", "updates", "all"]
_FOLDERS: dict[str, tuple[str, ...]] = {
    "baseline": ("baseline",),
    "updates": ("updatefiles",),
    "all": ("baseline", "updatefiles"),
}
_NAME = re.compile(r"pubmed\d\dn(\d{4,})\.xml\.gz")
_BLOCK = 1 << 18
_LONGEST_PAUSE = 60.0
_PROBLEMS = (OSError, http.client.HTTPException)  # of the network; urllib's errors are OSErrors


class Remote(NamedTuple):
    """A file on the server."""

    name: str
    url: str


class _Unwanted(Exception):
    """What arrived is not the file; why."""


class _Stopped(Exception):
    """The program is ending; what has arrived is kept."""


@dataclass(frozen=True)
class Downloader:
    """How files are fetched.

    folder: where they go. tries: of one file. timeout: seconds without a byte after which a connection is given up.
    pause: seconds before the second try of a file; doubled for each further one.
    """

    folder: Path
    tries: int = 5
    timeout: float = 60.0
    pause: float = 1.0
    _stopped: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    def fetch_all(self, files: Sequence[Remote], connections: int, progress: Callable[[Remote, str], None]) -> None:
        """Fetches all of `files`, so many at a time; what goes wrong with one does not keep the others.

        Args:
          progress: told of each file when it is "there" already, "fetched", or is to be fetched "again: WHY".

        Raises:
          UserError: names the files that could not be had in `tries` tries, and why; the others are there. Or the
            folder cannot be made, or another download is at work in it.
        """
        with locked(self.folder):
            self._stopped.clear()  # of an earlier call
            self._fetch_all(files, connections, progress)

    def _fetch_all(self, files: Sequence[Remote], connections: int, progress: Callable[[Remote, str], None]) -> None:
        failed: dict[Remote, str] = {}
        waiting = iter(files)
        running: dict[Future[None], Remote] = {}
        with ThreadPoolExecutor(connections) as pool:
            try:
                while True:
                    for file in waiting:
                        running[pool.submit(self.fetch, file, partial(progress, file))] = file
                        if len(running) >= connections:
                            break
                    if not running:
                        break
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        file, error = running.pop(done), done.exception()
                        if isinstance(error, UserError):
                            failed[file] = str(error)
                        elif error is not None:
                            raise error
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        if failed:
            reasons = "; ".join(failed[file] for file in files if file in failed)
            raise UserError(f"{len(failed)} of {len(files)} files are missing: {reasons}; run the same command again")

    def fetch(self, file: Remote, progress: Callable[[str], None] = lambda what: None) -> None:
        """Fetches one file unless it is there whole; UserError when `tries` tries were in vain."""
        path = self.folder / file.name
        reason = ""
        for attempt in range(self.tries):
            if attempt:
                progress(f"again: {reason}")
                self._stopped.wait(min(self.pause * 2 ** (attempt - 1), _LONGEST_PAUSE))
            self._go_on()
            try:
                sidecar = self._read(f"{file.url}.md5").decode("utf-8", "replace")
                md5 = stated_md5(sidecar)
                if md5 is None:
                    raise _Unwanted("its .md5 holds no MD5 sum")
                if path.exists() and _md5(path) == md5:
                    progress("there")
                else:
                    self._download(file, path, md5)
                    progress("fetched")
                _write(Path(f"{path}.md5"), sidecar)
                return
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}"
                if error.code in (401, 403, 404, 410):  # trying again does not help
                    break
            except _Unwanted as error:
                reason = str(error)
            except _PROBLEMS as error:
                reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        raise UserError(f"{file.url}: {reason}")

    def _download(self, file: Remote, path: Path, md5: str) -> None:
        """Appends to NAME.partial what is missing, checks the whole, and names it."""
        beginning = Path(f"{path}.partial")
        have = beginning.stat().st_size if beginning.exists() else 0
        request = urllib.request.Request(file.url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            response = urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # as long as the file, or longer: only its sum can tell
                return self._accept(beginning, path, md5)
            raise
        with response, open(beginning, "ab") as output:
            if response.status != 206:  # the server sends all of it
                output.truncate(0)
                have = 0
            length = response.headers.get("Content-Length")
            while block := response.read1(_BLOCK):  # what has arrived, however little
                output.write(block)
                self._go_on()
        received = beginning.stat().st_size - have
        if length is not None and received < int(length):
            raise _Unwanted(f"the connection ended after {received:,} of {int(length):,} bytes")
        return self._accept(beginning, path, md5)

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise _Stopped

    def _accept(self, arrived: Path, path: Path, md5: str) -> None:
        found = _md5(arrived)
        if found != md5:
            arrived.unlink()
            raise _Unwanted(f"its MD5 is {found}, its sidecar says {md5}")
        os.replace(arrived, path)

    def _read(self, url: str) -> bytes:
        with urllib.request.urlopen(url, timeout=self.timeout) as response:
            return response.read()


def list_files(mirror: str, part: Part, *, tries: int = 5, timeout: float = 60.0) -> list[Remote]:
    """The files that the mirror's listings name, in NLM's order.

    Args:
      mirror: URL of a folder that holds baseline/ and updatefiles/.

    Raises:
      UserError: a listing cannot be read or names no file.
    """
    found: dict[str, Remote] = {}
    for folder in _FOLDERS[part]:
        base = f"{mirror.rstrip('/')}/{folder}/"
        listing = _listing(base, tries, timeout)
        names = sorted(set(match[0] for match in _NAME.finditer(listing)))
        if not names:
            raise UserError(f"{base}: its listing names no pubmed..n....xml.gz; check --mirror")
        found |= {name: Remote(name, urllib.parse.urljoin(base, name)) for name in names}
    return [found[name] for name in sorted(found)]


def _listing(url: str, tries: int, timeout: float) -> str:
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(url, timeout=timeout) as response:
                return response.read().decode("utf-8", "replace")
        except (*_PROBLEMS, ValueError) as error:
            reason = str(getattr(error, "reason", "") or error)
            if isinstance(error, ValueError) or attempt == tries - 1:
                break
            time.sleep(min(2.0**attempt, _LONGEST_PAUSE))
    raise UserError(f"{url}: its listing cannot be read ({reason}); check --mirror and the connection")


def choose(files: Iterable[Remote], numbers: str | None) -> list[Remote]:
    """Those of `files` whose numbers are named, such as "1-20,1335"; None takes all.

    Raises:
      UserError: the text is none of numbers, or names one that is not there.
    """
    files = list(files)
    if numbers is None:
        return files
    by_number = {int(match[1]): file for file in files if (match := _NAME.fullmatch(file.name))}
    wanted: set[int] = set()
    there = f"{min(by_number)}-{max(by_number)}" if by_number else "none"
    for part in numbers.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise UserError(f"--numbers {numbers}: give numbers and ranges such as 1-20,1335")
        for number in range(first, last + 1):
            if number not in by_number:
                raise UserError(f"--numbers {numbers}: there is no file {number}; the mirror has {there}")
            wanted.add(number)
    return [by_number[number] for number in sorted(wanted)]


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)
